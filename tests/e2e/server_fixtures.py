"""Fixtures that the end-to-end and the acceptance tests share."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import openai
import pytest
from appliance_server import EXACT, ApplianceServer, prepare_state, serving, write_dummy_model


@pytest.fixture(scope="session")
def shared_state() -> Path:
    """The folder whose models and compiled kernels outlive a run."""
    return Path(os.environ.get("APPLIANCE_TEST_STATE") or Path.home() / ".cache" / "appliance-tests")


@pytest.fixture(scope="session")
def state_folder(tmp_path_factory: pytest.TempPathFactory, shared_state: Path) -> Callable[[], Path]:
    """Makes state folders."""
    return lambda: prepare_state(tmp_path_factory.mktemp("server") / "state", shared_state)


@pytest.fixture(scope="session")
def dummy_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with random weights and a byte tokenizer, ready in a moment: for what does not depend on sense."""
    return write_dummy_model(tmp_path_factory.mktemp("dummy"))


@pytest.fixture(scope="session")
def embedded_server(embedded_model: Path, state_folder: Callable[[], Path]) -> Iterator[ApplianceServer]:
    """The embedded model in float32: one server for the modules that ask it for sense."""
    with serving(state_folder(), {**EXACT, "model.context_length": 1024, "engine.max_num_seqs": 32}) as server:
        yield server


@pytest.fixture
async def client(server: ApplianceServer) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, without retries that would hide a failure."""
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=110) as client:
        yield client
