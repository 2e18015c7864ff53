"""Whether a model fits a device as asked, which context lengths and how many sequences, and what to change where it does not.

The arithmetic is `footprint.predict` and `sizing.choose`, the engine's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from appliance.engine import footprint, sizing
from appliance.engine.footprint import Demand, ModelFacts
from appliance.engine.wire import Start
from appliance.errors import ModelError

_CARDS_GIB = (16, 24, 32, 40, 48, 80, 96, 141, 180, 288)
_CONTEXTS = tuple(1024 << step for step in range(12))


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device as far as memory goes. free_bytes: what nobody holds now; all of it, where an empty card is planned for."""

    name: str
    is_cuda: bool
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Storage:
    """Sizes of what is stored: bytes of a value of weights and activations, and of a block of keys and values of all layers."""

    dtype_bytes: int
    kv_block_bytes: int


StorageOf = Callable[[Start], Storage]  # by the settings; raises ModelError where the device has no such storage


@dataclass(frozen=True, slots=True)
class Option:
    """A change under which the model fits, or fits better."""

    change: str
    context_length: int
    num_sequences: int  # of that length at once

    def __str__(self) -> str:
        count = "1 sequence" if self.num_sequences == 1 else f"{self.num_sequences} sequences"
        return f"{self.change}: context length {self.context_length}, {count} of it at once"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a start would do. `sizes` is None where it would be refused, for the reason in `problem`."""

    start: Start
    device: DeviceMemory
    demand: Demand
    free_for_kv: int  # bytes left for KV blocks; negative: so much is missing before there is a block
    kv_tokens: int
    sizes: sizing.Sizes | None
    problem: str | None
    fits: tuple[tuple[int, int], ...]  # (context length, sequences of that length that fit at once), rising
    options: tuple[Option, ...]

    @property
    def advice(self) -> str:
        """What to change, in one paragraph; for an error message."""
        if self.options:
            return "What would fit: " + "; ".join(map(str, self.options))
        return "Nothing that is known here would make it fit: take a smaller model"


def make_plan(facts: ModelFacts, start: Start, device: DeviceMemory, storage_of: StorageOf) -> MemoryPlan:
    """Plan `start` on `device`."""
    demand, free = _demand(facts, start, device, storage_of)
    wanted = _wanted_context(facts, start)
    sizes, problem = None, None
    try:
        sizes = _choose(facts, start, device, demand, free)
    except ModelError as error:
        problem = str(error)
    blocks = sizing.fitting_blocks(start, is_cuda=device.is_cuda, free_bytes=free, demand=demand)
    if start.num_blocks is not None:
        if start.num_blocks > blocks and device.is_cuda:
            sizes, problem = None, f"{start.num_blocks} KV blocks were asked for, and {blocks} fit"
        blocks = start.num_blocks
    lengths = sorted({length for length in _CONTEXTS if length < wanted} | {wanted})
    fits = tuple((length, blocks // -(-length // start.block_size)) for length in lengths)
    free_for_kv = free - demand.reserve if device.is_cuda else round(free * 0.25)
    options = () if sizes is not None else tuple(_options(facts, start, device, storage_of))
    return MemoryPlan(start, device, demand, free_for_kv, blocks * start.block_size, sizes, problem, fits, options)


def _wanted_context(facts: ModelFacts, start: Start) -> int:
    return min(start.context_length or facts.config.max_positions, facts.config.max_positions)


def _demand(facts: ModelFacts, start: Start, device: DeviceMemory, storage_of: StorageOf) -> tuple[Demand, int]:
    """The demand, and what is free once the weights are loaded."""
    storage = storage_of(start)
    demand = footprint.predict(
        facts,
        start,
        is_cuda=device.is_cuda,
        dtype_bytes=storage.dtype_bytes,
        kv_block_bytes=storage.kv_block_bytes,
        limits=sizing.step_limits(start, is_cuda=device.is_cuda),
    )
    return demand, usable_bytes(start, device) - demand.weights - demand.runtime


def usable_bytes(start: Start, device: DeviceMemory) -> int:
    """What the engine may take of the device in all."""
    if not device.is_cuda:
        return device.free_bytes
    return int(device.free_bytes - device.total_bytes * (1 - start.memory_fraction))


def _choose(facts: ModelFacts, start: Start, device: DeviceMemory, demand: Demand, free: int) -> sizing.Sizes:
    if free - demand.reserve < 0:
        what = "memory of the device" if device.is_cuda else "host memory"
        needed = demand.weights + demand.runtime + demand.reserve
        raise ModelError(
            f"weights ({demand.weights / 1e9:.2f} GB) and what steps need ({(needed - demand.weights) / 1e9:.2f} GB) "
            f"do not fit the {usable_bytes(start, device) / 1e9:.2f} GB of {what} that may be used"
        )
    return sizing.choose(start, is_cuda=device.is_cuda, free_bytes=free, demand=demand, model_context=facts.config.max_positions)


def _options(facts: ModelFacts, start: Start, device: DeviceMemory, storage_of: StorageOf) -> list[Option]:
    """Changes that make it fit, cheapest first: settings, a shorter context, a larger card."""
    found = []
    for change, fields in _changes(start, device):
        try:
            other = msgspec.structs.replace(start, **fields)
            if (option := _try(change, facts, other, device, storage_of)) is not None:
                found.append(option)
        except ModelError:  # no such storage on this device
            continue
    if start.context_length is not None and (shorter := _longest(facts, start, device, storage_of)) is not None:
        found.append(shorter)
    if device.is_cuda:
        for gib in _CARDS_GIB:
            card = DeviceMemory(f"a card of {gib} GiB", True, gib << 30, gib << 30)
            if card.total_bytes > device.total_bytes and (option := _try(card.name, facts, start, card, storage_of)) is not None:
                found.append(option)
                break
    return found


def _changes(start: Start, device: DeviceMemory) -> list[tuple[str, dict[str, object]]]:
    cache = {"kv_cache_dtype": "fp8"} if start.kv_cache_dtype == "auto" else {}
    weights = {"quantization": "fp8"} if start.quantization in ("auto", "none") else {}
    fewer = {"max_num_seqs": 32, "max_num_batched_tokens": 512}
    changes: list[tuple[str, dict[str, object]]] = []
    if device.is_cuda:
        if cache:
            changes.append(("--kv-cache-dtype fp8", dict(cache)))
        if weights:
            changes.append(("--quantization fp8", dict(weights)))
        if cache and weights:
            changes.append(("--quantization fp8 --kv-cache-dtype fp8", {**cache, **weights}))
        changes.append(("--max-num-seqs 32 --engine.max_num_batched_tokens 512", dict(fewer)))
        changes.append(("--engine.cuda_graphs false", {"cuda_graphs": False}))
        if start.memory_fraction < 0.95:
            changes.append(("--engine.memory_fraction 0.95", {"memory_fraction": 0.95}))
    return changes


def _try(change: str, facts: ModelFacts, start: Start, device: DeviceMemory, storage_of: StorageOf) -> Option | None:
    demand, free = _demand(facts, start, device, storage_of)
    try:
        sizes = _choose(facts, start, device, demand, free)
    except ModelError:
        return None
    return Option(change, sizes.context_length, sizes.fitting_blocks // -(-sizes.context_length // start.block_size))


def _longest(facts: ModelFacts, start: Start, device: DeviceMemory, storage_of: StorageOf) -> Option | None:
    """The longest context that one sequence can have with nothing else changed."""
    demand, free = _demand(facts, start, device, storage_of)
    blocks = sizing.fitting_blocks(start, is_cuda=device.is_cuda, free_bytes=free, demand=demand)
    length = blocks * start.block_size
    if length == 0 or length >= _wanted_context(facts, start):
        return None
    return _try(f"--context-length {length}", facts, msgspec.structs.replace(start, context_length=length), device, storage_of)
