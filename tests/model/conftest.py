"""Lets the tests of the model import the helper modules that lie beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def _one_thread_without_gradients() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and OpenMP's barriers stall (50 times slower) where another process wants the core."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(num_threads)
