"""What measuring costs: the same load on a server with everything on and on one with metrics and SQL off, in interleaved pairs.

    python benchmarks/metrics_cost.py --pairs-per-start 1                                           # the embedded model, on whatever is there
    python benchmarks/metrics_cost.py --model dummy:SHAPE --concurrency 128 --processes 4 --pin 2   # a GPU

On means metrics with both compatible namespaces, SQL, the policy loop, and a scrape in OpenMetrics every few seconds; off is
`metrics.enabled = store.enabled = false` and no policy loop. The ledger and the engine's reports are part of both. Both servers are up beside
each other, in state folders of their own that share the compiled kernels, with the same number of KV blocks, and both are under the same
closed loop of streams all the time; but only one runs, in turns of a second or two, while the other is stopped (SIGSTOP) where it is. Machines
drift by several percent within a minute, which a turn does not see. What a server does for a moment after it is let go is not measured;
tokens, gaps between them and CPU time are, of what lies in the rest of its turn. Jobs of a server that come due meanwhile are as often in the
part that is measured as they would be without stops. A pair is some turns of each, in the order of off, on, on, off; prompts and lengths are the
same for both, and none is sent twice. A process keeps a speed of its own while it lives, by where its memory lies (a percent either way
on a CPU): --pairs-per-start says how often both are started anew.

For each figure: the mean of the pairs' relative differences (on - off) / off and its 95 % confidence interval (Student's t). TPOT is a request's
mean gap. Exit status 1 if an interval does not lie within --limit. It needs a quiet machine; where there are cores enough, --pin keeps the
processes off each other's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from paused_server import PausedServer, cores_for_clients

from appliance.bench.load import run_level, split_job
from appliance.bench.records import Job, Outcome
from appliance.bench.report import plain_table
from appliance.bench.workload import Lengths, plan_requests, shared_body

BLOCK_SIZE = 16
EDGE_SECONDS = 0.25  # of a turn, after the server is let go: half a period of the SQL writer, so that what is lost of its work is gained at the end
CLIENT_SECONDS = 2.5  # in which the clients start and send what waits for the servers
WARM_SECONDS = 4.0  # of each side's load before its turns
LEAST_GAPS = 8  # of a request in a pair's turns, for it to have a TPOT
CUT_SHORT = ("cut off by the time limit", "not started within the time limit")  # what a load's end makes of its requests
# Student's t at 0.975 for 1 to 30 degrees of freedom; the normal's beyond.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
SIDES = ("off", "on")
FLAGS = {
    "off": ("--metrics.enabled", "false", "--store.enabled", "false", "--scaling-mode", "off"),
    "on": ("--compat-metrics", "vllm,otel", "--scaling-mode", "advise"),
}


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, a GGUF file or dummy:FOLDER (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    parser.add_argument("--pairs", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--pairs-per-start", type=int, default=0, help="start both servers anew after so many pairs (0: never)")
    parser.add_argument("--turns", type=int, default=6, help="of each side in a pair, an even number (%(default)s)")
    parser.add_argument("--turn-seconds", type=float, default=2.0, help="what is measured of a turn (%(default)s)")
    parser.add_argument("--pin", type=int, default=0, metavar="N", help="keep servers on the first N cores, engines on the next N, clients off both")
    parser.add_argument("--concurrency", type=int, default=8, help="streams of each side (%(default)s)")
    parser.add_argument("--per-stream", type=int, default=40, help="requests that a stream can send from a start on, more than it will (%(default)s)")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128, help="mean; between half of it and half more (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="client processes of each side (%(default)s)")
    parser.add_argument("--scrape-seconds", type=float, default=5.0, help="of turns between two scrapes of the side that is on (%(default)s)")
    parser.add_argument(
        "--idle-work-seconds", type=float, default=300.0, help="longest wait for an engine's idle work before the pairs (%(default)s)"
    )
    parser.add_argument("--limit", type=float, default=0.01, help="relative difference that an interval must stay within (%(default)s)")
    parser.add_argument("--state-dir", metavar="FOLDER", help="where the two state folders are made; kept (default: a temporary one)")
    parser.add_argument("--server-flags", default="", help="more flags for both servers")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    return parser.parse_args()


@dataclass(slots=True)
class Turns:
    """What was measured of one side in a pair: spans of CLOCK_MONOTONIC, and CPU seconds of server and engine in each."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    cpu: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """One side of a pair."""

    tokens_per_second: float
    tpot_p50_seconds: float
    server_cpu_per_token: float  # CPU seconds of the server process
    engine_cpu_per_token: float
    num_failed: int  # of the whole load
    turns: list[tuple[float, int, float, float]]  # of each: when it began, tokens, CPU seconds of server and engine


def server_flags(side: str, arguments: argparse.Namespace) -> list[str]:
    """The flags of one side's server."""
    tokens = arguments.concurrency * (arguments.input_len + 1.5 * arguments.output_len)
    common = ["--model", arguments.model, "--device", arguments.device, "--engine.block_size", str(BLOCK_SIZE)]
    return [*common, "--engine.num_blocks", str(math.ceil(tokens * 1.5 / BLOCK_SIZE) + 64), *FLAGS[side], *arguments.server_flags.split()]


