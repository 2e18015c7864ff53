"""What is run before streams depend on it: nothing of the state changes, and every shape that serving chooses is among it."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from appliance.engine.batch import Bucket, DeviceBatch
from appliance.engine.cuda_graphs import StepGraphs
from appliance.engine.scheduler import SchedulerLimits
from appliance.engine.warm_kernels import FilteredSamplers, apply_no_update, warm_buckets
from appliance.kernels.ops import Sampled, SamplingBatch, select

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


def test_all_sets_of_filters_are_drawn_once_for_each_row_count() -> None:
    """Through the sampler that serves, on whatever logits there are, which stay as they are; then there is nothing left."""
    ops, made = select(CPU, "reference"), batch()
    seen: list[tuple[Any, ...]] = []

    class Recorder:
        def sample(self, logits: torch.Tensor, sampling: SamplingBatch) -> Sampled:
            seen.append((logits.shape[0], sampling.use_top_k, sampling.use_top_p, sampling.use_min_p))
            assert sampling.rows.tolist() == [made.dummy_row] * logits.shape[0]
            return ops.sample(logits, sampling)

    samplers = FilteredSamplers(cast(Any, Recorder()), made, [1, 4])
    logits = torch.randn(6, 50)
    before, calls = logits.clone(), []
    while samplers.compile_next(logits, lambda: calls.append(1)):
        pass
    sets = [filters for filters in product((False, True), repeat=3) if any(filters)]
    assert sorted(seen) == sorted((count, *filters) for count in (1, 4) for filters in sets)
    assert seen[0] == (1, False, True, False), "top-p alone is the likeliest"
    assert len(calls) == len(seen)
    assert torch.equal(logits, before)
