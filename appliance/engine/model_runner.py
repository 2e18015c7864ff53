"""Runs a plan on the device: upload, prepare, forward, sample, commit; ids come back through pinned memory, one event wait a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from appliance.engine.batch import Bucket, DeviceBatch
from appliance.engine.cuda_graphs import StepGraphs
from appliance.engine.scheduler import SchedulerLimits, StepPlan
from appliance.engine.sequence import BIAS, LOGPROBS, MIN_P, NOT_GREEDY, PENALTIES, TOP_K, TOP_P, Sequence
from appliance.engine.warm_kernels import apply_no_update, sample_every_way, warm_buckets
from appliance.engine.wire import TokenLogprobs
from appliance.kernels.kv_cache import FP8, allocate_fp8
from appliance.kernels.ops import AttentionBatch, Ops, Sampled, SamplingBatch, StepInput

if TYPE_CHECKING:
    from appliance.engine.cpu_upgrade import Improver
    from appliance.model.decoder import Decoder


_OWN_LOGITS_ROWS = 16
_RING = 4  # outputs and events in flight: up to two steps launched, one being read, one spare


@dataclass(slots=True)
class LaunchedStep:
    """A step on its way. `sequences` are those that get a token: the decodes, then those whose chunk is final. `outputs` are host tensors, valid
    once `done` has passed (at once on CPU).
    """

    plan: StepPlan
    sequences: list[Sequence]
    sequence_ids: list[int]
    entries: list[int]  # of the final chunks alone; the i-th decode is entry i
    outputs: list[Tensor]
    done: torch.cuda.Event | None
    graph_hit: bool


@dataclass(frozen=True, slots=True)
class StepResult:
    """Token ids of `LaunchedStep.sequences`, in their order, and logprobs of those that asked."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]


@dataclass(frozen=True, slots=True)
class _Ready:
    """A step as the graphs take it. One that only decodes may come again as it is: the device holds all that changes."""

    sequences: list[Sequence]
    sequence_ids: list[int]
    bucket: Bucket
    sampling: SamplingBatch