@contextlib.contextmanager
def both(arguments: argparse.Namespace, folder: Path, order: Sequence[str]) -> Iterator[dict[str, PausedServer]]:
    """Both servers, ready and paused; ended with the block. They start one after the other: a load beside a load says nothing."""
    servers: dict[str, PausedServer] = {}
    try:
        for side in order:
            servers[side] = PausedServer(side, folder, server_flags(side, arguments), arguments.pin)
        yield servers
    finally:
        for server in servers.values():
            server.end()


def jobs_for(server: PausedServer, arguments: argparse.Namespace, seed: int, seconds: float) -> list[Job]:
    """A closed loop that lasts `seconds`."""
    with urllib.request.urlopen(server.url + "/v1/models", timeout=30) as reply:
        model = str(json.load(reply)["data"][0]["id"])
    lengths = Lengths.parse(str(arguments.input_len)), Lengths.parse(str(arguments.output_len), 0.5)
    job = Job(
        url=f"{server.url}/v1/completions",
        headers={},
        body=shared_body(model, False, 0.0, True, {}),
        chat=False,
        text_prompts=False,
        plans=[],
        concurrency=arguments.concurrency,
        seed=seed,
        min_token_id=1_000,
        max_token_id=8_000,
        prefix_tokens=0,
        timeout_seconds=3_600.0,
        limit_seconds=seconds,
    )
    return split_job(job, plan_requests(arguments.per_stream * arguments.concurrency, *lengths, seed), arguments.processes)


