"""The flags of `appliance report`. Standard library only: `appliance --help` imports it."""

from __future__ import annotations

import argparse
import re
from datetime import UTC, datetime

_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(m|min|h|d|w)")
_SECONDS = {"m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_MAX_SECONDS = 400 * 86400.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every flag but those of the settings."""
    parser.add_argument("--since", default="24h", metavar="SPAN|TIME", help="90m, 24h, 7d, 4w, or an ISO 8601 time (%(default)s)")
    parser.add_argument("--until", default=None, metavar="TIME", help="an ISO 8601 time; default: now")
    parser.add_argument("--only-fleet", default=None, metavar="NAME", help="of the fleets that share the database, this one")
    parser.add_argument("--output", "-o", default=None, metavar="FILE", help="where to write; - is standard output; default: a name with the time")


def time_range(since: str, until: str | None, now: float) -> tuple[float, float]:
    """(since, until) in Unix seconds. Raises ValueError, with what is allowed, for a range that is none or over 400 days."""
    end = now if until is None else _time(until)
    match = _SPAN.fullmatch(since.strip())
    start = end - float(match[1]) * _SECONDS[match[2]] if match else _time(since)
    if not 0 < end - start <= _MAX_SECONDS:
        raise ValueError(f"the range from {since} to {until or 'now'} is not above 0 and at most 400 days")
    return start, end


def _time(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither a span (90m, 24h, 7d, 4w) nor an ISO 8601 time") from None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
