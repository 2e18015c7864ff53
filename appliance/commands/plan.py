"""`appliance plan`: whether a model fits, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.commands._progress import fetch_progress
from appliance.commands._settings import load_settings
from appliance.errors import ConfigError, ConfigProblem, ModelError
from appliance.model_files import resolve_model
from appliance.settings import Settings

if TYPE_CHECKING:
    from appliance.engine.footprint import ModelFacts
    from appliance.engine.memory_plan import DeviceMemory, MemoryPlan
    from appliance.engine.wire import Start

DOES_NOT_FIT: Final = 3
_UNITS: Final = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "g": 1 << 30, "m": 1 << 20}
_BYTES = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. 0: it fits; 3: a start would be refused; 1 (ModelError): the model cannot be read; 2 (ConfigError): wrong settings."""
    settings = load_settings(arguments).settings
    start = _start(settings, _model_path(arguments.model_name or settings.model.path, settings.state_dir))
    from appliance.engine.footprint import num_parameters, read_facts

    facts = read_facts(start.model_path)
    plan = _plan(start, facts, None if arguments.gpu_memory is None else parse_bytes(arguments.gpu_memory))
    if arguments.json:
        print(json.dumps(_as_json(plan, num_parameters(facts.config)), indent=2))
    else:
        _show(plan, facts.config.family, num_parameters(facts.config))
    return 0 if plan.sizes is not None else DOES_NOT_FIT


def parse_bytes(text: str) -> int:
    """`80GiB`, `80GB`, `80e9` or a plain number of bytes; `G` and `M` are binary. Raises ConfigError."""
    match = _BYTES.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError([ConfigProblem("--gpu-memory", text, "the command line", "bytes, such as 80GiB, 80GB or 85899345920")])
    return round(float(match[1]) * _UNITS[match[2].lower()])


def _model_path(path: str, state_dir: Path) -> str:
    """What `Start.model_path` takes. A folder needs no weights in it; a hub id must have been fetched."""
    local = Path(path).expanduser()
    if path.startswith("dummy:") or local.is_file():
        return resolve_model(path, state_dir)
    if local.is_dir():
        return str(local)
    if path == "embedded":
        with fetch_progress() as progress:
            return resolve_model(path, state_dir, progress)
    kept = sorted((state_dir / "models" / "hub" / f"models--{path.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    if kept:
        return str(kept[-1].parent)
    raise ModelError(f"{path} is not on this machine: give a folder (its config.json is enough) or fetch it: appliance models fetch --model {path}")


def _start(settings: Settings, model_path: str) -> Start:
    from appliance.engine.wire import Start

    shared = {name: value for name, value in settings.engine if name in Start.__struct_fields__}
    model = settings.model
    return Start(
        model_path=model_path, cache_dir="", dtype=model.dtype, quantization=model.quantization, context_length=model.context_length, **shared
    )


def _plan(start: Start, facts: ModelFacts, gpu_bytes: int | None) -> MemoryPlan:
    """For an empty card of so many bytes, else for this machine's GPU as it is now, else for its host memory."""
    import torch

    from appliance.engine.loading import storage_rule
    from appliance.engine.memory_plan import make_plan

    device = _device(start, gpu_bytes)
    return make_plan(facts, start, device, storage_rule(facts.config, torch.device("cuda" if device.is_cuda else "cpu")))


def _device(start: Start, gpu_bytes: int | None) -> DeviceMemory:
    from appliance.engine.gpu_memory import gpu_memory
    from appliance.engine.memory_plan import DeviceMemory
    from appliance.engine.sizing import available_host_bytes

    if gpu_bytes is not None:
        return DeviceMemory(f"an empty GPU of {gpu_bytes / 1e9:.1f} GB", True, gpu_bytes, gpu_bytes)
    if start.device != "cpu":
        found = gpu_memory()
        if found is not None:
            return found
        if start.device == "cuda":
            raise ModelError("device cuda was asked for, and the driver shows no GPU; plan for one with --gpu-memory 80GiB")
    free = available_host_bytes()
    return DeviceMemory("this machine's CPU", False, free, free)


def _show(plan: MemoryPlan, family: str, parameters: int) -> None:
    from appliance.engine.memory_plan import usable_bytes

    demand, start, device = plan.demand, plan.start, plan.device
    print(f"{Path(start.model_path.removeprefix('dummy:')).name}: {family}, {parameters / 1e9:.2f} billion parameters, on {device.name}\n")
    rows = [(f"may be used, of {device.total_bytes / 1e9:.2f} GB", usable_bytes(start, device)), ("weights", demand.weights)]
    if device.is_cuda:
        rows += [("CUDA context and libraries", demand.runtime), ("buffers of the batch", demand.buffers)]
        rows += [("activations of the largest step", demand.activations), ("CUDA graphs", demand.graphs)]
    rows.append(("left for the KV cache", plan.free_for_kv))
    for name, num_bytes in rows:
        print(f"  {name:34}{num_bytes / 1e9:9.3f} GB")
    print(f"  {'KV cache, a token':34}{demand.kv_block / start.block_size / 1e3:9.1f} kB\n")
    if plan.sizes is None:
        print(f"does not fit: {plan.problem}.\n")
        for option in plan.options:
            print(f"  with {option}")
        if not plan.options:
            print("  nothing that is known here would make it fit: take a smaller model")
        return
    sizes = plan.sizes
    print(f"fits: context length {sizes.context_length}, {plan.kv_tokens} tokens of KV cache, up to {sizes.max_num_seqs} sequences in a step")
    print("\n  sequences of this length     fit at once")
    for length, count in plan.fits:
        if length <= sizes.context_length:
            limit = f" (a step takes {sizes.max_num_seqs})" if count > sizes.max_num_seqs else ""
            print(f"  {length:24} {count:15}{limit}")
    full = dict(plan.fits).get(sizes.context_length, plan.kv_tokens // sizes.context_length)
    if full < sizes.max_num_seqs:
        print(f"\nBeyond {full} sequences of {sizes.context_length} tokens, others wait, and the newest may be recomputed.")


def _as_json(plan: MemoryPlan, parameters: int) -> dict[str, object]:
    from appliance.engine.memory_plan import usable_bytes

    sizes = plan.sizes
    return {
        "model": plan.start.model_path,
        "num_parameters": parameters,
        "device": asdict(plan.device),
        "usable_bytes": usable_bytes(plan.start, plan.device),
        "weight_bytes": plan.demand.weights,
        "runtime_bytes": plan.demand.runtime,
        "buffer_bytes": plan.demand.buffers,
        "activation_bytes": plan.demand.activations,
        "graph_bytes": plan.demand.graphs,
        "kv_cache_bytes": plan.free_for_kv,
        "kv_bytes_per_token": plan.demand.kv_block / plan.start.block_size,
        "kv_tokens": plan.kv_tokens,
        "fits": sizes is not None,
        "problem": plan.problem,
        "context_length": None if sizes is None else sizes.context_length,
        "max_num_seqs": None if sizes is None else sizes.max_num_seqs,
        "num_blocks": None if sizes is None else sizes.num_blocks,
        "sequences_at_length": {str(length): count for length, count in plan.fits},
        "options": [asdict(option) for option in plan.options],
    }
