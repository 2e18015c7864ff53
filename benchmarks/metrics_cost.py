"""What measuring costs: the same load on a server with everything on and on one with metrics and SQL off, in interleaved pairs.

    python benchmarks/metrics_cost.py --pairs-per-start 1                                    # the embedded model, on whatever is there
    python benchmarks/metrics_cost.py --model dummy:SHAPE --concurrency 128 --per-stream 4   # a GPU

Both servers are up beside each other, in state folders of their own that share the compiled kernels, with the same number of KV blocks;
the one that is not measured is stopped (SIGSTOP), so that its idle work costs the other nothing. Each pair runs the same prompts on both,
through `appliance bench`, in an order that changes; no two pairs share a prompt. On means metrics with both compatible
namespaces, SQL, the policy loop, and a scrape in OpenMetrics every few seconds; off is `metrics.enabled = store.enabled = false` and no
policy loop. The ledger and the engine's reports are part of both. A process keeps a speed of its own while it lives, by where its memory lies
(a percent either way on a CPU): --pairs-per-start says how often both are started anew.

For each figure: the mean of the pairs' relative differences (on - off) / off and its 95 % confidence interval (Student's t). Exit status 1 if an
interval does not lie within --limit. It needs a quiet machine; where there are cores enough, --pin keeps the processes off each other's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from appliance.bench.report import plain_table

START_SECONDS = 900.0
BLOCK_SIZE = 16
IDLE_CPU_SHARE = 0.03  # of a core: an engine at rest beats and polls
SETTLE_SECONDS = 1.5  # after SIGCONT: the supervisor excuses the pause, timers that are due run
# Student's t at 0.975 for 1 to 30 degrees of freedom; the normal's beyond.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
SIDES = ("off", "on")
ALL_CORES = sorted(os.sched_getaffinity(0))
FLAGS = {
    "off": ("--metrics.enabled", "false", "--store.enabled", "false", "--scaling-mode", "off"),
    "on": ("--compat-metrics", "vllm,otel", "--scaling-mode", "advise"),
}


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, a GGUF file or dummy:FOLDER (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    parser.add_argument("--pairs", type=int, default=20, help="runs of each side (%(default)s)")
    parser.add_argument("--pairs-per-start", type=int, default=0, help="start both servers anew after so many pairs (0: never)")
    parser.add_argument("--pin", type=int, default=0, metavar="N", help="keep servers on the first N cores, engines on the next N, clients off both")
    parser.add_argument("--concurrency", type=int, default=8, help="streams (%(default)s)")
    parser.add_argument("--per-stream", type=int, default=2, help="requests of a stream in a run (%(default)s)")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--processes", type=int, default=1, help="client processes (%(default)s)")
    parser.add_argument("--scrape-seconds", type=float, default=5.0, help="period of the scrapes of the side that is on (%(default)s)")
    parser.add_argument(
        "--idle-work-seconds", type=float, default=300.0, help="longest wait for an engine's idle work before the pairs (%(default)s)"
    )
    parser.add_argument("--limit", type=float, default=0.01, help="relative difference that an interval must stay within (%(default)s)")
    parser.add_argument("--state-dir", metavar="FOLDER", help="where the two state folders are made; kept (default: a temporary one)")
    parser.add_argument("--server-flags", default="", help="more flags for both servers")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Run:
    """One side's turn of a pair."""

    tokens_per_second: float
    tpot_p50_seconds: float
    server_cpu_per_token: float  # CPU seconds of the server process
    engine_cpu_per_token: float
    num_failed: int


