"""The flags of the load generator. Standard library only: `appliance --help` imports it."""

from __future__ import annotations

import argparse
import os

KEY_VARIABLE = "OPENAI_API_KEY"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every flag of `appliance bench`, which are those of `python -m appliance.bench`."""
    target = parser.add_argument_group("target")
    target.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="server to measure, with or without /v1 (%(default)s)")
    target.add_argument("--model", metavar="NAME", help="model to ask for; default: the first that /v1/models lists")
    target.add_argument("--endpoint", choices=("completions", "chat"), default="completions", help="chat implies --prompts text (%(default)s)")
    target.add_argument(
        "--api-key-env",
        default=KEY_VARIABLE,
        metavar="NAME",
        help="environment variable that holds the API key, if the server wants one (%(default)s)",
    )
    load = parser.add_argument_group("load")
    load.add_argument("--concurrency", type=_counts, default=None, metavar="N,N,...", help="levels of a closed loop: requests in flight (1,4,8)")
    load.add_argument(
        "--request-rate", type=_rates, default=None, metavar="R,R,...", help="levels of an open loop instead: requests a second, Poisson arrivals"
    )
    load.add_argument("--num-requests", type=_count, default=None, metavar="N", help="requests a level; default: 8 a stream, or 100 in an open loop")
    load.add_argument("--max-in-flight", type=_count, default=1024, metavar="N", help="bound of an open loop (%(default)s)")
    load.add_argument("--max-seconds", type=_seconds, default=300.0, metavar="S", help="bound of one level (%(default)s)")
    load.add_argument("--timeout", type=_seconds, default=300.0, metavar="S", help="bound of one request (%(default)s)")
    load.add_argument("--warmup", type=int, default=1, metavar="N", help="requests before the first level, not counted (%(default)s)")
    load.add_argument("--no-keep-alive", action="store_true", help="a connection for each request, for servers that drop idle ones without a word")
    load.add_argument("--processes", type=_count, default=1, metavar="N", help="client processes, so that the client is not the limit (%(default)s)")
    work = parser.add_argument_group("work")
    work.add_argument("--input-len", default="128", metavar="N|LOW:HIGH", help="prompt tokens (%(default)s)")
    work.add_argument("--output-len", default="128", metavar="N|LOW:HIGH", help="output tokens, max_tokens (%(default)s)")
    work.add_argument("--range-ratio", type=float, default=0.0, metavar="R", help="draw lengths from N (1 - R) to N (1 + R) (%(default)s)")
    work.add_argument("--prefix-len", type=int, default=0, metavar="N", help="of a prompt's tokens, the first that all requests share (%(default)s)")
    work.add_argument("--prompts", choices=("ids", "text"), default=None, help="random token ids, or words of about a token (ids; chat: text)")
    work.add_argument("--token-ids", default="100:30000", metavar="LOW:HIGH", help="range of random ids; within the vocabulary (%(default)s)")
    work.add_argument("--no-ignore-eos", action="store_true", help="let the model end its text; the outputs are then shorter")
    work.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    work.add_argument("--extra-body", default="{}", metavar="JSON", help="more fields for every request")
    work.add_argument("--seed", type=int, default=0, metavar="N", help="seed of lengths, prompts and arrivals (%(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write the figures there")
    output.add_argument("--plot", metavar="FILE", help="draw throughput and latencies there, as PNG")
    output.add_argument("--no-ceiling", action="store_true", help="do not measure the client's own ceiling first")
    output.add_argument("--quiet", action="store_true", help="no progress bar")


def api_key(arguments: argparse.Namespace) -> str | None:
    """The key to send, from the environment."""
    return os.environ.get(arguments.api_key_env) or None


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 1000000")
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 86400")
    return number


def _rates(text: str) -> tuple[float, ...]:
    return tuple(_rate(part) for part in text.split(","))


def _rate(text: str) -> float:
    number = float(text)
    if not 0 < number <= 100_000:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 100000")
    return number
