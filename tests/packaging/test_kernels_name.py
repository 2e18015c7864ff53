"""The top-level folder kernels/ must not pass for the PyPI package of that name, for which transformers probes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = """
import transformers.utils
answer = transformers.utils.is_kernels_available()
from transformers import LlamaConfig, LlamaForCausalLM
import appliance.kernels, appliance.kernels.ops
print(answer, LlamaForCausalLM.__name__, appliance.kernels.__version__)
"""


@pytest.mark.parametrize("path_entry", ["off the path", "on the path"])
def test_transformers_imports_from_the_repository_root(path_entry: str) -> None:
    """With the root as current folder, and even on sys.path, is_kernels_available() answers False and models import."""
    isolation = ["-P"] if path_entry == "off the path" else []
    done = subprocess.run([sys.executable, *isolation, "-c", _SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-3:] == ["False", "LlamaForCausalLM", "0"]


def test_alembic_of_the_root_hides_no_library() -> None:
    """With the root on sys.path, `from alembic import command` still finds the library: alembic/ holds no __init__.py."""
    assert not (ROOT / "alembic/__init__.py").exists()
    command = [sys.executable, "-c", "from alembic import command; print(command.__file__)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout
