"""Whether users are served as promised, and how much of the error budget is left."""

from __future__ import annotations

from boards.frame import Board
from boards.panels import ALWAYS_GREEN, BAD_ABOVE_ZERO, GOOD_ABOVE_99, lines, number
from boards.promql import attainment, availability, highest, increase, known, lowest, rate, recorded, series, token_goodput, total

_BUDGET = f"(1 - {lowest('slo_target_ratio')})"
_FIRING = 'count (ALERTS{alertname=~"Appliance.+", alertstate="firing", instance=~"$instance|"}) or vector(0)'
_BURNING = ((None, "green"), (1.0, "orange"), (6.0, "red"))
_WINDOWS = ("5m", "1h", "6h", "3d")

_LEVEL = [
    number("Goodput", attainment("both", "$__range"), "percentunit", "Share of requests within the TTFT and TPOT SLO.", steps=GOOD_ABOVE_99, width=3),
    number("TTFT within SLO", attainment("ttft", "$__range"), "percentunit", "Share of first tokens in time.", steps=GOOD_ABOVE_99, width=3),
    number("TPOT within SLO", attainment("tpot", "$__range"), "percentunit", "Share of replies at the promised pace.", steps=GOOD_ABOVE_99, width=3),
    number("Availability", availability("$__range"), "percentunit", "Share of requests not answered with 5xx.", steps=GOOD_ABOVE_99, width=3),
    number(
        "Burn rate, 1 h",
        f"(1 - {attainment('both', '1h')}) / {_BUDGET}",
        "none",
        "1 spends the error budget exactly in its period.",
        steps=_BURNING,
        width=3,
    ),
    number(
        "Budget left, 30 d",
        f"1 - (1 - {attainment('both', '30d')}) / {_BUDGET}",
        "percentunit",
        "Of the errors that the target allows in 30 days of this traffic.",
        steps=((None, "red"), (0.0, "orange"), (0.25, "green")),
        width=3,
    ),
    number("Oldest waiting", highest("oldest_waiting_age_seconds"), "s", "Age of the oldest request that waits now.", width=3),
    number("Alerts firing", _FIRING, "none", "Of dashboards/alerts.yml; each names its runbook.", steps=BAD_ABOVE_ZERO, width=3),
    lines(
        "SLO attainment",
        [*((attainment(o), o) for o in ("ttft", "tpot", "both")), (token_goodput(), "tokens, both"), (highest("slo_target_ratio"), "target")],
        "percentunit",
        "Per objective, against the target.",
        width=12,
        low=None,
    ),
    lines(
        "Burn rate by window",
        [
            (f"max by (objective) ({recorded(f'slo_errors:ratio_rate{window}')}) / scalar({_BUDGET})", f"{{{{objective}}}} {window}")
            for window in _WINDOWS
        ],
        "none",
        "Errors over the budget; pages come at 14.4 (1 h and 5 m) and 6 (6 h and 30 m), capped where the target is low.",
        width=12,
    ),
]

_DEMAND = [
    lines("Requests by status", [(rate("requests_total", "status"), "{{status}}")], "reqps", "Finished requests.", stacked=True),
    lines("Refused at admission", [(rate("rejections_total", "code"), "{{code}}")], "reqps", "Queue full, draining, quotas."),
    lines(
        "Judged and good requests",
        [(rate("slo_requests_total", objective="both"), "judged"), (rate("slo_good_requests_total", objective="both"), "good")],
        "reqps",
        "Requests that the SLO judges.",
    ),
    lines(
        "Received and finished",
        [(rate("requests_received_total"), "received"), (rate("requests_total"), "finished")],
        "reqps",
        "A gap that grows is a backlog.",
    ),
    lines(
        "Requests in the engine",
        [(total("requests_running"), "running"), (total("requests_waiting"), "waiting"), (total("requests_in_flight"), "in flight")],
        "none",
        "Running is bounded by the batch, waiting by nothing but the queue.",
    ),
    lines(
        "Wait for the first token, live",
        [
            (highest("oldest_waiting_age_seconds"), "oldest waiting"),
            (highest("predicted_ttft_seconds"), "predicted, of one that arrives now"),
            (lowest("slo_ttft_seconds"), "SLO"),
        ],
        "s",
        "While the queue builds, not when its requests end.",
    ),
]

_TOKENS = [
    lines(
        "Tokens",
        [
            (rate("output_tokens_total"), "output"),
            (rate("admitted_prompt_tokens_total"), "prompt, at admission"),
            (rate("cached_tokens_total"), "prompt, from cache"),
            (rate("surplus_tokens_total"), "surplus, discarded"),
        ],
        "cps",
        "Tokens a second.",
    ),
    lines(
        "Demand",
        [
            (total("demand_prompt_tokens_per_second"), "prompt"),
            (total("demand_output_tokens_per_second"), "output, expected"),
            (rate("admitted_max_tokens_total"), "output, asked for (max_tokens)"),
        ],
        "cps",
        "Tokens a second at admission.",
    ),
    lines(
        "Finished requests' tokens",
        [(rate("prompt_tokens_total"), "prompt"), (rate("generated_tokens_total"), "generated"), (rate("written_tokens_total"), "written")],
        "cps",
        "Written below generated: clients that left.",
    ),
    number("SLO: first token", lowest("slo_ttft_seconds"), "s", "What counts as good.", width=6),
    number("SLO: token pace", lowest("slo_tpot_seconds"), "s", "What counts as good, mean of a reply.", width=6),
    number("Requests", increase("requests_total", window="$__range"), "none", "In the time shown.", width=6),
    number("Instances", f"count ({series('build_info')})", "none", "That are scraped.", steps=ALWAYS_GREEN, width=6),
]

_BY_KEY = "key, model"
_OF_KEY = "{{key}} {{model}}"
_KEYS = [
    lines(
        "Goodput by key",
        [(known(f"{rate('key_slo_good_requests_total', _BY_KEY)} / {rate('key_slo_requests_total', _BY_KEY)}"), _OF_KEY)],
        "percentunit",
        "Share of judged requests within the SLO, by API key and model; the nameless key is that of servers without keys.",
        low=None,
    ),
    lines(
        "Token goodput by key",
        [(known(f"{rate('key_slo_good_tokens_total', _BY_KEY)} / {rate('key_slo_tokens_total', _BY_KEY)}"), _OF_KEY)],
        "percentunit",
        "Share of tokens that went to good requests.",
        low=None,
    ),
    lines(
        "Failures by key",
        [(known(f"{rate('key_errors_total', _BY_KEY)} / {rate('key_requests_total', _BY_KEY)}"), _OF_KEY)],
        "percentunit",
        "Share of requests answered with 5xx.",
    ),
    lines("Prompt tokens by key", [(rate("key_prompt_tokens_total", _BY_KEY), _OF_KEY)], "cps", "Tokens a second.", stacked=True),
    lines("Output tokens by key", [(rate("key_generated_tokens_total", _BY_KEY), _OF_KEY)], "cps", "Tokens a second.", stacked=True),
    lines(
        "Engine share by key",
        [(rate("key_engine_seconds_total", _BY_KEY), _OF_KEY)],
        "percentunit",
        "Engine seconds a second: each step's time, split by modelled cost over its rows.",
        stacked=True,
    ),
]

BOARD = Board(
    "appliance-slo",
    "Appliance: service level",
    "Whether users are served within the SLO, how fast the error budget goes, and what is asked of the fleet.",
    [("Service level", _LEVEL), ("Requests", _DEMAND), ("Tokens", _TOKENS), ("Keys", _KEYS)],
)
