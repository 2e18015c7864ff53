"""Usage, cost and SLO by hour and key: equal to the ledger at any instant, on SQLite and PostgreSQL."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from appliance.clock import ManualClock
from appliance.events import RequestRecord
from appliance.settings import StoreSettings
from appliance.store import queries
from appliance.store.database import Database
from appliance.store.queries import Prices
from appliance.store.tables import RequestRow
from appliance.store.tally import ROLLUP, TOTALS, count_usage, fold_usage
from appliance.store.writer import StoreWriter

DAY = 86400.0
MIDNIGHT = 19_700 * DAY
Record = Callable[..., RequestRecord]


@dataclass(frozen=True)
class _Verdict:
    ttft: bool | None
    tpot: bool | None


def _judge(record: RequestRecord) -> _Verdict:
    return _Verdict(None, None) if record.status == 404 else _Verdict(record.ttft_seconds is not None and record.ttft_seconds < 0.5, None)


def _writer(database: Database, folder: Path, instance_id: str = "node-1") -> StoreWriter:
    return StoreWriter(
        database,
        settings=StoreSettings(),
        clock=ManualClock(),
        spool_dir=folder / instance_id,
        instance_id=instance_id,
        fleet="blue",
        judge=_judge,
    )


async def _stored(database: Database, table: Any) -> list[dict[str, Any]]:
    async with database.session() as session:
        query = select(table).order_by(*table.primary_key.columns)
        return [dict(row) for row in (await session.execute(query)).mappings()]


async def _check(database: Database) -> None:
    """What is stored as usage is what the ledger adds up to."""
    ledger = await _stored(database, RequestRow.__table__)
    for table in (ROLLUP, TOTALS):
        stored, expected = await _stored(database, table), fold_usage(count_usage(ledger), table)
        assert len(stored) == len(expected)
        for found, computed in zip(stored, expected, strict=True):
            assert found.keys() == computed.keys()
            for name, value in computed.items():
                assert type(found[name]) is type(value), name
                assert found[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name


async def test_usage_equals_the_ledger(database: Database, tmp_path: Path, make_record: Record) -> None:
    """Rows in any order, some twice, some with unknown fields, from two instances: each table counts each once."""
    generator = random.Random(0)
    writers = [_writer(database, tmp_path), _writer(database, tmp_path, "node-2")]
    for index in range(600):
        record = make_record(
            index,
            received_wall=MIDNIGHT + generator.uniform(-2 * DAY, 2 * DAY),
            status=generator.choice((200, 200, 200, 404, 429, 499, 500, 503)),
            model=generator.choice(("small", "large")),
            joules=generator.choice((None, 2.5)),
            ttft_seconds=generator.choice((None, 0.1, 0.9)),
        )
        for _ in range(generator.choice((1, 1, 2))):
            writers[index % 2].put_request(record)
        if index % 50 == 0:
            await writers[0].flush()
    for writer in writers:
        await writer.flush()
    await _check(database)


async def test_an_unheard_commit_counts_once(database: Database, tmp_path: Path, make_record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks after the commit, the rows spool and are sent again beside new ones: the ledger ignores them, and so does usage."""
    writer = _writer(database, tmp_path)
    real = database.write

    async def unheard(work: Any) -> Any:
        await real(work)
        raise ConnectionResetError("the answer to COMMIT was lost")

    for index in range(20):
        writer.put_request(make_record(index))
    with monkeypatch.context() as patch:
        patch.setattr(database, "write", unheard)
        await writer.flush()
    assert writer.stats.num_spooled_rows == 20
    for index in range(15, 25):
        writer.put_request(make_record(index))
    await writer.flush()
    assert (await _stored(database, TOTALS))[0]["num_requests"] == 25
    await _check(database)


async def test_a_bad_row_is_not_counted(database: Database, tmp_path: Path, make_record: Record) -> None:
    """A row that the database refuses takes its usage along; the rows of its batch are counted."""
    writer = _writer(database, tmp_path)
    for index in range(5):
        writer.put_request(make_record(index, seed=1 << 80 if index == 2 else index))
    await writer.flush()
    assert (await _stored(database, TOTALS))[0]["num_requests"] == 4
    await _check(database)


async def test_rows_that_an_older_version_spooled_are_stored(database: Database, tmp_path: Path, make_record: Record) -> None:
    """A spool outlives an upgrade: columns that its rows do not know are NULL, and columns or tables that are no more cost nothing else."""
    first = _writer(database, tmp_path)
    first.put_request(make_record(0))
    await first._spool_queue()
    (segment,) = (tmp_path / "node-1").iterdir()
    text = segment.read_text()
    assert '"ttft_good":true' in text
    old = text.replace('"ttft_good":true,"tpot_good":null,', '"no_longer_kept":7,')
    assert old != text
    segment.write_text(old + '["a_table_that_was",{"id":"1"}]\n')
    second = _writer(database, tmp_path)
    await second.flush()
    async with database.session() as session:
        (stored,) = (await queries.find_requests(session)).requests
    assert (stored.record, stored.good) == (make_record(0), None)
    assert (second.stats.num_refused_rows, second.stats.num_spooled_rows, second.stats.num_written_rows) == (1, 0, 1)
    await _check(database)