class ModelRunner:
    """Owns the device: model, KV cache, batch state. Used by the step loop's thread alone."""

    def __init__(
        self,
        decoder: Decoder,
        ops: Ops,
        device: torch.device,
        limits: SchedulerLimits,
        num_blocks: int,
        *,
        kv_dtype: torch.dtype,
        use_graphs: bool,
        max_num_tokens: int,
    ) -> None:
        self.decoder = decoder
        self.ops = ops
        self.device = device
        self.limits = limits
        self.batch = DeviceBatch(
            max_num_seqs=limits.max_num_seqs,
            max_num_chunks=limits.max_num_chunks,
            max_num_tokens=max_num_tokens,
            max_blocks=-(-limits.context_length // limits.block_size),
            device=device,
        )
        shape = decoder.kv_shape(num_blocks, limits.block_size)
        self.kv_caches = [(_zeros(shape, kv_dtype, device), _zeros(shape, kv_dtype, device)) for _ in range(decoder.config.num_layers)]
        self.vocab_size = decoder.config.vocab_size
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}  # sequence id -> ids, values
        self._is_cuda = device.type == "cuda"
        self._copies = _Copies(device) if self._is_cuda else None
        self._steady: _Ready | None = None
        self.improver: Improver | None = None  # CPU only
        self.graphs: StepGraphs | None = None
        self._logits: Tensor | None = None  # where all graphs leave their logits: one buffer, since only the newest are read
        if use_graphs and self._is_cuda:
            self.graphs = StepGraphs(self._forward, self._sample_plain, limits, max_num_tokens, device)
            self._logits = torch.zeros(self.batch.max_entries, self.vocab_size, dtype=decoder.dtype, device=device)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start a step. On CUDA this returns while it runs; on CPU it is done."""
        if self.improver is not None:
            self._improve(self.improver)
        self._update_rows(plan)
        steady = self._steady
        if steady is not None and not plan.chunks and self.graphs is not None and plan.decodes == steady.sequences:
            return self._replay(plan, steady, [], self.graphs)
        self._steady = None
        exact = Bucket(len(plan.decodes), len(plan.chunks), plan.num_prefill_tokens)
        bucket = self.graphs.bucket_for(exact) if self.graphs else None
        shape = bucket or exact
        self.batch.upload_step(plan, shape)
        sequences = list(plan.decodes)
        entries = []
        for index, chunk in enumerate(plan.chunks):
            if chunk.final:
                sequences.append(chunk.sequence)
                entries.append(shape.num_decodes + index)
        sampling, repeats = self._sampling_batch(sequences, entries, shape)
        sequence_ids = [sequence.id for sequence in sequences]
        if bucket is not None and self.graphs is not None:
            steady = _Ready(sequences, sequence_ids, bucket, sampling)
            if repeats and not plan.chunks:
                self._steady = steady
            return self._replay(plan, steady, entries, self.graphs)
        sampled = self._sample(self._forward(shape, *self._bounds(plan)), sampling, shape)
        return LaunchedStep(plan, sequences, sequence_ids, entries, *self._fetch(sampled), graph_hit=False)

    def _replay(self, plan: StepPlan, step: _Ready, entries: list[int], graphs: StepGraphs) -> LaunchedStep:
        sampled = graphs.replay(step.bucket, step.sampling)
        if sampled is None:
            sampled = self._sample(graphs.logits(step.bucket), step.sampling, step.bucket)
        return LaunchedStep(plan, step.sequences, step.sequence_ids, entries, *self._fetch(sampled), graph_hit=True)

    def collect(self, step: LaunchedStep) -> StepResult:
        """Wait for a step and read its tokens."""
        if step.done is not None:
            step.done.synchronize()
        ids = step.outputs[0].tolist()
        token_ids = ids[: len(step.plan.decodes)]
        token_ids.extend(ids[entry] for entry in step.entries)
        return StepResult(token_ids, _logprobs(step) if len(step.outputs) > 1 else {})

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence beside its row."""
        self._bias.pop(sequence.id, None)

    def warm_up(self) -> None:
        """Run steps on padding alone: compiles kernels, changes no state.

        On a GPU every kind of sampling, and where graphs are used every cut of a kernel that serving will choose: what is compiled later would stall
        the streams. It takes seconds once; afterwards the kernels come from the cache on disk.
        """
        if self.graphs is not None:
            apply_no_update(self.ops, self.batch)
        for bucket in warm_buckets(self.limits, self.graphs):
            self._run_padding(bucket)
        if self._is_cuda:
            sample_every_way(self.ops, self.batch, torch.zeros(1, self.vocab_size, dtype=self.decoder.dtype, device=self.device))

    def measure_activation_bytes(self) -> int:
        """Peak device memory of the largest step beyond what is held now. CUDA only."""
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        limits = self.limits
        self._run_padding(Bucket(limits.max_num_seqs, 1, max(limits.max_num_batched_tokens - limits.max_num_seqs, 1)))
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - held

    def capture_next_graph(self, before: Callable[[], None]) -> bool:
        """While idle, after calling `before`: capture a missing graph; on CPU, a slice of idle work. False: none left."""
        if self.graphs is None:
            if self.improver is None:
                return False
            self._improve(self.improver)
            return self.improver.work_while_idle()
        return self.graphs.capture_missing(before)

    def _improve(self, improver: Improver) -> None:
        """Between steps: put a better model in the place of this one."""
        if (made := improver.take()) is not None:
            self.decoder, self.ops = made

    def _run_padding(self, bucket: Bucket) -> None:
        self.batch.upload_step(StepPlan(), bucket)
        max_context_len = self.limits.context_length if self.graphs is not None else 1  # as graphs are captured
        logits = self._forward(bucket, max(bucket.num_chunk_tokens, 1), max_context_len)
        for all_greedy in (True, False):
            self._sample_plain(logits, bucket, all_greedy)
            if self.graphs is not None:
                self.batch.take_turn()

    def _forward(self, bucket: Bucket, max_query_len: int, max_context_len: int) -> Tensor:
        step = self.batch.step_input(bucket)
        batch = self.batch.attention_batch(bucket, max_query_len, max_context_len)
        if self.graphs is not None:
            self.ops.take_updates(self.batch.state, self.batch.updates_ring, self.batch.turn, *self.batch.num_staged)
        self.ops.prepare_inputs(self.batch.state, step, batch, self.limits.block_size)
        # A few rows are cheap to keep per graph, and their head streams its weight through another kernel.
        shared = self._logits is not None and bucket.num_entries > _OWN_LOGITS_ROWS
        out = self._logits[: bucket.num_entries] if shared and self._logits is not None else None
        return self.decoder.logits(self.decoder.forward(batch, self.kv_caches), out)

    def _sample(self, logits: Tensor, sampling: SamplingBatch, bucket: Bucket) -> Sampled:
        sampled = self.ops.sample(logits, sampling)
        step, batch = self._views(bucket)
        self.ops.commit_sampled(self.batch.state, step, batch, sampled.token_ids)
        if self.graphs is not None:
            self.ops.give_ids(sampled.token_ids, self.batch.ids_ring, self.batch.turn)
        return sampled

    def _sample_plain(self, logits: Tensor, bucket: Bucket, all_greedy: bool) -> Tensor:
        """Sampling without options, as graphs capture it."""
        rows = self.batch.step_input(bucket).rows
        return self._sample(logits, SamplingBatch(rows=rows, state=self.batch.state, all_greedy=all_greedy), bucket).token_ids

    def _views(self, bucket: Bucket) -> tuple[StepInput, AttentionBatch]:
        return self.batch.step_input(bucket), self.batch.attention_batch(bucket, 1, 1)

    def _bounds(self, plan: StepPlan) -> tuple[int, int]:
        query = max((chunk.length for chunk in plan.chunks), default=1)
        if self.graphs is not None:
            return query, self.limits.context_length  # as graphs are captured: no cut of a kernel that warm-up has not seen
        context = max((chunk.start + chunk.length for chunk in plan.chunks), default=0)
        return query, max([context, *(sequence.num_computed for sequence in plan.decodes)])

    def _update_rows(self, plan: StepPlan) -> None:
        if self.graphs is None or not self.batch.stage_updates(plan):
            updates = self.batch.upload_updates(plan)
            if updates is not None:
                self.ops.apply_updates(self.batch.state, *updates)
        for sequence in plan.new_rows:
            if sequence.sampling_flags & PENALTIES:
                self._fill_penalty_row(sequence)
            if sequence.sampling.logit_bias and sequence.id not in self._bias:
                ids = torch.tensor(list(sequence.sampling.logit_bias), dtype=torch.int64)
                values = torch.tensor(list(sequence.sampling.logit_bias.values()), dtype=torch.float32)
                self._bias[sequence.id] = (ids.to(self.device), values.to(self.device))

    def _fill_penalty_row(self, sequence: Sequence) -> None:
        state, row = self.batch.state, sequence.row
        num_rows = state.params.shape[0]
        if state.prompt_mask is None or state.output_counts is None:
            state.prompt_mask = torch.zeros(num_rows, self.vocab_size, dtype=torch.bool, device=self.device)
            state.output_counts = torch.zeros(num_rows, self.vocab_size, dtype=torch.int32, device=self.device)
            if self.graphs is not None:
                self.graphs.clear_sampling()  # captured without the counts
        ids = torch.tensor(sequence.token_ids, dtype=torch.int64, device=self.device)
        prompt, outputs = ids[: sequence.num_prompt], ids[sequence.num_prompt :]
        state.prompt_mask[row] = False
        state.prompt_mask[row, prompt] = True
        state.output_counts[row] = torch.bincount(outputs, minlength=self.vocab_size)[: self.vocab_size].int()

    def _sampling_batch(self, sequences: list[Sequence], entries: list[int], bucket: Bucket) -> tuple[SamplingBatch, bool]:
        """What the step asks of the sampler, and whether the next step of the same sequences asks the same."""
        flags = 0
        for sequence in sequences:
            flags |= sequence.sampling_flags
        batch = SamplingBatch(
            rows=self.batch.step_input(bucket).rows,
            state=self.batch.state,
            all_greedy=not flags & NOT_GREEDY,
            use_top_k=bool(flags & TOP_K),
            use_top_p=bool(flags & TOP_P),
            use_min_p=bool(flags & MIN_P),
            use_penalties=bool(flags & PENALTIES),
        )
        if flags & LOGPROBS:
            batch.num_logprobs = max(sequence.sampling.num_logprobs or 0 for sequence in sequences)
        if flags & BIAS:
            num_decodes = len(sequences) - len(entries)
            self._add_bias(batch, list(zip(sequences, [*range(num_decodes), *entries], strict=True)))
        return batch, not flags & BIAS

    def _add_bias(self, batch: SamplingBatch, rows: list[tuple[Sequence, int]]) -> None:
        entries: list[Tensor] = []
        ids: list[Tensor] = []
        values: list[Tensor] = []
        for sequence, entry in rows:
            for found in (self._bias.get(sequence.id), self._banned(sequence)):
                if found is not None:
                    entries.append(torch.full_like(found[0], entry))
                    ids.append(found[0])
                    values.append(found[1])
        if entries:
            batch.bias_entries, batch.bias_ids, batch.bias_values = torch.cat(entries), torch.cat(ids), torch.cat(values)

    def _banned(self, sequence: Sequence) -> tuple[Tensor, Tensor] | None:
        """The ends that `min_tokens` forbids at the output that this step samples."""
        sampling = sequence.sampling
        index = sequence.num_tokens - 1 - sequence.num_prompt
        if index >= sampling.min_tokens or not sampling.stop_token_ids:
            return None
        ids = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=self.device)
        return ids, torch.full(ids.shape, float("-inf"), device=self.device)

    def _fetch(self, sampled: Sampled) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """Where the host will find what was sampled, and the event after which it is there."""
        extras = []
        if sampled.logprobs is not None:
            assert sampled.ranks is not None
            assert sampled.top_ids is not None
            assert sampled.top_logprobs is not None
            extras = [sampled.logprobs, sampled.ranks, sampled.top_ids, sampled.top_logprobs]
        if self._copies is None:
            return [sampled.token_ids, *extras], None
        if self.graphs is None:
            return self._copies.fetch([sampled.token_ids, *extras])
        ids = self.batch.take_turn()[: sampled.token_ids.shape[0]]
        copies, done = self._copies.fetch(extras)
        return [ids, *copies], done


