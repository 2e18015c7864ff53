"""The engine's float32 path is exact: token for token what transformers generates, in every way of scheduling."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from greedy_oracle import check_device


def test_greedy_tokens_equal_transformers_however_they_are_scheduled(embedded_model: Path) -> None:
    """Alone, batched, chunked, prefix-cached and preempted give the same tokens on a few prompts."""
    lines = check_device(embedded_model, "cpu", num_prompts=5, num_tokens=24, graphs=False)
    assert len(lines) == 5


@pytest.mark.acceptance
@pytest.mark.timeout(1500)
def test_twenty_prompts_of_sixty_four_tokens_equal_transformers(embedded_model: Path) -> None:
    """The same over 20 prompts and 64 tokens each."""
    lines = check_device(embedded_model, "cpu", num_prompts=20, num_tokens=64, graphs=False)
    print(*lines, sep="\n")
    assert len(lines) == 5
