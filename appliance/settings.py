"""The settings tree: one frozen object, read once. Loading (TOML file < environment < flags) is `appliance.configuration.load`.

Every field has a type, a range and a sentence; `appliance config` and docs/settings.md derive from them. None means "chosen at start from
what the machine has", and the choice is printed with its reason.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400 * 365)]
Share = Annotated[float, Field(gt=0, lt=1)]
Price = Annotated[float, Field(ge=0, le=1e9)]


class _Slice(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(_Slice):
    """The HTTP side."""

    host: str = Field("127.0.0.1", description="Address to bind. Without an API key only loopback addresses are allowed.")
    port: Port = Field(8000, description="TCP port; 0 takes a free one and prints it.")
    api_keys_file: Path | None = Field(
        None, description="File with one `name:key` (or bare key) a line. Keys close every route but /health and /ready."
    )
    api_key: SecretStr | None = Field(None, description="A single API key; from the environment or the file, never from a flag.")
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024, le=1 << 30, description="Largest request body; beyond it 413.")
    request_timeout_seconds: Seconds = Field(600.0, description="Default server-side deadline of a request, queueing included.")
    drain_seconds: float = Field(30.0, ge=0, le=3600, description="How long SIGTERM waits for open requests before it aborts them.")
    ping_seconds: Seconds = Field(15.0, description="Idle time after which a stream gets a comment line, so that proxies keep it open.")
    max_choices: int = Field(16, ge=1, le=128, description="Largest `n` of a request.")
    max_logprobs: int = Field(20, ge=0, le=100, description="Largest `top_logprobs` of a request.")


class ModelSettings(_Slice):
    """Which model, and in which form."""

    path: str = Field(
        "embedded", description="`embedded`, a Hugging Face folder, a GGUF file, `dummy:FOLDER` (random weights from its config.json) or a hub id."
    )
    served_name: str | None = Field(None, description="Name in the API; default: from the path.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Arithmetic of activations and unquantised weights.")
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = Field(
        "auto", description="`auto` keeps the file's own form; `none` widens to dtype."
    )
    context_length: int | None = Field(None, ge=16, le=1 << 24, description="Longest prompt plus output of one sequence, in tokens.")
    chat_template: Path | None = Field(None, description="Jinja chat template that replaces the model's own.")
    seed: int = Field(0, ge=0, le=(1 << 63) - 1, description="Seed of `dummy:` weights.")


class EngineSettings(_Slice):
    """The engine process."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes the GPU where there is one.")
    kernels: Literal["auto", "reference", "cpu", "triton"] = Field("auto", description="Implementation of the kernels.")
    max_num_seqs: int | None = Field(None, ge=1, le=4096, description="Most sequences in one step's batch.")
    max_num_batched_tokens: int | None = Field(None, ge=16, le=1 << 20, description="Token budget of one step.")
    block_size: int = Field(16, ge=8, le=256, multiple_of=8, description="KV tokens in a block.")
    num_blocks: int | None = Field(None, ge=2, le=1 << 28, description="KV blocks; default: from free memory.")
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="`auto` is the activations' (bfloat16); `fp8` holds twice the tokens at some loss of accuracy, on a GPU."
    )
    memory_fraction: Share = Field(0.9, description="Share of the device's memory that weights, activations and KV may take together.")
    prefix_caching: bool = Field(True, description="Reuse KV blocks of equal prefixes.")
    max_waiting: int = Field(1024, ge=1, le=1 << 20, description="Bound of the waiting queue; beyond it 503.")
    num_threads: int | None = Field(None, ge=1, le=1024, description="CPU compute threads.")
    cuda_graphs: bool = Field(True, description="Replay steps as CUDA graphs.")
    load_timeout_seconds: Seconds = Field(900.0, description="Deadline of loading a model; past it the engine counts as hung.")
    step_timeout_seconds: Seconds = Field(60.0, description="Deadline of one step; past it the engine counts as hung.")
    max_restarts: int = Field(5, ge=0, le=1000, description="Restarts within ten minutes before the engine is given up.")


class SloSettings(_Slice):
    """What users were promised. None: chosen from the hardware found."""

    ttft_seconds: Seconds | None = Field(None, description="Time to first token that counts as good.")
    tpot_seconds: Seconds | None = Field(None, description="Mean time per output token that counts as good.")
    target: Share = Field(0.99, description="Share of requests that must be good.")


