"""CUDA graphs of a step: one of the forward pass and one of plain sampling, replayed back to back but separable.

Captured at first demand: recording a step costs about what running it eagerly costs on the host, so nothing stalls. Decode steps round up to a
bucket of sequences; mixed steps to a bucket of sequences, chunks and chunk tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from appliance.engine.batch import Bucket
from appliance.engine.scheduler import SchedulerLimits
from appliance.kernels.ops import Sampled, SamplingBatch

DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
MIXED_DECODE_SIZES = (0, 8, 32, 64, 96, 128, 160, 192, 224, 256, 384, 512, 768, 1024)
CHUNK_TOKEN_SIZES = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048)
CHUNK_COUNTS = (4, 16)
AHEAD_DECODES, AHEAD_CHUNK_TOKENS = (
    (0, 8, 32, 64, 128, 256),
    (64, 128, 256, 512, 1024, 2048),
)  # mixed steps captured while idle; others at first demand
MAX_GRAPHS = 160


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    sampling: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = field(default_factory=dict)  # all_greedy -> graph, token ids


class StepGraphs:
    """The graphs captured so far, sharing one memory pool. Used by the step loop's thread alone."""

    def __init__(
        self,
        forward: Callable[[Bucket, int, int], Tensor],
        sample: Callable[[Tensor, Bucket, bool], Tensor],
        limits: SchedulerLimits,
        max_num_tokens: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._sample = sample
        self._limits = limits
        self._max_num_tokens = max_num_tokens  # of the device's buffers: room for what a bucket pads
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Bucket, _Captured] = {}
        self._decode_sizes = _sizes_up_to(DECODE_SIZES, limits.max_num_seqs)
        self._mixed_sizes = _sizes_up_to(MIXED_DECODE_SIZES, limits.max_num_seqs)
        self._stream = torch.cuda.Stream(device)
        sizes = [size for size in AHEAD_DECODES if size <= limits.max_num_seqs]
        mixed = [self.bucket_for(Bucket(decodes, 1, tokens)) for decodes in sizes for tokens in AHEAD_CHUNK_TOKENS]
        decode_only = [Bucket(size, 0, 0) for size in self._decode_sizes]
        self._ahead = list(dict.fromkeys([*decode_only, *(bucket for bucket in mixed if bucket is not None)]))

    @property
    def num_graphs(self) -> int:
        return len(self._captured)

    @property
    def decode_sizes(self) -> list[int]:
        return self._decode_sizes

    @property
    def chunk_counts(self) -> list[int]:
        """Chunks of mixed graphs."""
        return sorted({min(count, self._limits.max_num_chunks) for count in CHUNK_COUNTS})

    def bucket_for(self, exact: Bucket) -> Bucket | None:
        """The bucket in which a step of this shape is replayed; None where it runs eagerly."""
        if exact.num_chunks == 0:
            bucket = Bucket(_round_up(self._decode_sizes, exact.num_decodes), 0, 0)
        else:
            if exact.num_chunk_tokens > CHUNK_TOKEN_SIZES[-1] or exact.num_chunks > CHUNK_COUNTS[-1]:
                return None
            chunks = min(_round_up(CHUNK_COUNTS, exact.num_chunks), self._limits.max_num_chunks)
            bucket = Bucket(_round_up(self._mixed_sizes, exact.num_decodes), chunks, _round_up(CHUNK_TOKEN_SIZES, exact.num_chunk_tokens))
            if bucket.num_tokens > self._max_num_tokens:
                return None
        if bucket not in self._captured and len(self._captured) >= MAX_GRAPHS:
            return None
        return bucket

    def replay(self, bucket: Bucket, sampling: SamplingBatch) -> Sampled | None:
        """Run the forward graph, and the sampling graph where sampling is plain. None: the caller samples from `logits`."""
        captured = self._captured.get(bucket) or self._capture(bucket)
        captured.graph.replay()
        plain = not (sampling.use_top_k or sampling.use_top_p or sampling.use_min_p or sampling.use_penalties)
        if not plain or sampling.bias_ids is not None or sampling.num_logprobs is not None:
            return None
        if sampling.all_greedy not in captured.sampling:
            self._capture_sampling(captured, bucket, sampling.all_greedy)
        graph, token_ids = captured.sampling[sampling.all_greedy]
        graph.replay()
        return Sampled(token_ids=token_ids)

    def logits(self, bucket: Bucket) -> Tensor:
        """The logits that the newest replay of `bucket` left."""
        return self._captured[bucket].logits

    def capture_missing(self, before: Callable[[], None]) -> bool:
        """Capture one bucket ahead of demand, with both kinds of plain sampling: decode steps, smallest first, then the likeliest mixed ones.
        False where all are there."""
        for bucket in self._ahead:
            captured = self._captured.get(bucket)
            if captured is not None and len(captured.sampling) == 2:
                continue
            before()
            captured = captured or self._capture(bucket)
            for all_greedy in (True, False):
                if all_greedy not in captured.sampling:
                    self._capture_sampling(captured, bucket, all_greedy)
            return True
        return False

    def clear_sampling(self) -> None:
        """Forget the sampling graphs: the row state has changed its shape."""
        for captured in self._captured.values():
            captured.sampling.clear()

    def _capture(self, bucket: Bucket) -> _Captured:
        # Bounds that fit every replay: grids are sized by them, loops end by device memory.
        bounds = max(bucket.num_chunk_tokens, 1), self._limits.context_length
        graph, logits = self._record(lambda: self._forward(bucket, *bounds))
        captured = _Captured(graph, logits)
        self._captured[bucket] = captured
        return captured

    def _capture_sampling(self, captured: _Captured, bucket: Bucket, all_greedy: bool) -> None:
        captured.sampling[all_greedy] = self._record(lambda: self._sample(captured.logits, bucket, all_greedy))

    def _record(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture without `torch.cuda.graph`, whose entry synchronises and collects garbage: that would stall the streams being served."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = work()
            finally:
                graph.capture_end()
        return graph, output


def _sizes_up_to(sizes: tuple[int, ...], limit: int) -> list[int]:
    return [*(size for size in sizes if size < limit), limit]


def _round_up(sizes: list[int] | tuple[int, ...], value: int) -> int:
    return sizes[bisect.bisect_left(sizes, value)]
