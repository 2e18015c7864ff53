"""The batched writer behind a bounded queue: serving hands over records and never waits for SQL. None is lost, none stored twice."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

from sqlalchemy.exc import DataError, IntegrityError, StatementError

from appliance.clock import Clock
from appliance.events import EngineEvent, RequestRecord, Sample, StoreStats
from appliance.settings import StoreSettings
from appliance.store.database import Database
from appliance.store.rows import TABLES, Record, Row, Verdict, completed, row_of
from appliance.store.spool import Spool
from appliance.store.statements import Statements

_log = logging.getLogger(__name__)

_BATCH_ROWS = 256  # of one transaction
_SPILL_ROWS = 200  # moved to disk at once when the queue is full
_FLUSH_SECONDS = 30.0  # a flush that takes longer counts as failed
_CLOSE_SECONDS = 10.0
_MAX_BACKOFF_SECONDS = 10.0
_SPOOL_RETRY_SECONDS = 1.0  # a full disk is not asked again before
_DROP_LOG_SECONDS = 60.0


class StoreWriter:
    """Takes records on the event loop, writes them in batches to `database`, and to a spool on disk while that fails.

    `put_*` cost an append. Rows carry keys that the writer did not get from the database, and inserts ignore keys that exist, so that a batch
    whose commit went through unheard may be sent again; usage is counted in the same transaction, for the rows that were new. When neither
    database nor disk takes rows, the queue keeps `queue_rows` of them, and the oldest beyond are dropped and counted. `judge` says of each request
    whether it kept the SLO.
    """

    def __init__(
        self,
        database: Database,
        *,
        settings: StoreSettings,
        clock: Clock,
        spool_dir: Path,
        instance_id: str,
        fleet: str,
        judge: Callable[[RequestRecord], Verdict] | None = None,
    ) -> None:
        self._database = database
        self._judge = judge
        self._settings = settings
        self._clock = clock
        self._instance_id, self._fleet = instance_id, fleet
        self._spool = Spool(spool_dir)
        self._queue: deque[Record] = deque()
        self._in_flight = 0  # rows taken from the queue by the flush under way
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._closing = False
        self._available = True
        self._retry_at = 0.0  # monotonic; the database is left alone until then
        self._backoff = settings.flush_seconds
        self._spool_retry_at = self._drop_log_at = 0.0
        self._spool_failing = False
        self._num_written = self._num_spooled = self._num_dropped = self._num_refused = self._num_flushes = self._num_failed = 0
        self._flush_seconds = 0.0
        self._statements = Statements(database.dialect)

    def put_request(self, record: RequestRecord) -> None:
        """A request finished."""
        self._put(record)

    def put_engine_event(self, event: EngineEvent) -> None:
        """Something happened to the engine process."""
        self._put(event)

    def put_sample(self, sample: Sample) -> None:
        """The machine was sampled."""
        self._put(sample)

    @property
    def stats(self) -> StoreStats:
        """The writer's counters now."""
        return StoreStats(
            num_queued_rows=len(self._queue) + self._in_flight,
            num_spooled_rows=self._spool.num_rows,
            num_written_rows=self._num_written,
            num_spooled_total=self._num_spooled,
            num_dropped_rows=self._num_dropped + self._spool.num_broken,
            num_refused_rows=self._num_refused,
            num_failed_flushes=self._num_failed,
            flush_seconds=self._flush_seconds,
            num_flushes=self._num_flushes,
            available=self._available,
        )

    def start(self) -> None:
        """Begin to write, what an earlier run left in the spool included. Needs a running event loop; migrates a database that was away."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="store-writer")

    async def flush(self) -> None:
        """Write everything that is queued or spooled, now, or spool it if the database fails."""
        self._retry_at = 0.0
        while self._queue or self._spool.num_rows:
            before = len(self._queue) + self._spool.num_rows
            await self._flush()
            if not self._available or len(self._queue) + self._spool.num_rows >= before:
                break

    async def close(self) -> None:
        """Write what is left, to the database if it answers within ten seconds, else to the spool; then stop."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            _, late = await asyncio.wait({self._task}, timeout=_CLOSE_SECONDS)
            for task in late:
                task.cancel()
                await asyncio.wait({task})
            self._task = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self.flush()
        await self._spool_queue()
        if self._queue:
            _log.error("%d rows are lost: neither the database nor %s takes them", len(self._queue), self._spool.folder)
            self._num_dropped += len(self._queue)
            self._queue.clear()

    def _put(self, record: Record) -> None:
        self._queue.append(record)
        if len(self._queue) >= _BATCH_ROWS:
            self._wake.set()
        if len(self._queue) > self._settings.queue_rows:
            self._spill()

    def _spill(self) -> None:
        """The flush cannot keep up: move the oldest rows to disk, at once (some 2 ms for 200 rows), or drop what is over the bound."""
        records = list(islice(self._queue, _SPILL_ROWS))
        try:
            if self._clock.monotonic() < self._spool_retry_at:
                raise OSError("the spool failed a moment ago")
            self._spool.append(self._rows(records), durable=False)
        except OSError:
            if self._clock.monotonic() >= self._spool_retry_at:
                self._spool_retry_at = self._clock.monotonic() + _SPOOL_RETRY_SECONDS
            records = records[: len(self._queue) - self._settings.queue_rows]
            self._num_dropped += len(records)
            if self._clock.monotonic() >= self._drop_log_at:
                self._drop_log_at = self._clock.monotonic() + _DROP_LOG_SECONDS
                _log.error("neither the database nor %s takes rows: %d are lost so far", self._spool.folder, self._num_dropped)
        else:
            self._num_spooled += len(records)
        for _ in records:
            self._queue.popleft()

    async def _run(self) -> None:
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.flush_seconds):
                    await self._wake.wait()
            self._wake.clear()
            if self._queue or self._spool.num_rows:
                try:
                    await self._flush()
                except Exception:  # the writer must outlive whatever goes wrong in one flush
                    _log.exception("a flush failed")
                    self._num_failed += 1

    async def _flush(self) -> None:
        """One batch from the queue and one segment of the spool to the database; while that is away, the whole queue to the spool."""
        async with self._flushing:
            if self._clock.monotonic() < self._retry_at:
                await self._spool_queue()
                return
            records = list(islice(self._queue, _BATCH_ROWS))
            for _ in records:
                self._queue.popleft()
            self._in_flight = len(records)
            rows = self._rows(records)
            try:
                if rows:
                    await self._write(rows)
                rows = []
                self._in_flight = 0
                await self._replay()
            except Exception as error:
                self._fail(error)
            finally:
                self._in_flight = 0
                if rows:  # not known to be stored (also when cancelled): back to the front, whence they spool
                    self._queue.extendleft(reversed(records))
            if not self._available:
                await self._spool_queue()

    async def _replay(self) -> None:
        """Write the oldest segment of the spool and delete it."""
        segment = await asyncio.to_thread(self._spool.oldest) if self._spool.num_rows else None
        if segment is not None:
            path, spooled = segment
            rows = [(name, completed(name, row)) for name, row in spooled if name in TABLES]
            for start in range(0, len(rows), _BATCH_ROWS):
                await self._write(rows[start : start + _BATCH_ROWS])
            await asyncio.to_thread(self._spool.remove, path)
            if len(rows) < len(spooled):
                self._num_refused += len(spooled) - len(rows)
                _log.error("%d spooled rows are of tables that this version does not know", len(spooled) - len(rows))
            if self._spool.num_rows:
                self._wake.set()

    async def _write(self, rows: list[tuple[str, Row]]) -> None:
        """`rows` in one transaction; where one is invalid, each in its own, and the invalid ones are refused. Raises what the database raises."""
        started = time.perf_counter()
        try:
            if not self._database.migrated:  # it was away when the server started; a migration takes as long as it must
                await self._database.migrate()
            async with asyncio.timeout(_FLUSH_SECONDS):
                try:
                    await self._database.write(partial(self._statements.insert, rows=rows))
                    self._num_written += len(rows)
                except Exception as error:
                    if not _is_invalid(error):
                        raise
                    await self._write_singly(rows)
        finally:
            self._flush_seconds += time.perf_counter() - started
        self._num_flushes += 1
        if not self._available:
            _log.warning("the database is back; %d rows wait in the spool", self._spool.num_rows)
        self._available = True
        self._backoff = self._settings.flush_seconds

    async def _write_singly(self, rows: list[tuple[str, Row]]) -> None:
        for row in rows:
            try:
                await self._database.write(partial(self._statements.insert, rows=[row]))
                self._num_written += 1
            except Exception as error:
                if not _is_invalid(error):
                    raise
                self._num_refused += 1
                _log.error("the database refuses a row of %s: %s", row[0], _line(error))

    def _fail(self, error: Exception) -> None:
        """The database is away: leave it alone for a while, longer each time."""
        self._num_failed += 1
        if self._available:
            _log.error("the database does not take rows, spooling to %s: %s", self._spool.folder, _line(error))
        self._available = False
        self._retry_at = self._clock.monotonic() + self._backoff
        self._backoff = min(self._backoff * 2, _MAX_BACKOFF_SECONDS)

    async def _spool_queue(self) -> None:
        """The whole queue to disk. What the disk does not take stays queued; `_put` keeps that bounded."""
        while self._queue:
            records = list(islice(self._queue, _BATCH_ROWS))
            for _ in records:
                self._queue.popleft()
            self._in_flight = len(records)
            rows = self._rows(records)
            append = asyncio.ensure_future(asyncio.to_thread(self._spool.append, rows))
            try:
                await asyncio.shield(append)
            except OSError as error:
                self._queue.extendleft(reversed(records))
                if not self._spool_failing:
                    _log.error("the spool does not take rows, %d wait in memory: %s", len(self._queue), error)
                self._spool_failing = True
                return
            except asyncio.CancelledError:  # the thread goes on: wait for what it did, or the rows would be there twice or not at all
                await asyncio.wait([append])
                if append.exception() is None:
                    self._num_spooled += len(rows)
                else:
                    self._queue.extendleft(reversed(records))
                raise
            finally:
                self._in_flight = 0
            self._num_spooled += len(rows)
            self._spool_failing = False

    def _rows(self, records: list[Record]) -> list[tuple[str, Row]]:
        rows = []
        for record in records:
            try:
                verdict = self._judge(record) if self._judge is not None and isinstance(record, RequestRecord) else None
                rows.append(row_of(record, self._instance_id, self._fleet, verdict))
            except Exception:
                self._num_refused += 1
                _log.exception("a record makes no row")
        return rows


def _is_invalid(error: Exception) -> bool:
    """Whether the row is at fault, not the database: out of range, or a value missing. A missing table or right is the database's fault."""
    if isinstance(error, (DataError, IntegrityError, OverflowError)):
        return True
    if not isinstance(error, StatementError) or error.orig is None:
        return False
    # asyncpg's own error, beneath SQLAlchemy's: SQLSTATE class 22 is a data exception, found by its encoder or by the server
    cause = error.orig.__cause__
    return isinstance(error.orig, OverflowError) or isinstance(cause, ValueError) or (getattr(cause, "sqlstate", None) or "").startswith("22")


def _line(error: Exception) -> str:
    """The error in one line of bounded length."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