class MetricsSettings(_Slice):
    """Measurements."""

    enabled: bool = Field(
        True, description="Measure, and serve /metrics. Off: no samples, and no policy loop, which has nothing to decide by. SQL has its own switch."
    )
    compat: tuple[Literal["vllm", "otel"], ...] = Field(
        (), description="Namespaces that /metrics serves beside our own: `vllm`, `otel` (GenAI conventions), separated by commas."
    )
    sample_seconds: Seconds = Field(10.0, description="Period of the samples written to SQL.")
    fast_window_seconds: Seconds = Field(30.0, description="Fast window of live statistics and of the policy.")
    slow_window_seconds: Seconds = Field(300.0, description="Slow window of live statistics and of the policy.")


class StoreSettings(_Slice):
    """SQL."""

    enabled: bool = Field(True, description="Write the ledger, samples and decisions to SQL.")
    url: SecretStr | None = Field(None, description="SQLAlchemy URL (sqlite+aiosqlite or postgresql+asyncpg); default: SQLite in the state folder.")
    queue_rows: int = Field(50_000, ge=100, le=10_000_000, description="Bound of the writer's queue; beyond it rows spool to disk.")
    flush_seconds: Seconds = Field(2.0, description="Longest time that a row waits for its batch; a batch costs some milliseconds of CPU.")
    retention_days: int = Field(30, ge=1, le=36500, description="Age at which ledger rows, decisions and engine events are purged.")
    sample_retention_days: int = Field(7, ge=1, le=36500, description="Age at which samples are purged; their rollups stay.")
    minute_retention_days: int = Field(60, ge=1, le=36500, description="Age at which samples by minute are purged.")
    hour_retention_days: int = Field(1100, ge=1, le=36500, description="Age at which samples and usage by hour are purged.")


class CostSettings(_Slice):
    """What usage costs, for reports. Without prices no cost is shown."""

    prompt_per_million: Price | None = Field(None, description="Price of a million prompt tokens.")
    cached_per_million: Price | None = Field(None, description="Price of a million prompt tokens from the prefix cache; default: that of the others.")
    output_per_million: Price | None = Field(None, description="Price of a million output tokens.")
    currency: str = Field("USD", min_length=1, max_length=8, description="The prices' currency, as reports name it.")


class ScalingSettings(_Slice):
    """The policy loop and its signals."""

    mode: Literal["off", "advise", "approve", "act"] = Field(
        "advise", description="advise: decide and record; approve: deliver once approved; act: deliver at once."
    )
    interval_seconds: Seconds = Field(5.0, description="Period of the policy loop.")
    min_replicas: int = Field(1, ge=0, le=10_000, description="Fewest replicas ever asked for.")
    max_replicas: int = Field(8, ge=1, le=10_000, description="Most replicas ever asked for.")
    scale_in_delay_seconds: float = Field(300.0, ge=0, le=86400, description="The desired number falls to the maximum of this much history.")
    startup_seconds: Seconds = Field(120.0, description="Time a new replica needs until it serves.")
    max_queue_age_seconds: Seconds | None = Field(
        None, description="Age of the oldest waiting request that asks for more; default: half the TTFT SLO."
    )
    max_kv_utilisation: Share = Field(0.9, description="KV use over the fast window that asks for more.")
    webhook_urls: tuple[str, ...] = Field((), description="Endpoints of the signals (http or https).")
    webhook_secret: SecretStr | None = Field(None, description="`whsec_` + base64 of 24-64 bytes; several, separated by spaces, while keys rotate.")
    signal_ttl_seconds: Seconds = Field(300.0, description="A signal older than this is no longer delivered.")


class LogSettings(_Slice):
    """Logs, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity that is printed.")
    format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal, else json.")
    prompts: bool = Field(False, description="Print prompt and output text. Off: no text of a user ever reaches a log.")


def default_state_dir() -> Path:
    """$STATE_DIRECTORY (systemd's), else $XDG_STATE_HOME/appliance, else ~/.local/state/appliance."""
    import os

    if directory := os.environ.get("STATE_DIRECTORY"):
        return Path(directory.split(":")[0])
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "appliance"


class Settings(_Slice):
    """Everything, read once at start."""

    state_dir: Path = Field(
        default_factory=default_state_dir, description="Folder for the model, the database, caches and the spool. One server owns it."
    )
    instance_id: str = Field(default_factory=socket.gethostname, min_length=1, max_length=64, description="Name of this node in metrics and SQL.")
    fleet: str = Field("default", min_length=1, max_length=64, description="Name of the group of interchangeable nodes.")
    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    slo: SloSettings = SloSettings()
    metrics: MetricsSettings = MetricsSettings()
    store: StoreSettings = StoreSettings()
    cost: CostSettings = CostSettings()
    scaling: ScalingSettings = ScalingSettings()
    log: LogSettings = LogSettings()
