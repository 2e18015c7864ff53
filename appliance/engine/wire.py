"""The frames between server and engine: msgspec-msgpack with a four-byte little-endian length prefix. Torch-free; both sides import it.

Token ids travel as little-endian int32 bytes (`pack_ids`, `unpack_ids`): a list of Python ints costs ten times as much to decode.
"""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Iterable

import msgspec

from appliance.events import StepCosts, StepStats

MAX_FRAME_BYTES = 256 * 1024 * 1024
_LENGTH = struct.Struct("<I")

assert sys.byteorder == "little", "ids are sent in the machine's own order, which is little-endian wherever torch runs"


def pack_ids(ids: Iterable[int]) -> bytes:
    """`ids` as int32 bytes. Ids outside int32 raise OverflowError."""
    return array.array("i", ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The ids of `pack_ids`."""
    ids = array.array("i")
    ids.frombytes(data)
    return ids.tolist()


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How one sequence is sampled and when it ends. Validated by the server; the engine trusts it."""

    max_tokens: int
    seed: int  # 64 bits, signed; the server mints one where the client gave none
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # the model's own ends included, unless the client set ignore_eos
    num_logprobs: int | None = None  # None: no logprobs; 0: of the sampled token only


class Submit(msgspec.Struct, frozen=True, tag="submit", kw_only=True):
    """A sequence to generate. With `output_ids` it is a resumption: they were sampled (and sent) before, and the next index follows them."""

    sequence_id: int
    prompt_ids: bytes
    sampling: Sampling
    output_ids: bytes = b""
    deadline_at: float | None = None  # CLOCK_MONOTONIC; past it the sequence ends with reason "deadline"
    queued_at: float = 0.0  # CLOCK_MONOTONIC of the first submission, so that a restart does not reset ages
    priority: int = 0  # lower runs first
    key_id: str = ""  # for fair order across keys
    cache_salt: str = ""
    alone: bool = False  # a suspect after two crashes: nothing else runs beside it


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """The client is gone. No further output of this sequence is sent but its end."""

    sequence_id: int


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """The server found a stop string after `num_tokens` outputs; what was sampled beyond is surplus."""

    sequence_id: int
    num_tokens: int


class Start(msgspec.Struct, frozen=True, tag="start", kw_only=True):
    """The first frame to a new engine process: all it needs to know. The fields are those of ModelSettings and EngineSettings."""

    model_path: str  # a folder or GGUF file on this machine, or "dummy:FOLDER"
    cache_dir: str  # for compiled kernels and tuning results
    dtype: str = "auto"
    quantization: str = "auto"
    context_length: int | None = None
    seed: int = 0
    device: str = "auto"
    kernels: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_dtype: str = "auto"
    memory_fraction: float = 0.9
    prefix_caching: bool = True
    max_waiting: int = 1024
    num_threads: int | None = None
    cuda_graphs: bool = True
    load_timeout_seconds: float = 900.0
    step_timeout_seconds: float = 60.0
    itl_target_seconds: float | None = None  # bound of a step that decodes; None: by device


ToEngine = Start | Submit | Abort | Finish


class Ready(msgspec.Struct, frozen=True, tag="ready", kw_only=True):
    """The engine serves. Facts about it, with the reasons for the sizes it chose in words."""

    device: str
    dtype: str
    quantization: str
    vocab_size: int
    context_length: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    load_seconds: float
    reasons: tuple[str, ...]
    kv_dtype: str = ""
    prefix_caching: bool = True
    costs: StepCosts = StepCosts()


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Sent at every change of phase and at least once a second from its own thread.

    `phase` is load, compile, capture, idle or step. `phase_started_at` is CLOCK_MONOTONIC; when `phase_deadline_seconds` have passed since
    then, the server takes the engine for hung. `progress` is 0-1 within a load.
    """

    phase: str
    phase_started_at: float
    phase_deadline_seconds: float
    progress: float = 0.0
    detail: str = ""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (of the distribution before temperature and filters, after penalties and bias) at one output position."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class SequenceEvent(msgspec.Struct, frozen=True, array_like=True):
    """A change in a sequence's life that the ledger wants: `kind` is queued, scheduled, prefilled, preempted or resumed; `value` its number.

    scheduled: first chunk entered a step, value = cached prompt tokens. prefilled: prompt complete. preempted/resumed: blocks lost / back.
    prefill_wait / prefill: its chunk was left out of / is back in the steps.
    """

    sequence_id: int
    kind: str
    at: float
    value: int = 0


class StepOutput(msgspec.Struct, frozen=True, tag="step", kw_only=True):
    """What one step made: parallel arrays, one entry a sampled token."""

    stats: StepStats
    sequence_ids: bytes  # int32, one a token
    token_ids: bytes  # int32, one a token
    finished: tuple[tuple[int, str, str], ...] = ()  # (sequence_id, reason: stop, length, abort, deadline, error, finish; detail)
    events: tuple[SequenceEvent, ...] = ()
    logprobs: dict[int, TokenLogprobs] | None = None  # sequence_id -> of its token of this step; only those that asked


class Events(msgspec.Struct, frozen=True, tag="events"):
    """Events that do not wait for the output of their step.

    `scheduled` belongs here, sent before the step is launched: a prompt that kills the engine in its first step is then known as one that was
    in the batch. An engine that puts it into the StepOutput works too; the server then suspects everyone who could have been let in.
    """

    events: tuple[SequenceEvent, ...]


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """A Submit that the engine will not run: `code` is context_length_exceeded or queue_full."""

    sequence_id: int
    code: str
    message: str


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """The engine cannot start (or go on) and says why before it leaves. `permanent`: a restart would end the same way."""

    message: str
    permanent: bool


FromEngine = Ready | Heartbeat | StepOutput | Events | Rejected | Failure

_encoder = msgspec.msgpack.Encoder()


def encode(message: ToEngine | FromEngine) -> bytes:
    """One frame, prefix included."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into frames. Feed what was read; get the whole messages so far. One owner."""

    def __init__(self, kind: type[ToEngine] | type[FromEngine] | object) -> None:
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[object]:
        """The messages that `data` completes, in order. Raises msgspec.ValidationError or ValueError on a broken frame."""
        self._buffer += data
        messages: list[object] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[start + _LENGTH.size : end]))
            start = end
        if start:
            del self._buffer[:start]
        return messages
