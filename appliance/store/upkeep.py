"""The database's upkeep: rollup every minute, purge every hour. Where several appliances share a PostgreSQL, one at a time does it for all."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from apscheduler.schedulers.base import BaseScheduler
from sqlalchemy.exc import SQLAlchemyError

from appliance.clock import Clock
from appliance.settings import StoreSettings
from appliance.store.database import UPKEEP_LOCK, Database
from appliance.store.retention import Limits, purge
from appliance.store.rollup import roll_up

_log = logging.getLogger(__name__)

_ROLLUP_SECONDS = 60
_PURGE_SECONDS = 3600
_FIRST_PURGE_SECONDS = 300  # after the start, so that a server restarted every half hour purges too
_RECENT_SECONDS = 2 * 3600.0  # what the minutely rollup looks back on; the hourly one looks at all samples


class Upkeep:
    """Both jobs. They may be called at any time and as often as one likes: what is done is not done again."""

    def __init__(self, database: Database, *, settings: StoreSettings, clock: Clock) -> None:
        self._database = database
        self._settings = settings
        self._clock = clock
        self._failing = False

    def schedule(self, scheduler: BaseScheduler) -> None:
        """Add both jobs. Late is better than never: a busy event loop must not cost a run (APScheduler's default drops one a second late)."""
        options = {"coalesce": True, "max_instances": 1, "misfire_grace_time": _PURGE_SECONDS}
        first = datetime.now(UTC) + timedelta(seconds=_FIRST_PURGE_SECONDS)
        scheduler.add_job(self.roll_up, "interval", seconds=_ROLLUP_SECONDS, id="store-rollup", **options)
        scheduler.add_job(self.purge, "interval", seconds=_PURGE_SECONDS, id="store-purge", next_run_time=first, **options)

    async def roll_up(self) -> None:
        """Bring the rollups of the last two hours up to date."""
        since = self._clock.wall() - _RECENT_SECONDS

        async def work() -> None:
            await roll_up(self._database, since_wall=since)

        await self._alone(work)

    async def purge(self) -> None:
        """Roll up whatever is not yet, samples that arrived late included; then delete what has reached its age."""

        async def work() -> None:
            await roll_up(self._database)
            num_deleted = await purge(self._database, Limits.of(self._settings, self._clock.wall()))
            await self._database.analyze()
            if num_deleted:
                _log.info("purged %d rows", num_deleted)

        await self._alone(work)

    async def _alone(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do it, unless another appliance is at it. A database that is away is the writer's to report; the next run takes up what this one leaves."""
        if not self._database.migrated:
            return
        try:
            async with self._database.alone(UPKEEP_LOCK) as mine:
                if mine:
                    await work()
            self._failing = False
        except (SQLAlchemyError, OSError) as error:
            if not self._failing:
                _log.warning(
                    "rollup and purge wait for the database: %s: %s", type(error).__name__, str(error).splitlines()[0][:300] if str(error) else ""
                )
            self._failing = True
