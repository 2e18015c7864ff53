"""Who uses the fleet and what it costs, from PostgreSQL alone: usage by the hour, which outlives the ledger, and single requests from the ledger."""

from __future__ import annotations

from boards.frame import KEY, Board
from boards.panels import sql_lines, sql_number, sql_table

# Arrays, since IN () is no SQL: before the first request there is nothing to choose from
_WHO = " AND ".join(
    f"{column} = ANY(ARRAY[${{{name}:sqlstring}}]::text[])" for column, name in (("fleet", "fleet"), ("model", "served"), (KEY, "key"))
)
# Whole hours: those that the range begins and ends in count whole
_HOURS = f"FROM usage_rollup WHERE period_seconds = 3600 AND start_wall > $__unixEpochFrom() - 3600 AND start_wall <= $__unixEpochTo() AND {_WHO}"
_LEDGER = f"FROM requests WHERE $__unixEpochFilter(received_wall) AND {_WHO}"
_COST = (
    "((sum(num_prompt_tokens) - sum(num_cached_tokens)) * ${prompt_price:sqlstring}::float8 "
    "+ sum(num_cached_tokens) * ${cached_price:sqlstring}::float8 + sum(num_generated_tokens) * ${output_price:sqlstring}::float8) / 1e6"
)
# The ledger's states in the order of a request's life
_STATES = ", ".join(
    f"{state}_seconds AS {state}"
    for state in (
        *("received", "admitted", "queued", "prefill_wait", "prefill", "decode", "grammar"),
        *("preempted", "engine_restart", "detokenize", "write_blocked"),
    )
)
_TOKEN_UNITS = dict.fromkeys(("prompt_tokens", "cached_tokens", "output_tokens"), "short")


def _by_hour(what: str) -> str:
    """`what` by key, an hour each."""
    return f"SELECT start_wall AS time, {KEY} AS metric, {what} AS value {_HOURS} GROUP BY 1, 2 ORDER BY 1"


def _quantile(column: str) -> str:
    """The 95th percentile of a column of the ledger by key, in steps of the panel."""
    return (
        f"SELECT $__unixEpochGroup(received_wall, $__interval) AS time, {KEY} AS metric, "
        f"percentile_cont(0.95) WITHIN GROUP (ORDER BY {column}) AS value {_LEDGER} AND {column} IS NOT NULL GROUP BY 1, 2 ORDER BY 1"
    )


def _share(part: str, whole: str) -> str:
    return f"(sum({part}) / nullif(sum({whole}), 0))::float8"


_SUMS = [
    sql_number("Requests", f"SELECT coalesce(sum(num_requests), 0)::float8 AS value {_HOURS}", "short", "In the hours shown."),
    sql_number("Prompt tokens", f"SELECT coalesce(sum(num_prompt_tokens), 0)::float8 AS value {_HOURS}", "short", "Cached ones included."),
    sql_number("Output tokens", f"SELECT coalesce(sum(num_generated_tokens), 0)::float8 AS value {_HOURS}", "short", "Generated."),
    sql_number("Cost", f"SELECT coalesce({_COST}, 0) AS value {_HOURS}", "none", "At the prices at the top of this board, in their currency."),
    sql_number("Goodput", f"SELECT coalesce({_share('num_good', 'num_judged')}, 1) AS value {_HOURS}", "percentunit", "Share within the SLO."),
    sql_number("Energy", f"SELECT coalesce(sum(joules), 0) / 3.6e6 AS value {_HOURS}", "kwatth", "Of the requests, idle energy apart."),
]

_USAGE = [
    sql_table(
        "Usage and cost by key",
        f"SELECT {KEY} AS key, model, sum(num_requests)::float8 AS requests, sum(num_errors)::float8 AS failed, "
        "sum(num_rejected)::float8 AS refused, sum(num_aborted)::float8 AS left_early, "
        "sum(num_prompt_tokens)::float8 AS prompt_tokens, sum(num_cached_tokens)::float8 AS cached_tokens, "
        f"sum(num_generated_tokens)::float8 AS output_tokens, {_COST} AS cost, "
        f"{_share('num_good', 'num_judged')} AS goodput, {_share('ttft_seconds', 'num_ttft')} AS mean_ttft, "
        "coalesce(sum(joules), 0) AS joules, coalesce(sum(joules) / nullif(sum(num_generated_tokens), 0), 0)::float8 AS joules_a_token "
        f"{_HOURS} GROUP BY 1, 2 ORDER BY cost DESC",
        "Cost at the prices at the top of this board, in their currency.",
        units={**_TOKEN_UNITS, "goodput": "percentunit", "mean_ttft": "s", "joules": "joule", "joules_a_token": "joule"},
    ),
    sql_lines("Output tokens by key", _by_hour("sum(num_generated_tokens)::float8"), "short", "An hour each."),
    sql_lines("Prompt tokens by key", _by_hour("sum(num_prompt_tokens)::float8"), "short", "An hour each."),
    sql_lines("Cost by key", _by_hour(_COST), "none", "An hour each, in the currency of the prices."),
    sql_lines("Energy by key", _by_hour("coalesce(sum(joules), 0)"), "joule", "An hour each; 0 without an energy reading."),
]

_SERVICE = [
    sql_lines(
        "Goodput by key",
        _by_hour(f"coalesce({_share('num_good', 'num_judged')}, 1)"),
        "percentunit",
        "Share within the SLO, an hour each.",
        stacked=False,
    ),
    sql_lines("Failed and refused by key", _by_hour("(sum(num_errors) + sum(num_rejected))::float8"), "short", "An hour each.", stacked=False),
    sql_lines("Time to first token by key, p95", _quantile("ttft_seconds"), "s", "A step of the panel each.", stacked=False),
    sql_lines("Time per output token by key, p95", _quantile("tpot_seconds"), "s", "A step of the panel each.", stacked=False),
    sql_table(
        "Slowest requests",
        f"SELECT to_timestamp(received_wall) AS received, id, {KEY} AS key, model, status, coalesce(finish_reason, '') AS finish, "
        f"num_prompt_tokens AS prompt, num_generated_tokens AS output, duration_seconds AS duration, coalesce(ttft_seconds, 0) AS ttft, {_STATES} "
        f"{_LEDGER} ORDER BY duration_seconds DESC LIMIT 50",
        "With their ledger: the states in seconds sum to the duration.",
    ),
    sql_table(
        "Busiest hours",
        "SELECT to_timestamp(start_wall) AS hour, sum(num_requests)::float8 AS requests, count(DISTINCT key_id) AS keys, "
        f"sum(num_prompt_tokens)::float8 AS prompt_tokens, sum(num_generated_tokens)::float8 AS output_tokens {_HOURS} "
        "GROUP BY start_wall ORDER BY sum(num_prompt_tokens) + sum(num_generated_tokens) DESC LIMIT 24",
        "By prompt and output tokens.",
        width=12,
        units=_TOKEN_UNITS,
    ),
    sql_table(
        "Errors by key",
        f"SELECT {KEY} AS key, status, coalesce(error_code, '') AS code, count(*) AS requests, to_timestamp(max(received_wall)) AS newest "
        f"{_LEDGER} AND status >= 400 GROUP BY 1, 2, 3 ORDER BY requests DESC LIMIT 50",
        "Refusals and bad requests included.",
        width=12,
    ),
]

BOARD = Board(
    "appliance-tenants",
    "Appliance: tenants",
    "Usage, cost and service by key and model, from PostgreSQL.",
    [("Totals", _SUMS), ("Usage and cost", _USAGE), ("Service", _SERVICE)],
    source="sql",
    hours=24,
)
