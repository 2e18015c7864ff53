"""The engine's float32 path is exact: token for token what transformers generates, in every way of scheduling."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from greedy_oracle import check_device

# transformers announces changes of its own loaders
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """OpenMP barriers stall when other work holds a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(300)
def test_greedy_tokens_equal_transformers_however_they_are_scheduled(embedded_model: Path) -> None:
    """Alone, batched, chunked, prefix-cached and preempted give the same tokens on a few prompts."""
    lines = check_device(embedded_model, "cpu", num_prompts=3, num_tokens=12, graphs=False)
    assert len(lines) == 5


@pytest.mark.acceptance
@pytest.mark.timeout(1500)
def test_twenty_prompts_of_sixty_four_tokens_equal_transformers(embedded_model: Path) -> None:
    """The same over 20 prompts and 64 tokens each."""
    lines = check_device(embedded_model, "cpu", num_prompts=20, num_tokens=64, graphs=False)
    print(*lines, sep="\n")
    assert len(lines) == 5