async def test_usage_by_key_is_of_whole_hours(database: Database, tmp_path: Path, make_record: Record) -> None:
    """Ranges of any length, in whole hours, from days and hours together: equal to the sum over the ledger's rows in them."""
    writer = _writer(database, tmp_path)
    for index in range(400):
        writer.put_request(make_record(index, received_wall=MIDNIGHT + index * 1000.0, num_prompt_tokens=index))
    await writer.flush()
    for since, until in ((0, 1), (0, 24), (5, 23), (20, 30), (1, 100), (24, 72), (23, 73), (50, 50)):
        start, end = MIDNIGHT + since * 3600, MIDNIGHT + until * 3600
        async with database.session() as session:
            found = await queries.usage_by_key(session, since_wall=start, until_wall=end)
            total = await queries.usage_total(session, since_wall=start + (5 if until > since else 0), until_wall=end - 5 if until > since else end)
            query = select(RequestRow.key_id, func.count(), func.sum(RequestRow.num_prompt_tokens)).group_by(RequestRow.key_id)
            expected = (await session.execute(query.where(RequestRow.received_wall >= start, RequestRow.received_wall < end))).all()
        assert {(key.key_id, key.usage.num_requests, key.usage.num_prompt_tokens) for key in found} == {(a, b, int(c)) for a, b, c in expected}
        assert total.num_requests == sum(row[1] for row in expected)
        assert [key.usage.num_prompt_tokens + key.usage.num_generated_tokens for key in found] == sorted(
            (key.usage.num_prompt_tokens + key.usage.num_generated_tokens for key in found), reverse=True
        )


async def test_usage_says_what_it_costs(database: Database, tmp_path: Path, make_record: Record) -> None:
    """Prompt, cached and output tokens at their prices; no price, no cost; unknown joules stay unknown; shares of nothing are None."""
    writer = _writer(database, tmp_path)
    for index in range(4):
        writer.put_request(make_record(index, key_id="web", received_wall=MIDNIGHT, joules=2.5 if index else None, ttft_seconds=0.1 + 0.2 * index))
    writer.put_request(make_record(9, key_id="batch", received_wall=MIDNIGHT, status=404, ttft_seconds=None))
    await writer.flush()
    hour = {"since_wall": MIDNIGHT, "until_wall": MIDNIGHT + 3600}
    async with database.session() as session:
        web, batch = await queries.usage_by_key(
            session, **hour, prices=Prices(prompt_per_million=1.0, cached_per_million=0.5, output_per_million=10.0)
        )
        dear, _ = await queries.usage_by_key(session, **hour, prices=Prices(prompt_per_million=1.0, output_per_million=10.0))
        free = await queries.usage_by_key(session, **hour, prices=Prices(prompt_per_million=1.0))
        nothing = await queries.usage_total(session, since_wall=0, until_wall=3600)
        (mine,) = await queries.usage_by_key(session, **hour, key_id="batch")
    assert web.cost == pytest.approx((4 * 84 * 1.0 + 4 * 16 * 0.5 + 4 * 50 * 10.0) / 1e6)
    assert dear.cost == pytest.approx((4 * 100 * 1.0 + 4 * 50 * 10.0) / 1e6)
    assert [key.cost for key in free] == [None, None]
    assert (web.usage.joules, batch.usage.joules, mine.usage) == (7.5, None, batch.usage)
    assert (web.usage.num_judged, web.usage.num_good, web.usage.goodput, batch.usage.goodput) == (4, 2, 0.5, None)
    assert (web.usage.num_good_tokens, web.usage.ttft_attainment, web.usage.tpot_attainment) == (100, 0.5, None)
    assert (web.usage.mean_ttft_seconds, web.usage.max_ttft_seconds) == (pytest.approx(0.4), pytest.approx(0.7))
    assert (nothing.num_requests, nothing.duration_seconds, nothing.goodput, nothing.mean_ttft_seconds, nothing.joules) == (0, 0.0, None, None, None)


async def test_hours_tell_the_slo_and_the_busiest(database: Database, tmp_path: Path, make_record: Record) -> None:
    """Hours without a request are left out; the busiest by requests and by tokens may differ; days and single keys or models work alike."""
    writers = [_writer(database, tmp_path), _writer(database, tmp_path, "node-2")]
    for hour, count, tokens in ((0, 3, 10), (2, 5, 10), (3, 1, 1000), (30, 2, 10)):
        for number in range(count):
            at = MIDNIGHT + 3600 * hour + number
            ttft = 0.1 if number % 2 else 0.9
            record = make_record(
                100 * hour + number, received_wall=at, num_prompt_tokens=tokens, num_generated_tokens=0, ttft_seconds=ttft, key_id="web"
            )
            writers[number % 2].put_request(record)
    for writer in writers:
        await writer.flush()
    span = {"since_wall": MIDNIGHT, "until_wall": MIDNIGHT + 2 * DAY}
    async with database.session() as session:
        slo = await queries.slo_by_hour(session, **span)
        by_requests = await queries.busiest_hours(session, **span, limit=2)
        by_tokens = await queries.busiest_hours(session, **span, by="tokens", key_id="web")
        days = await queries.usage_by_hour(session, **span, period_seconds=86400)
        one_node = await queries.usage_by_hour(session, **span, instance_id="node-2", model="smollm2")
        known = await queries.known(session, **span)
    assert [((hour.start_wall - MIDNIGHT) / 3600, hour.num_requests, hour.num_good, hour.goodput) for hour in slo] == [
        (0, 3, 1, 1 / 3),
        (2, 5, 2, 0.4),
        (3, 1, 0, 0.0),
        (30, 2, 1, 0.5),
    ]
    assert [(hour.start_wall - MIDNIGHT) / 3600 for hour in by_requests] == [2, 0]
    assert [(hour.start_wall - MIDNIGHT) / 3600 for hour in by_tokens] == [3, 2, 0, 30]
    assert [(day.start_wall - MIDNIGHT, day.period_seconds, day.usage.num_requests) for day in days] == [(0, 86400, 9), (DAY, 86400, 2)]
    assert [hour.usage.num_requests for hour in one_node] == [1, 2, 1]
    assert (known.keys, known.models, known.instances, known.fleets) == (("web",), ("smollm2",), ("node-1", "node-2"), ("blue",))
