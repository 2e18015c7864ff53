"""Where the Triton kernels run in tests: on the GPU if there is one, else under Triton's interpreter on CPU tensors.

Triton decides at decoration whether a function is compiled or interpreted, so the variable is set when this folder is collected (before its
test modules import the kernels) and again while each of its tests runs; in between, and in other folders' tests and their subprocesses, it is unset.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

_INTERPRET = not torch.cuda.is_available()

if _INTERPRET:
    _before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules and _before != "1":
        raise RuntimeError("triton was imported before tests/kernels was collected: its functions are compiled ones and cannot run on a CPU")
    import appliance.kernels.triton_ops  # noqa: F401

    if _before is None:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run this folder's kernels under the interpreter where there is no GPU."""
    if _INTERPRET:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    """The device whose kernels are tested."""
    return torch.device("cpu" if _INTERPRET else "cuda")
