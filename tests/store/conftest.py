"""Databases to test on: SQLite always, PostgreSQL where its binaries are installed."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from appliance.events import LedgerState, RequestRecord, Sample
from appliance.store.database import Database

sys.path.insert(0, str(Path(__file__).parent))

from postgresql_cluster import Cluster, create_database, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running PostgreSQL; the test is skipped where there is none to start."""
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", "postgresql"])
async def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database that is new and empty."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    return await create_database(request.getfixturevalue("cluster"))


@pytest.fixture
async def database_of_cluster(cluster: Cluster) -> str:
    """URL of a PostgreSQL database that is new and empty."""
    return await create_database(cluster)


@pytest.fixture
async def empty_database(database_url: str) -> AsyncIterator[Database]:
    """A database without tables."""
    database = Database(database_url)
    yield database
    await database.close()


@pytest.fixture
async def database(empty_database: Database) -> Database:
    """A database with the current schema."""
    await empty_database.migrate()
    return empty_database


@pytest.fixture
def make_record() -> Callable[..., RequestRecord]:
    """Makes the ledger record number `index`, with any field replaced."""

    def make(index: int = 0, **changes: object) -> RequestRecord:
        fields: dict[str, object] = {
            "id": f"01900000-0000-7000-8000-{index:012d}",
            "client_request_id": None,
            "endpoint": "/v1/chat/completions",
            "model": "smollm2",
            "key_id": f"key{index % 3}",
            "stream": True,
            "received_wall": 1_700_000_000.0 + index,
            "duration_seconds": 1.1,
            "status": 200,
            "finish_reason": "stop",
            "error_code": None,
            "num_choices": 1,
            "num_prompt_tokens": 100,
            "num_cached_tokens": 16,
            "num_generated_tokens": 50,
            "num_written_tokens": 50,
            "ttft_seconds": 0.1,
            "tpot_seconds": 0.02,
            "max_itl_seconds": 0.03,
            "num_preemptions": 0,
            "num_engine_restarts": 0,
            "states": {state.value: 0.1 for state in LedgerState},
            "seed": -(1 << 63),
        }
        return msgspec.convert(fields | changes, RequestRecord)

    return make


@pytest.fixture
def make_sample() -> Callable[[float], Sample]:
    """Makes a sample of the given wall time, with numbers in every field that takes one."""

    def make(at_wall: float) -> Sample:
        fields = {
            field.name: ("ready" if field.name == "engine_state" else 3 if "int" in str(field.type) else 0.25)
            for field in msgspec.structs.fields(Sample)
        }
        return msgspec.convert(fields | {"at_wall": at_wall}, Sample)

    return make