class _Copies:
    """Copies what a step sampled into pinned memory on a stream of their own, so that the next step need not wait for them."""

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(device)
        self._events = [torch.cuda.Event() for _ in range(2 * _RING)]
        self._turn = 0

    def fetch(self, tensors: list[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """Host copies of `tensors` (none is allowed), valid once the event has passed; so is then all that was launched before."""
        self._turn = (self._turn + 1) % _RING
        sampled, copied = self._events[2 * self._turn : 2 * self._turn + 2]
        sampled.record(self._main)
        if not tensors:
            return [], sampled
        self._stream.wait_event(sampled)
        outputs = []
        with torch.cuda.stream(self._stream):
            for tensor in tensors:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)
                outputs.append(host)
            copied.record(self._stream)
        return outputs, copied


def _zeros(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since masked lanes of a kernel may read a block's unwritten slots, and 0 * NaN is NaN.

    On CPU through calloc: pages take memory at their first write, where torch.zeros would touch them all (11 GiB took seconds).
    """
    if dtype == FP8:
        return allocate_fp8(shape, device)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _logprobs(step: LaunchedStep) -> dict[int, TokenLogprobs]:
    """Of the sequences that asked for them."""
    _, values, ranks, top_ids, top_values = step.outputs
    found = {}
    for sequence, entry in zip(step.sequences, [*range(len(step.plan.decodes)), *step.entries], strict=True):
        wanted = sequence.sampling.num_logprobs
        if wanted is not None:
            tops = tuple(top_ids[entry, :wanted].tolist()), tuple(top_values[entry, :wanted].tolist())
            found[sequence.id] = TokenLogprobs(float(values[entry]), int(ranks[entry]), *tops)
    return found
