"""A whole run: find the model, warm up, measure the client's ceiling, then level after level."""

from __future__ import annotations

import argparse
import json
import os
import platform
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from appliance import __version__
from appliance.bench.load import WorkerFailed, measure_ceiling, run_level, split_job
from appliance.bench.loop import run
from appliance.bench.options import api_key
from appliance.bench.records import BenchReport, Job, LevelReport
from appliance.bench.report import print_report, write_plot
from appliance.bench.statistics import summarise
from appliance.bench.workload import Lengths, plan_requests, shared_body

_REQUESTS_PER_STREAM = 8
_OPEN_LOOP_REQUESTS = 100


class BenchError(Exception):
    """The run cannot start; the message says why."""


def run_bench(arguments: argparse.Namespace) -> int:
    """Run and report. Exit status 0 if every request succeeded, 1 if some failed or the server is away, 2 for flags that make no sense."""
    outputs = [Path(name) for name in (arguments.json, arguments.plot) if name]
    for path in outputs:
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            print(f"bench: {path} cannot be written", file=sys.stderr)
            return 2
    try:
        report = run(_measure(arguments))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except (BenchError, WorkerFailed) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print_report(report)
    if arguments.json:
        Path(arguments.json).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if arguments.plot:
        try:
            write_plot(report, Path(arguments.plot))
        except ImportError:
            print("bench: no plot, since matplotlib is not installed", file=sys.stderr)
    return 1 if any(level.num_failed for level in report.levels) else 0


async def _measure(arguments: argparse.Namespace) -> BenchReport:
    started_wall = time.time()
    if arguments.concurrency and arguments.request_rate:
        raise ValueError("--concurrency and --request-rate exclude each other")
    job = _job(arguments)
    levels: list[tuple[int, float | None]] = [(arguments.max_in_flight, rate) for rate in arguments.request_rate or ()]
    levels = levels or [(count, None) for count in arguments.concurrency or (1, 4, 8)]
    if arguments.warmup:
        await _warm_up(arguments, job)
    ceiling = None
    if not arguments.no_ceiling:
        busiest = max(count for count, _ in levels) if not arguments.request_rate else 64
        ceiling = await measure_ceiling(arguments.processes, busiest)
    reports: list[LevelReport] = []
    for concurrency, rate in levels:
        first_index = sum(report.num_requests for report in reports)
        reports.append(await _level(arguments, job, concurrency, rate, ceiling, first_index))
    return BenchReport(
        base_url=arguments.base_url,
        model=json.loads(job.body + b"}")["model"],
        started_wall=started_wall,
        options={name: value for name, value in vars(arguments).items() if name not in ("command", "base_url", "json", "plot", "quiet")},
        versions={"appliance": __version__, "python": platform.python_version()},
        ceiling_events_per_second=ceiling,
        levels=reports,
    )


async def _level(
    arguments: argparse.Namespace, job: Job, concurrency: int, rate: float | None, ceiling: float | None, first_index: int
) -> LevelReport:
    num_requests = arguments.num_requests or (_OPEN_LOOP_REQUESTS if rate is not None else _REQUESTS_PER_STREAM * concurrency)
    inputs = Lengths.parse(arguments.input_len, arguments.range_ratio)
    outputs = Lengths.parse(arguments.output_len, arguments.range_ratio)
    plans = plan_requests(num_requests, inputs, outputs, arguments.seed, rate, first_index)
    jobs = split_job(msgspec.structs.replace(job, concurrency=concurrency), plans, arguments.processes)
    with _progress(f"c={concurrency}" if rate is None else f"{rate:g} req/s", num_requests, arguments.quiet) as on_progress:
        outcomes, cpu_seconds = await run_level(jobs, on_progress)
    return summarise(
        outcomes,
        concurrency=concurrency if rate is None else None,
        request_rate=rate,
        client_cpu_seconds=cpu_seconds,
        ceiling_events_per_second=ceiling,
    )


async def _warm_up(arguments: argparse.Namespace, job: Job) -> None:
    """A few requests of other prompts than the measured ones, so that no prefix is cached for those. Raises BenchError if they fail."""
    inputs, outputs = Lengths.parse(arguments.input_len), Lengths.parse(arguments.output_len)
    plans = plan_requests(arguments.warmup, inputs, outputs, arguments.seed)
    apart = msgspec.structs.replace(job, seed=-1 - arguments.seed, concurrency=1)
    outcomes, _ = await run_level(split_job(apart, plans, 1), lambda _: None)
    for outcome in outcomes:
        if outcome.error is not None:
            raise BenchError(f"the warm-up request failed: {outcome.error}")


def _job(arguments: argparse.Namespace) -> Job:
    chat = arguments.endpoint == "chat"
    if chat and arguments.prompts == "ids":
        raise ValueError("--endpoint chat takes text prompts only")
    low, _, high = arguments.token_ids.partition(":")
    shortest = Lengths.parse(arguments.input_len, arguments.range_ratio).low
    if not 0 <= arguments.prefix_len < shortest:
        raise ValueError(f"--prefix-len must be less than the shortest prompt's {shortest} tokens and not negative, not {arguments.prefix_len}")
    extra = json.loads(arguments.extra_body)
    if not isinstance(extra, dict) or not 0 <= int(low) <= int(high or low):
        raise ValueError("--extra-body takes a JSON object, and --token-ids LOW:HIGH")
    base = arguments.base_url.rstrip("/").removesuffix("/v1") + "/v1"
    key = api_key(arguments)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    model = arguments.model or _first_model(base, headers)
    return Job(
        url=f"{base}/{'chat/completions' if chat else 'completions'}",
        headers=headers,
        body=shared_body(model, chat, arguments.temperature, not arguments.no_ignore_eos, extra),
        chat=chat,
        text_prompts=chat or arguments.prompts == "text",
        plans=[],
        concurrency=1,
        seed=arguments.seed,
        min_token_id=int(low),
        max_token_id=int(high or low),
        prefix_tokens=arguments.prefix_len,
        timeout_seconds=arguments.timeout,
        limit_seconds=arguments.max_seconds,
        keep_alive=not arguments.no_keep_alive,
    )


def _first_model(base: str, headers: dict[str, str]) -> str:
    if urlsplit(base).scheme not in ("http", "https"):
        raise ValueError(f"--base-url takes an http or https URL, not {base}")
    request = urllib.request.Request(f"{base}/models", headers=headers)  # noqa: S310 - the scheme was checked
    try:
        with urllib.request.urlopen(request, timeout=10, context=ssl.create_default_context()) as reply:  # noqa: S310
            return str(json.load(reply)["data"][0]["id"])
    except urllib.error.HTTPError as error:
        raise BenchError(f"{base}/models answers {error.code} {error.reason}") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BenchError(f"no server with a model at {base}: {error}") from error


@contextmanager
def _progress(label: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error while a level runs, where there is a terminal and rich."""
    try:
        if quiet or not sys.stderr.isatty():
            raise ImportError
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total)
        yield lambda count: bars.update(task, completed=count)
