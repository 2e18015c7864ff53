"""Where the milliseconds of a request go."""

from __future__ import annotations

from boards.frame import Board
from boards.panels import heat, lines
from boards.promql import known, quantile, quantiles, rate, recorded

_FELT = [
    heat("Time to first token", "time_to_first_token_seconds", "s", "Receipt to first token; points are exemplars with request ids."),
    heat("Inter-token latency", "inter_token_latency_seconds", "s", "Every gap between two tokens."),
    heat("Request duration", "request_duration_seconds", "s", "Receipt to the last byte."),
    lines("TTFT", quantiles("time_to_first_token_seconds"), "s", "Quantiles of the time to first token."),
    lines("TPOT", quantiles("time_per_output_token_seconds"), "s", "Quantiles of the mean gap of a request."),
    lines("ITL", quantiles("inter_token_latency_seconds"), "s", "Quantiles of the gaps themselves: stalls show here first."),
    lines(
        "TTFT by instance",
        [(recorded("time_to_first_token_seconds:p95_5m"), "{{instance}}")],
        "s",
        "p95 over 5 minutes: one instance that is slower than the others.",
    ),
    lines("ITL by instance", [(recorded("inter_token_latency_seconds:p95_5m"), "{{instance}}")], "s", "p95 over 5 minutes."),
    lines(
        "TTFT by endpoint",
        [(known(quantile(0.95, "time_to_first_token_seconds", "endpoint")), "{{endpoint}}")],
        "s",
        "p95: chats carry a template, completions do not.",
    ),
]

_LEDGER = [
    lines(
        "Where the time goes",
        [(rate("request_state_seconds_total", "state"), "{{state}}")],
        "s",
        "Ledger of finished requests, request-seconds a second.",
        width=24,
        stacked=True,
    ),
    lines("Queue time", quantiles("request_queue_seconds"), "s", "In the waiting queue.", width=6),
    lines("Prefill time", quantiles("request_prefill_seconds"), "s", "Waiting for others' chunks included.", width=6),
    lines("Inference time", quantiles("request_inference_seconds"), "s", "In the batch: prefill and decode.", width=6),
    lines("Decode time", quantiles("request_decode_seconds"), "s", "From the prompt's end to the last token.", width=6),
    heat("Queue time of requests", "request_queue_seconds", "s", "Finished requests.", width=6),
    heat("Prefill time of requests", "request_prefill_seconds", "s", "Finished requests.", width=6),
    heat("Decode time of requests", "request_decode_seconds", "s", "Finished requests.", width=6),
    heat("Pace of replies (TPOT)", "time_per_output_token_seconds", "s", "Finished requests.", width=6),
]

_SHAPE = [
    heat("Prompt length", "request_prompt_tokens", "none", "Tokens of finished requests.", width=6),
    heat("Output length", "request_generated_tokens", "none", "Tokens of finished requests, all choices.", width=6),
    heat("Longest choice", "request_longest_choice_tokens", "none", "Tokens of each finished request's longest choice.", width=6),
    heat("Output asked for", "request_max_tokens", "none", "max_tokens of finished requests.", width=6),
    lines("Choices", quantiles("request_choices"), "none", "Of a request (n, times prompts).", width=12),
    lines("Preemptions of a request", quantiles("request_preemptions"), "none", "How often one lost its blocks.", width=12),
]

BOARD = Board(
    "appliance-latency",
    "Appliance: latency",
    "Time to first token, token gaps and whole requests, and which state of the ledger the time was spent in.",
    [("What a user feels", _FELT), ("Ledger", _LEDGER), ("Shape of the requests", _SHAPE)],
)
