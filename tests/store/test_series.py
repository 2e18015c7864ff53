"""Samples over time: the right table for the range, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from appliance.clock import ManualClock
from appliance.events import Sample
from appliance.settings import StoreSettings
from appliance.store import retention
from appliance.store.database import Database
from appliance.store.queries import sample_history
from appliance.store.retention import Limits
from appliance.store.rollup import roll_up
from appliance.store.writer import StoreWriter

START = 1_699_999_200.0  # a whole hour
MINUTES = 3 * 60


@pytest.fixture
async def history(database: Database, tmp_path: Path, make_sample: Callable[[float], Sample]) -> Database:
    """Three hours of samples of two instances, 30 s apart, rolled up."""
    for instance_id in ("node-1", "node-2"):
        writer = StoreWriter(
            database,
            settings=StoreSettings(),
            clock=ManualClock(),
            spool_dir=tmp_path / "spool",
            instance_id=instance_id,
            fleet=f"fleet of {instance_id}",
        )
        for index in range(2 * MINUTES):
            writer.put_sample(msgspec.structs.replace(make_sample(START + 30 * index), num_requests=1, period_seconds=30.0))
        await writer.flush()
    await roll_up(database)
    return database


async def test_the_range_is_half_open(history: Database) -> None:
    """Oldest first, the start included, the end not; one instance or fleet on request, and none for an unknown one."""
    span = {"since_wall": START + 30, "until_wall": START + 90}
    async with history.session() as session:
        both = await sample_history(session, **span)
        one = await sample_history(session, **span, instance_id="node-2")
        fleet = await sample_history(session, **span, fleet="fleet of node-1")
        none = await sample_history(session, **span, instance_id="node-3")
    assert [(series.instance_id, series.fleet, series.at_wall) for series in both.series] == [
        ("node-1", "fleet of node-1", (START + 30, START + 60)),
        ("node-2", "fleet of node-2", (START + 30, START + 60)),
    ]
    assert (both.resolution_seconds, one.series, fleet.series, none.series) == (10, both.series[1:], both.series[:1], ())


@pytest.mark.parametrize(("max_points", "resolution", "num_points"), [(360, 10, 360), (359, 60, 180), (180, 60, 180), (179, 3600, 3)])
async def test_the_finest_that_fits_is_chosen(history: Database, max_points: int, resolution: int, num_points: int) -> None:
    """Samples, minutes or hours by the number of points; what was counted is the same in each."""
    async with history.session() as session:
        found = await sample_history(session, since_wall=START, until_wall=START + 3 * 3600, max_points=max_points)
    assert found.resolution_seconds == resolution
    for series in found.series:
        assert len(series.at_wall) == len(series.columns["num_requests"]) == num_points
        assert sum(series.columns["num_requests"]) == 360
        assert ("ready_share" in series.columns, "engine_state" in series.columns) == (resolution > 10, resolution == 10)


async def test_a_rollup_steps_in_for_what_was_purged(history: Database) -> None:
    """Where samples no longer reach back, minutes do; where minutes do not, hours; recent ranges keep their detail."""
    await retention.purge(history, Limits(ledger=0.0, samples=START + 2 * 3600, minutes=START + 3600 + 60, hours=0.0))
    async with history.session() as session:
        recent = await sample_history(session, since_wall=START + 2 * 3600, until_wall=START + 3 * 3600)
        older = await sample_history(session, since_wall=START + 3600 + 300, until_wall=START + 3 * 3600)
        oldest = await sample_history(session, since_wall=START, until_wall=START + 3 * 3600)
        asked = await sample_history(session, since_wall=START, until_wall=START + 3 * 3600, resolution_seconds=60)
    assert [found.resolution_seconds for found in (recent, older, oldest, asked)] == [10, 60, 3600, 60]
    assert [len(found.series[0].at_wall) for found in (recent, older, oldest, asked)] == [120, 115, 3, 120]


async def test_an_empty_database_has_no_series(database: Database) -> None:
    """No samples, no series, no error."""
    async with database.session() as session:
        assert (await sample_history(session, since_wall=0.0, until_wall=1e9)).series == ()