class Server:
    """One of the two. Stopped unless it is its turn."""

    def __init__(self, side: str, arguments: argparse.Namespace, folder: Path) -> None:
        self.side = side
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        tokens = arguments.concurrency * (arguments.input_len + arguments.output_len)
        command = [sys.executable, "-m", "appliance.cli", "serve", "--model", arguments.model, "--device", arguments.device, "--port", str(port)]
        cache = folder / "cache"  # compiled kernels and calibrations of both: they run the same
        cache.mkdir(parents=True, exist_ok=True)
        (folder / side).mkdir(exist_ok=True)
        if not (folder / side / "cache").exists():
            (folder / side / "cache").symlink_to(cache.resolve())
        command += ["--state-dir", str(folder / side), "--log-level", "warning", "--engine.block_size", str(BLOCK_SIZE)]
        command += ["--engine.num_blocks", str(math.ceil(tokens * 1.5 / BLOCK_SIZE) + 64), *FLAGS[side], *arguments.server_flags.split()]
        self.log = (folder / f"{side}.log").open("w+b")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, preexec_fn=lambda: os.sched_setaffinity(0, ALL_CORES))

    def wait_ready(self) -> None:
        """Return once it serves. SystemExit with its log if it does not."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + "/ready", timeout=5).close()
                return
            time.sleep(0.2)
        self.log.seek(0)
        raise SystemExit(f"the server with measuring {self.side} did not start:\n{self.log.read().decode(errors='replace')[-2000:]}")

    def pin(self, num_cores: int) -> None:
        """Keep the server and its engine each to `num_cores` cores of their own, with every thread they have and will have."""
        for index, process in enumerate(self._processes()[:2]):
            cores = ALL_CORES[index * num_cores : (index + 1) * num_cores]
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cores)

    def pause(self) -> None:
        """Stop it where it is, the server before its engine, so that it cannot take a stopped engine for a hung one."""
        for process in self._processes():
            process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again, and settle."""
        for process in reversed(self._processes()):
            process.send_signal(signal.SIGCONT)
        time.sleep(SETTLE_SECONDS)
        self.wait_ready()

    def settle(self, seconds: float) -> None:
        """Run until its engine has no idle work left (kernels to compile, forms to calibrate, graphs to capture), for so long at most, then pause."""
        self.resume()
        deadline, used, num_quiet = time.monotonic() + seconds, math.inf, 0
        while num_quiet < 2 and time.monotonic() < deadline:
            before = self.cpu_seconds()[1]
            time.sleep(3.0)
            used = (self.cpu_seconds()[1] - before) / 3.0
            num_quiet = num_quiet + 1 if 0.0 <= used <= IDLE_CPU_SHARE else 0  # it falls when a compiler that it ran has ended
        if num_quiet < 2:
            print(f"the engine with measuring {self.side} is not at rest after {seconds:.0f} s: {used:.0%} of a core", flush=True)
        self.pause()

    def cpu_seconds(self) -> tuple[float, float]:
        """User and system time so far: of the server, and of its engine."""
        server, *engines = (sum(process.cpu_times()[:2]) for process in self._processes())
        return server, sum(engines)

    def end(self) -> None:
        """Drain and leave; killed if it does not."""
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def _processes(self) -> list[psutil.Process]:
        try:
            server = psutil.Process(self.process.pid)
            return [server, *server.children(recursive=True)]
        except psutil.Error:
            return []


@contextlib.contextmanager
def both(arguments: argparse.Namespace, folder: Path, order: Sequence[str]) -> Iterator[dict[str, Server]]:
    """Both servers, ready and paused; ended with the block. They start one after the other: a load beside a load says nothing."""
    servers: dict[str, Server] = {}
    try:
        for side in order:
            servers[side] = Server(side, arguments, folder)
            servers[side].wait_ready()
            if arguments.pin:
                servers[side].pin(arguments.pin)
            servers[side].pause()
        yield servers
    finally:
        for server in servers.values():
            server.end()


