"""What is run before streams depend on it: nothing of the state changes, and every shape that serving chooses is among it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from appliance.engine.batch import Bucket, DeviceBatch
from appliance.engine.cuda_graphs import StepGraphs
from appliance.engine.scheduler import SchedulerLimits
from appliance.engine.warm_kernels import apply_no_update, sample_every_way, warm_buckets
from appliance.kernels.ops import AttentionBatch, RowState, Sampled, SamplingBatch, StepInput, select

CPU = torch.device("cpu")


def limits(max_num_seqs: int, max_num_batched_tokens: int) -> SchedulerLimits:
    """Sizes of a step."""
    return SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_chunks=16,
        block_size=16,
        context_length=512,
        max_waiting=8,
        prefix_caching=True,
    )


def graphs(*decode_sizes: int) -> StepGraphs:
    """What is asked of the graphs, without a GPU."""
    return cast(StepGraphs, SimpleNamespace(decode_sizes=list(decode_sizes), chunk_counts=[4, 16]))


def batch(max_num_seqs: int = 8) -> DeviceBatch:
    """Rows and block tables with something in them."""
    made = DeviceBatch(max_num_seqs=max_num_seqs, max_num_chunks=4, max_num_tokens=64, max_blocks=8, device=CPU)
    made.state.params[:max_num_seqs] = torch.arange(made.state.params.shape[1], dtype=torch.int32)
    made.state.block_tables[:max_num_seqs] = 7
    return made


def test_every_row_count_and_chunk_length_is_warmed() -> None:
    """All graph sizes, chunks as short as one token, and as many rows to sample as a mixed step can have."""
    found = warm_buckets(limits(256, 2048), graphs(1, 2, 4, 256))
    assert {bucket.num_decodes for bucket in found if bucket.num_chunks == 0} == {1, 2, 4, 256}
    assert {1, 2, 4, 8, 16, 32, 64, 2048 // 2} <= {bucket.num_chunk_tokens for bucket in found}
    assert max(bucket.num_decodes + bucket.num_chunks for bucket in found) == 256 + 16


@pytest.mark.parametrize(("seqs", "tokens"), [(1, 2), (4, 5), (8, 8), (256, 256), (256, 300), (1024, 2048)])
def test_no_bucket_is_larger_than_a_step(seqs: int, tokens: int) -> None:
    """Whatever the sizes that an operator chose."""
    for found in (warm_buckets(limits(seqs, tokens), None), warm_buckets(limits(seqs, tokens), graphs(1, seqs))):
        assert all(bucket.num_decodes <= seqs and bucket.num_tokens <= tokens for bucket in found), found
        assert all(bucket.num_chunks <= bucket.num_chunk_tokens for bucket in found)
        assert Bucket(1, 0, 0) in found


def test_the_update_of_nothing_changes_nothing() -> None:
    """It writes the row that no sequence has, with what is in it."""
    made = batch()
    before = made.state.params.clone(), made.state.block_tables.clone()
    apply_no_update(select(CPU, "reference"), made)
    assert torch.equal(made.state.params, before[0])
    assert torch.equal(made.state.block_tables, before[1])


def test_every_kind_of_sampling_is_met() -> None:
    """Filters, logprobs, penalties and bias, on the logits as they are and on their float32 copy, which penalties and bias make, and the counts that
    penalties need; state and logits stay as they are."""
    ops, made = select(CPU, "reference"), batch()
    seen: set[tuple[str, bool]] = set()

    class Recorder:
        def sample(self, logits: torch.Tensor, sampling: SamplingBatch) -> Sampled:
            is_copied = sampling.use_penalties or sampling.bias_entries is not None
            filtered = sampling.use_top_k or sampling.use_top_p or sampling.use_min_p
            seen.add(("greedy" if sampling.all_greedy else "filtered" if filtered else "random", is_copied))
            asked = {"penalties": sampling.use_penalties, "bias": sampling.bias_ids is not None, "logprobs": sampling.num_logprobs is not None}
            seen.update((name, is_copied) for name, is_asked in asked.items() if is_asked)
            return ops.sample(logits, sampling)

        def commit_sampled(self, state: RowState, step: StepInput, batch: AttentionBatch, token_ids: torch.Tensor) -> None:
            if state.output_counts is not None:
                seen.add(("counts", False))
            ops.commit_sampled(state, step, batch, token_ids)

    logits = torch.randn(6, 50)
    before, params = logits.clone(), made.state.params.clone()
    sample_every_way(cast(Any, Recorder()), made, logits)
    plain = {("greedy", False), ("random", False)}  # which the steps of `warm_buckets` meet
    everything = {(kind, copied) for kind in ("greedy", "random", "filtered", "logprobs") for copied in (False, True)}
    assert seen | plain == everything | {("penalties", True), ("bias", True), ("counts", False)}
    assert torch.equal(logits, before)
    assert torch.equal(made.state.params, params)
    assert made.state.prompt_mask is None
