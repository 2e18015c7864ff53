"""What a report is made of, read from SQL once. Times named `_wall` are Unix seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from appliance.metrics.goodput import Slo, choose_slo
from appliance.report.timeline import Timeline, timeline_of
from appliance.settings import Settings
from appliance.store import queries
from appliance.store.database import Database
from appliance.store.results import HourUsage, KeyUsage, Known, Prices, StoredDecision, StoredEngineEvent, StoredRequest, Usage

NUM_SLOWEST = 15
_NUM_EVENTS, _NUM_DECISIONS = 200, 100
_MANY = 500  # slowest requests of all fleets, of which one fleet's are shown
_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """The range is [since, until), its start on a whole hour of UTC: usage is kept by the hour."""

    since_wall: float
    until_wall: float
    made_wall: float
    fleet: str | None
    slo: Slo  # as it is configured now; where it is not, the default for what the samples say of the hardware
    kv_limit: float  # KV use above which the policy asks for more
    currency: str
    total: Usage
    hours: tuple[HourUsage, ...]  # oldest first; those without a request are missing
    keys: tuple[KeyUsage, ...]  # the most tokens first
    timeline: Timeline
    slowest: tuple[StoredRequest, ...]
    decisions: tuple[StoredDecision, ...]  # newest first
    events: tuple[StoredEngineEvent, ...]  # newest first
    known: Known


async def collect(
    database: Database,
    *,
    since_wall: float,
    until_wall: float,
    made_wall: float,
    settings: Settings,
    fleet: str | None = None,
) -> ReportData:
    """Everything of a report. Reads only; raises what SQLAlchemy raises. Of `settings`, the SLO, the KV limit and the prices matter."""
    since_wall = math.floor(since_wall / _HOUR) * _HOUR
    cost = settings.cost
    prices = Prices(cost.prompt_per_million, cost.output_per_million, cost.cached_per_million)
    async with database.session() as session:
        history = await queries.sample_history(session, since_wall=since_wall, until_wall=until_wall, fleet=fleet)
        timeline = timeline_of(history, since_wall, until_wall)
        slowest = await queries.slowest_requests(session, since_wall=since_wall, until_wall=until_wall, limit=NUM_SLOWEST if fleet is None else _MANY)
        return ReportData(
            since_wall=since_wall,
            until_wall=until_wall,
            made_wall=made_wall,
            fleet=fleet,
            slo=choose_slo(settings.slo, "cuda" if timeline.has_gpu else "cpu"),
            kv_limit=settings.scaling.max_kv_utilisation,
            currency=cost.currency,
            total=await queries.usage_total(session, since_wall=since_wall, until_wall=until_wall, fleet=fleet),
            hours=await queries.usage_by_hour(session, since_wall=since_wall, until_wall=until_wall, fleet=fleet),
            keys=await queries.usage_by_key(session, since_wall=since_wall, until_wall=until_wall, prices=prices, fleet=fleet),
            timeline=timeline,
            slowest=tuple(stored for stored in slowest if fleet in (None, stored.fleet))[:NUM_SLOWEST],
            decisions=await queries.scale_decisions(session, since_wall=since_wall, until_wall=until_wall, fleet=fleet, limit=_NUM_DECISIONS),
            events=await queries.engine_events(session, since_wall=since_wall, until_wall=until_wall, fleet=fleet, limit=_NUM_EVENTS),
            known=await queries.known(session, since_wall=since_wall, until_wall=until_wall),
        )
