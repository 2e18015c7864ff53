"""Which kernels a GPU engine must have compiled before streams depend on them: compiling one takes a third of a second, while all streams wait."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from appliance.engine.batch import Bucket, DeviceBatch
from appliance.engine.cuda_graphs import StepGraphs
from appliance.engine.scheduler import SchedulerLimits
from appliance.kernels.ops import Ops, RowState, SamplingBatch

_CHUNK_TOKENS = (1, 2, 4, 8, 32, 64, 128, 256, 512, 1024, 2048)  # prefill attention is cut by the longest chunk


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


def sample_every_way(ops: Ops, batch: DeviceBatch, logits: Tensor) -> None:
    """What a step runs whose rows ask for more than greedy or plain random tokens, on the first row of `logits` `[rows, vocab]` and a state of its
    own: filters, logprobs, penalties and bias. The last two make float32 of the logits, for which all is compiled once more; penalties count ids."""
    device, vocab = logits.device, logits.shape[1]
    state = RowState(
        params=batch.state.params[-1:].clone(),
        block_tables=batch.state.block_tables[-1:],
        prompt_mask=torch.zeros(1, vocab, dtype=torch.bool, device=device),
        output_counts=torch.zeros(1, vocab, dtype=torch.int32, device=device),
    )
    first, entry = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    bias = SamplingBatch(first, state, bias_entries=entry, bias_ids=entry, bias_values=torch.zeros(1, device=device))
    for sampling in (
        SamplingBatch(first, state, use_top_p=True, num_logprobs=1),
        replace(bias, all_greedy=True, use_penalties=True, num_logprobs=1),
        replace(bias, use_penalties=True),
        replace(bias, use_penalties=True, use_top_p=True),
    ):
        sampled = ops.sample(logits[:1], sampling)
    bucket = Bucket(1, 0, 0)
    step = replace(batch.step_input(bucket), rows=first)
    ops.commit_sampled(state, step, batch.attention_batch(bucket, 1, 1), sampled.token_ids)
