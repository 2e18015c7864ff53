"""What the kernels share about the chip they run on: its size, and counters that live as long as the process."""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

NUM_COUNTERS: Final = 1 << 16
_INTERPRETED_MULTIPROCESSORS: Final = 132  # under the interpreter choose as for a Hopper chip


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device (132 on an H100 or H200); the same number for a CPU, where the interpreter runs."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that takes PDL: programmatic dependent launch from Hopper on, nothing elsewhere (the interpreter included).

    Such a kernel may start while the one before it in the stream still runs. It lets its own successor do so (gdc_launch_dependents) at once and
    waits (gdc_wait) before it touches anything but weights, so launch latency and the first weight tile overlap the predecessor. Every kernel
    waits for the whole of the one before, so order holds along the stream.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@functools.cache
def arrival_counters(device: torch.device) -> Tensor:
    """`[NUM_COUNTERS]` int32 zeros. Programs that split one result count their arrivals here; the last one combines and puts its counter back
    to 0, so a replayed graph finds zeros. One stream uses them at a time: kernels of one step are in stream order.

    Allocated on first use, which must not be inside a graph capture (every kernel is compiled by an eager run before it is captured).
    """
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)


def next_power_of_2(n: int) -> int:
    """The least power of two >= n (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Ceiling division of non-negative integers."""
    return -(-a // b)