def scrape(server: PausedServer) -> None:
    """As Prometheus would."""
    request = urllib.request.Request(server.url + "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        reply.read()


async def take_turns(servers: Mapping[str, PausedServer], arguments: argparse.Namespace, num_pairs: int) -> list[dict[str, Turns]]:
    """Both sides' turns of each pair, while their loads run; every server is paused between them."""
    pairs: list[dict[str, Turns]] = [{side: Turns() for side in SIDES} for _ in range(num_pairs)]
    until_scrape = arguments.scrape_seconds / 2
    for pair in pairs:
        for number in range(arguments.turns):
            for side in _order(number):
                server, turns = servers[side], pair[side]
                server.resume()
                try:
                    await asyncio.sleep(EDGE_SECONDS)
                    started, before = time.monotonic(), server.cpu_seconds()
                    until_scrape -= arguments.turn_seconds * (side == "on")
                    if side == "on" and until_scrape <= 0:
                        until_scrape += arguments.scrape_seconds
                        await asyncio.to_thread(scrape, server)
                    await asyncio.sleep(max(0.0, started + arguments.turn_seconds - time.monotonic()))
                    ended, after = time.monotonic(), server.cpu_seconds()
                finally:
                    server.pause()
                turns.spans.append((started, ended))
                turns.cpu.append((after[0] - before[0], after[1] - before[1]))
    return pairs


async def run_pairs(servers: Mapping[str, PausedServer], arguments: argparse.Namespace, seed: int, num_pairs: int) -> list[dict[str, Run]]:
    """Load on both sides, their turns, and what came of them; with no pairs, what warms both."""
    seconds = CLIENT_SECONDS + 2 * WARM_SECONDS + num_pairs * 2 * arguments.turns * (arguments.turn_seconds + EDGE_SECONDS) * 1.02
    jobs = {}
    for side in SIDES:
        servers[side].resume()
        jobs[side] = jobs_for(servers[side], arguments, seed, seconds)
        servers[side].pause()
    loads = {side: asyncio.create_task(run_level(jobs[side], lambda _: None)) for side in SIDES}
    await asyncio.sleep(CLIENT_SECONDS)
    for side in SIDES:
        servers[side].resume()
        await asyncio.sleep(WARM_SECONDS)
        servers[side].pause()
    pairs = await take_turns(servers, arguments, num_pairs)
    for server in servers.values():  # let them take leave of what is cut short
        server.resume()
    outcomes = {side: (await loads[side])[0] for side in SIDES}
    await asyncio.sleep(1.0)
    for server in servers.values():
        server.pause()
    runs = {side: summarise(outcomes[side], [pair[side] for pair in pairs]) for side in SIDES}
    return [{side: runs[side][number] for side in SIDES} for number in range(num_pairs)]


def summarise(outcomes: Sequence[Outcome], pairs: Sequence[Turns]) -> list[Run]:
    """Tokens, gaps and CPU time within the turns of each pair. SystemExit if a load had nothing left to send."""
    if not any(outcome.error in CUT_SHORT and not outcome.first_at for outcome in outcomes):
        raise SystemExit("every request was sent before the turns were over: give more --per-stream")
    num_failed = sum(outcome.error is not None and outcome.error not in CUT_SHORT for outcome in outcomes)
    spans = np.array([span for turns in pairs for span in turns.spans]).reshape(-1, 2)
    num_turns = len(spans) // max(1, len(pairs))
    num_tokens = np.zeros(len(spans), dtype=np.int64)  # by turn
    tpots: list[list[float]] = [[] for _ in pairs]
    for outcome in outcomes if pairs else ():
        if not outcome.first_at:
            continue
        gaps = np.array(outcome.gaps)
        times = outcome.first_at + np.concatenate(([0.0], np.cumsum(gaps)))
        turn = np.searchsorted(spans[:, 0], times, side="right") - 1
        turn[(turn >= 0) & (times >= spans[turn, 1])] = -1
        within = (turn[1:] == turn[:-1]) & (turn[1:] >= 0)
        num_tokens += np.bincount(turn[turn >= 0], minlength=len(spans))
        for number in np.unique(turn[turn >= 0] // num_turns):
            mine = gaps[within & (turn[1:] // num_turns == number)]
            if len(mine) >= LEAST_GAPS:
                tpots[number].append(float(mine.mean()))
    runs = []
    for number, (turns, tpot) in enumerate(zip(pairs, tpots, strict=True)):
        by_turn = [int(count) for count in num_tokens[number * num_turns : (number + 1) * num_turns]]
        tokens = sum(by_turn)
        runs.append(
            Run(
                tokens_per_second=tokens / sum(ended - started for started, ended in turns.spans),
                tpot_p50_seconds=statistics.median(tpot),
                server_cpu_per_token=sum(server for server, _ in turns.cpu) / tokens,
                engine_cpu_per_token=sum(engine for _, engine in turns.cpu) / tokens,
                num_failed=num_failed,
                turns=[(span[0], count, *cpu) for span, count, cpu in zip(turns.spans, by_turn, turns.cpu, strict=True)],
            )
        )
    return runs


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % confidence interval."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    degrees = len(differences) - 1
    t = T_975[degrees - 1] if degrees <= len(T_975) else statistics.NormalDist().inv_cdf(0.975)
    half = t * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


FIGURES: tuple[tuple[str, Callable[[Run], float], float, str], ...] = (
    ("output tokens/s", lambda run: run.tokens_per_second, 1.0, "{:,.1f}"),
    ("TPOT p50, ms", lambda run: run.tpot_p50_seconds, 1e3, "{:.3f}"),
    ("CPU, server and engine, us/token", lambda run: run.server_cpu_per_token + run.engine_cpu_per_token, 1e6, "{:,.2f}"),
    ("server CPU, us/token", lambda run: run.server_cpu_per_token, 1e6, "{:.2f}"),
    ("engine CPU, us/token", lambda run: run.engine_cpu_per_token, 1e6, "{:.2f}"),
)
JUDGED = 3  # of the figures, those held to the limit; a token's CPU time is that of both processes, since both serve it


def report(pairs: Sequence[dict[str, Run]], limit: float) -> tuple[list[dict[str, Any]], bool]:
    """The table's rows as records, and whether every judged interval lies within the limit."""
    rows: list[dict[str, Any]] = []
    for index, (name, value_of, scale, form) in enumerate(FIGURES):
        mean, low, high = interval([value_of(pair["on"]) / value_of(pair["off"]) - 1 for pair in pairs])
        medians = {side: statistics.median(value_of(pair[side]) for pair in pairs) * scale for side in SIDES}
        within = -limit <= low and high <= limit if index < JUDGED else None
        rows.append({"figure": name, **medians, "form": form, "mean": mean, "low": low, "high": high, "within": within})
    share = [
        (pair["on"].server_cpu_per_token - pair["off"].server_cpu_per_token) / (pair["off"].server_cpu_per_token + pair["off"].engine_cpu_per_token)
        for pair in pairs
    ]  # without the engine's noise, which is many times the server's whole time on a CPU
    mean, low, high = interval(share)
    rows.append({"figure": "more server CPU, of a token's whole", "mean": mean, "low": low, "high": high, "within": None})
    return rows, all(row["within"] is not False for row in rows)


def describe(number: int, pair: Mapping[str, Run]) -> str:
    """A line of one pair."""
    on, off = pair["on"], pair["off"]
    cpu = [(run.server_cpu_per_token + run.engine_cpu_per_token) * 1e6 for run in (off, on)]
    return (
        f"pair {number:2d}: off {off.tokens_per_second:,.1f} tok/s, on {on.tokens_per_second:,.1f} "
        f"({on.tokens_per_second / off.tokens_per_second - 1:+.2%}); TPOT {on.tpot_p50_seconds / off.tpot_p50_seconds - 1:+.2%}; "
        f"CPU {cpu[0]:.2f} and {cpu[1]:.2f} us/token ({cpu[1] / cpu[0] - 1:+.2%}), "
        f"server {off.server_cpu_per_token * 1e6:.2f} and {on.server_cpu_per_token * 1e6:.2f}"
    )


def main() -> int:
    """Run the pairs and print what they say."""
    arguments = parse()
    os.sched_setaffinity(0, cores_for_clients(arguments.pin))  # this process and the clients it starts
    with contextlib.ExitStack() as stack:
        folder = Path(arguments.state_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        pairs: list[dict[str, Run]] = []
        while len(pairs) < arguments.pairs:
            first = len(pairs)
            last = min(first + arguments.pairs_per_start, arguments.pairs) if arguments.pairs_per_start else arguments.pairs
            order = _order(first // (arguments.pairs_per_start or 1))  # who comes second finds other memory
            with both(arguments, folder, order) as servers:
                asyncio.run(run_pairs(servers, arguments, 1_000_000 + first, 0))  # caches warm
                for side in order:  # and nothing left to do when idle: both sides run the same kernels from the first pair on
                    servers[side].settle(arguments.idle_work_seconds)
                for pair in asyncio.run(run_pairs(servers, arguments, first, last - first)):
                    pairs.append(pair)
                    print(describe(len(pairs), pair), flush=True)
    rows, within = report(pairs, arguments.limit)
    cells = [
        (
            row["figure"],
            *((row["form"].format(row[side]) for side in SIDES) if "form" in row else ("", "")),
            f"{row['mean']:+.2%}",
            f"{row['low']:+.2%} to {row['high']:+.2%}",
            {True: "yes", False: "NO", None: ""}[row["within"]],
        )
        for row in rows
    ]
    print(plain_table(["figure", "off (median)", "on (median)", "mean difference", "95 % interval", f"within {arguments.limit:.1%}"], cells))
    failed = max(run.num_failed for pair in pairs for run in pair.values())
    machine = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"
    print(f"{len(pairs)} pairs, at most {failed} failed requests of a load, {machine}")
    if arguments.json:
        runs = [{side: {name: getattr(run, name) for name in Run.__slots__} for side, run in pair.items()} for pair in pairs]
        Path(arguments.json).write_text(json.dumps({"options": vars(arguments), "rows": rows, "pairs": runs}, indent=2) + "\n")
    return 0 if within and not failed else 1


def _order(number: int) -> tuple[str, str]:
    return ("off", "on") if number % 2 == 0 else ("on", "off")


if __name__ == "__main__":
    sys.exit(main())
