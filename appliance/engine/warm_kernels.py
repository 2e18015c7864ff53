"""Which kernels a GPU engine must have compiled before streams depend on them: compiling one takes a third of a second, while all streams wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from appliance.engine.batch import Bucket, DeviceBatch
from appliance.engine.cuda_graphs import StepGraphs
from appliance.engine.scheduler import SchedulerLimits
from appliance.kernels.ops import Ops, SamplingBatch

_CHUNK_TOKENS = (1, 2, 4, 8, 32, 64, 128, 256, 512, 1024, 2048)  # prefill attention is cut by the longest chunk
# Sets of top-k, top-p and min-p, the usual ones first.
_FILTERS = tuple((k, p, m) for m in (False, True) for k, p in ((False, True), (True, True), (True, False), (False, False)) if k or p or m)


def warm_buckets(limits: SchedulerLimits, graphs: StepGraphs | None) -> list[Bucket]:
    """Steps that together meet every cut of a kernel that serving chooses; without graphs a few, for what every step runs."""
    most = limits.max_num_batched_tokens - 1
    chunk_tokens = min(16, most)
    buckets = [Bucket(1, 0, 0), Bucket(0, 1, chunk_tokens), Bucket(1, 1, chunk_tokens)]
    if graphs is not None:
        buckets += [Bucket(size, 0, 0) for size in graphs.decode_sizes if size > 1]
        buckets += [Bucket(0, 1, size) for size in _CHUNK_TOKENS if size <= most]
        room = limits.max_num_batched_tokens - limits.max_num_seqs
        buckets += [Bucket(limits.max_num_seqs, count, count) for count in graphs.chunk_counts if count <= room]  # the most rows to sample
    return buckets


def apply_no_update(ops: Ops, batch: DeviceBatch) -> None:
    """What a step runs whose updates do not fit the ring, on the row that nothing uses."""
    row = torch.full((1,), batch.dummy_row, dtype=torch.int32, device=batch.state.params.device)
    zero = torch.zeros_like(row)
    ops.apply_updates(batch.state, row, batch.state.params[-1:].clone(), torch.stack([row, zero, zero], dim=1))


class FilteredSamplers:
    """Compiles sampling with top-k, top-p and min-p while the engine is idle. All of it takes a minute or two, once, which is too long for a start;
    afterwards it comes from the cache on disk."""

    def __init__(self, ops: Ops, batch: DeviceBatch, row_counts: list[int]) -> None:
        self._ops = ops
        self._batch = batch
        self._left = deque((count, filters) for filters in _FILTERS for count in row_counts)

    def compile_next(self, logits: Tensor, before: Callable[[], None]) -> bool:
        """For one more number of rows and set, draw from some rows of `logits` `[rows, vocab]`, whatever they hold, after calling `before`.
        False where all were compiled."""
        if not self._left:
            return False
        before()
        count, (top_k, top_p, min_p) = self._left.popleft()
        rows = torch.full((count,), self._batch.dummy_row, dtype=torch.int32, device=logits.device)
        sampling = SamplingBatch(rows=rows, state=self._batch.state, use_top_k=top_k, use_top_p=top_p, use_min_p=min_p)
        self._ops.sample(logits[:count], sampling)
        return True