@contextlib.contextmanager
def scraped(server: Server, seconds: float) -> Iterator[None]:
    """Scrape as Prometheus would, while the block runs."""
    done = threading.Event()

    def scrape() -> None:
        request = urllib.request.Request(server.url + "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
        while not done.wait(seconds):
            with urllib.request.urlopen(request, timeout=30) as reply:
                reply.read()

    thread = threading.Thread(target=scrape)
    if server.side == "on":
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.is_alive():
            thread.join()


def measure(server: Server, arguments: argparse.Namespace, seed: int, per_stream: int) -> Run:
    """One run of the load generator against the server, which is resumed for it and paused after it."""
    server.resume()
    try:
        with tempfile.NamedTemporaryFile(suffix=".json") as file, scraped(server, arguments.scrape_seconds):
            command = [sys.executable, "-m", "appliance.bench", "--base-url", server.url, "--no-ceiling", "--quiet", "--json", file.name]
            command += ["--concurrency", str(arguments.concurrency), "--num-requests", str(per_stream * arguments.concurrency)]
            command += ["--input-len", str(arguments.input_len), "--output-len", str(arguments.output_len), "--seed", str(seed)]
            command += ["--processes", str(arguments.processes), "--max-seconds", "1800", "--timeout", "1800"]
            before = server.cpu_seconds()
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
            after = server.cpu_seconds()
            if done.returncode not in (0, 1) or not Path(file.name).stat().st_size:
                raise SystemExit(done.stdout.decode(errors="replace"))
            level = json.loads(Path(file.name).read_text())["levels"][0]
    finally:
        server.pause()
    num_tokens = level["num_output_tokens"] or 1
    return Run(
        tokens_per_second=level["output_tokens_per_second"],
        tpot_p50_seconds=level["tpot"]["p50"],
        server_cpu_per_token=(after[0] - before[0]) / num_tokens,
        engine_cpu_per_token=(after[1] - before[1]) / num_tokens,
        num_failed=level["num_failed"],
    )


def measure_pair(servers: Mapping[str, Server], arguments: argparse.Namespace, number: int) -> dict[str, Run]:
    """One run of each side, and a line of it."""
    pair = {side: measure(servers[side], arguments, seed=number, per_stream=arguments.per_stream) for side in _order(number // 2)}
    on, off = pair["on"], pair["off"]
    cpu = [(run.server_cpu_per_token + run.engine_cpu_per_token) * 1e6 for run in (off, on)]
    print(
        f"pair {number + 1:2d}: off {off.tokens_per_second:,.1f} tok/s, on {on.tokens_per_second:,.1f} "
        f"({on.tokens_per_second / off.tokens_per_second - 1:+.2%}); CPU {cpu[0]:.2f} and {cpu[1]:.2f} us/token ({cpu[1] / cpu[0] - 1:+.2%})",
        flush=True,
    )
    return pair


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


def main() -> int:
    """Run the pairs and print what they say."""
    arguments = parse()
    if arguments.pin:  # this process and the clients it starts
        os.sched_setaffinity(0, ALL_CORES[2 * arguments.pin :] or ALL_CORES[: arguments.pin])
    with contextlib.ExitStack() as stack:
        folder = Path(arguments.state_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        pairs: list[dict[str, Run]] = []
        while len(pairs) < arguments.pairs:
            first = len(pairs)
            last = min(first + arguments.pairs_per_start, arguments.pairs) if arguments.pairs_per_start else arguments.pairs
            order = _order(first // (arguments.pairs_per_start or 1))  # of the starts too: who comes second finds other memory
            with both(arguments, folder, order) as servers:
                for side in order:  # caches warm, and nothing left to do when idle: both sides run the same kernels from the first pair on
                    measure(servers[side], arguments, seed=1_000_000 + first, per_stream=max(1, arguments.per_stream // 2))
                    servers[side].settle(arguments.idle_work_seconds)
                pairs += [measure_pair(servers, arguments, number) for number in range(first, last)]
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
    failed = sum(run.num_failed for pair in pairs for run in pair.values())
    print(f"{len(pairs)} pairs, {failed} failed requests, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    if arguments.json:
        runs = [{side: {name: getattr(run, name) for name in Run.__slots__} for side, run in pair.items()} for pair in pairs]
        Path(arguments.json).write_text(json.dumps({"options": vars(arguments), "rows": rows, "pairs": runs}, indent=2) + "\n")
    return 0 if within and not failed else 1


def _order(number: int) -> tuple[str, str]:
    return ("off", "on") if number % 2 == 0 else ("on", "off")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
