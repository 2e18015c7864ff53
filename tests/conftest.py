"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from appliance.errors import ModelError
from appliance.model_files import resolve_model


def shared_state_dir() -> Path:
    """Folder that outlives a run: $APPLIANCE_TEST_STATE, else ~/.cache/appliance-tests."""
    return Path(os.environ.get("APPLIANCE_TEST_STATE") or Path.home() / ".cache" / "appliance-tests")


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The embedded model's GGUF file, fetched once for all runs. Skips where it is not there and cannot be fetched."""
    try:
        return Path(resolve_model("embedded", shared_state_dir()))
    except ModelError as error:
        pytest.skip(f"no embedded model: {error}")
