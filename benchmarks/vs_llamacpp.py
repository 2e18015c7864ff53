"""Our server against llama.cpp's, on the same GGUF, the same prompts and the same cores, in turn, all through HTTP with `appliance bench`.

    python benchmarks/vs_llamacpp.py --llama-server /path/to/llama-server [--rounds 3] [--json FILE]
    python benchmarks/vs_llamacpp.py --llama-python /path/to/venv/bin/python      # with llama-cpp-python[server] in it

llama-server runs with continuous batching over as many slots as the highest level has streams; llama-cpp-python's server answers one request at a
time. Greedy, ignore_eos, random token ids as prompts, other ones at every level, so that no prefix is cached. Decode is 1 / TPOT p50; prefill is the
prompt's tokens over the TTFT p50 of one stream. Each side runs alone; with several rounds they alternate, and medians count. Memory is the PSS of a
server's processes after its levels, with the KV cache written to its end. `first token` counts from the start of the process; cold is the first
start in an empty state folder, before the kernels are compiled. transformers' `generate` in bfloat16 runs last, one request after another.
It needs a quiet machine: both engines' threads wait for each other in every layer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from vs_transformers import machine

from appliance.bench.report import plain_table
from appliance.model_files import resolve_model
from appliance.settings import default_state_dir

BENCHMARKS = Path(__file__).parent
KV_TOKENS = 16_384
BLOCK_SIZE = 16
START_SECONDS = 300.0
COMPILE_SECONDS = 180.0


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peer = parser.add_mutually_exclusive_group(required=True)
    peer.add_argument("--llama-server", metavar="FILE", help="llama.cpp's llama-server")
    peer.add_argument("--llama-python", metavar="FILE", help="a Python that has llama-cpp-python[server]")
    parser.add_argument("--model", default="embedded", help="GGUF file (%(default)s)")
    parser.add_argument("--concurrency", default="1,4,8", help="levels (%(default)s)")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--prefill-len", type=int, default=512, help="tokens of the prefill's prompts (%(default)s)")
    parser.add_argument("--per-stream", type=int, default=4, help="requests of a stream, at least 8 a level (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each side (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="compute threads of each side (%(default)s)")
    parser.add_argument("--state-dir", metavar="FOLDER", help="our state folder, whose compiled kernels are used (default: a new one)")
    parser.add_argument("--server-flags", default="", help="more flags for `appliance serve`")
    parser.add_argument("--llama-flags", default="", help="more flags for llama.cpp's server")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out (it takes a minute or two)")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Contender:
    """A server to be measured: how it starts, and what its requests carry beside the prompt."""

    name: str
    command: tuple[str, ...]
    port: int
    ready_path: str
    extra_body: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def contenders(arguments: argparse.Namespace, model: str, state: str) -> tuple[Contender, Contender]:
    """Ours and theirs, with the same threads, cores and KV tokens."""
    threads, port, peer_port = str(arguments.threads), free_port(), free_port()
    ours = [sys.executable, "-m", "appliance.cli", "serve", "--model", model, "--port", str(port), "--state-dir", state]
    ours += ["--device", "cpu", "--num-threads", threads, "--scaling-mode", "off", "--log-level", "warning"]
    ours += ["--set", f"engine.num_blocks={KV_TOKENS // BLOCK_SIZE}", "--set", f"engine.block_size={BLOCK_SIZE}", *arguments.server_flags.split()]
    mine = Contender("appliance", tuple(ours), port, "/ready", "{}")
    flags = arguments.llama_flags.split()
    if arguments.llama_server:
        slots = max(levels(arguments))
        theirs = [arguments.llama_server, "-m", model, "--host", "127.0.0.1", "--port", str(peer_port), "-t", threads]
        theirs += ["--parallel", str(slots), "-c", str(KV_TOKENS), *flags]
        return mine, Contender("llama.cpp", tuple(theirs), peer_port, "/health", '{"cache_prompt": false}')
    theirs = [arguments.llama_python, "-m", "llama_cpp.server", "--model", model, "--host", "127.0.0.1", "--port", str(peer_port)]
    theirs += ["--n_threads", threads, "--n_ctx", str(KV_TOKENS), *flags]
    return mine, Contender("llama-cpp-python", tuple(theirs), peer_port, "/v1/models", "{}")


def levels(arguments: argparse.Namespace) -> list[int]:
    """Streams of each level."""
    return [int(count) for count in arguments.concurrency.split(",")]


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(contender: Contender) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """The started process and its seconds to the first token; ended with SIGTERM at the end of the block."""
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(contender.command, stdout=log, stderr=subprocess.STDOUT)
        try:
            if not wait_for(lambda: status(contender.url + contender.ready_path) == 200 or process.poll() is not None, START_SECONDS, 0.02):
                raise SystemExit(f"{contender.name} was not ready within {START_SECONDS:g} s")
            if process.poll() is not None:
                log.seek(0)
                raise SystemExit(f"{contender.name} left with status {process.returncode}:\n{log.read().decode(errors='replace')[-2000:]}")
            first_token(contender)
            yield process, time.monotonic() - started
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(found: Callable[[], bool], seconds: float, pause: float) -> bool:
    """Whether `found` came true within that time."""
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def status(url: str) -> int:
    """The HTTP status of a GET; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def first_token(contender: Contender) -> None:
    """Returns when a streamed completion of a short prompt has sent its first event."""
    body = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0, "stream": True, "model": model_name(contender)}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{contender.url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        for line in reply:
            if line.startswith(b"data:"):
                return
    raise SystemExit(f"{contender.name} streamed nothing")


def model_name(contender: Contender) -> str:
    """What the server calls its model."""
    with urllib.request.urlopen(f"{contender.url}/v1/models", timeout=30) as reply:
        return str(json.load(reply)["data"][0]["id"])


def wait_compiled(process: subprocess.Popen[bytes]) -> None:
    """Returns when the process has no compiler among its descendants any more, nor had for a second."""

    def is_quiet() -> bool:
        names = [child.name() for child in psutil.Process(process.pid).children(recursive=True)]
        return not any(name.startswith(("g++", "c++", "cc1plus", "as", "ld", "collect2")) for name in names)

    wait_for(lambda: is_quiet() and not time.sleep(1.0) and is_quiet(), COMPILE_SECONDS, 0.5)


def pss_bytes(process: subprocess.Popen[bytes]) -> int:
    """Proportional set size of the process and all its descendants."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(int(member.memory_full_info().pss) for member in family)


def bench(contender: Contender, concurrency: int, num_requests: int, input_len: int, output_len: int, seed: int) -> dict[str, Any]:
    """One level's report by `appliance bench`. Leaves with its errors where a request failed."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "appliance.bench", "--base-url", contender.url, "--concurrency", str(concurrency), "--quiet"]
        command += ["--num-requests", str(num_requests), "--input-len", str(input_len), "--output-len", str(output_len), "--seed", str(seed)]
        command += ["--extra-body", contender.extra_body, "--no-ceiling", "--no-keep-alive", "--json", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{contender.name}, c={concurrency}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        level: dict[str, Any] = json.loads(Path(file.name).read_text())["levels"][0]
        return level


def measure(contender: Contender, arguments: argparse.Namespace, turn: int) -> dict[str, float]:
    """One turn of one side: figures by name."""
    figures: dict[str, float] = {}
    with running(contender) as (process, first_token_seconds):
        figures["first_token_seconds"] = first_token_seconds
        wait_compiled(process)
        prefill = bench(contender, 1, 8, arguments.prefill_len, 1, 1000 * turn)
        figures["prefill_tokens_per_second"] = arguments.prefill_len / prefill["ttft"]["p50"]
        figures["prefill_ttft_seconds"] = prefill["ttft"]["p50"]
        for index, count in enumerate(levels(arguments), 1):
            level = bench(contender, count, max(8, arguments.per_stream * count), arguments.input_len, arguments.output_len, 1000 * turn + index)
            figures[f"c{count}_tokens_per_second"] = level["output_tokens_per_second"]
            figures[f"c{count}_ttft_seconds"] = level["ttft"]["p50"]
            figures[f"c{count}_tpot_seconds"] = level["tpot"]["p50"]
            figures[f"c{count}_decode_tokens_per_second"] = 1 / level["tpot"]["p50"]
        figures["pss_bytes"] = pss_bytes(process)
    return figures


def generate(arguments: argparse.Namespace, model: str) -> float:
    """transformers' tokens a second in bfloat16, in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, str(BENCHMARKS / "vs_transformers.py"), "--generate", "bfloat16", "--model", model, "--json", file.name]
        command += ["--input-len", str(arguments.input_len), "--output-len", str(arguments.output_len), "--threads", str(arguments.threads)]
        subprocess.run(command, check=True, env=os.environ | {"TQDM_DISABLE": "1"})
        return float(json.loads(Path(file.name).read_text())["tokens_per_second"])


def medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each figure over the turns."""
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


def compare(arguments: argparse.Namespace, ours: dict[str, float], theirs: dict[str, float], generated: float | None) -> dict[str, float]:
    """The ratios that the figures are judged by: ours over theirs."""
    counts = levels(arguments)
    ratios = {"decode, c=1": ours["c1_decode_tokens_per_second"] / theirs["c1_decode_tokens_per_second"]} if 1 in counts else {}
    for count in counts:
        ratios[f"tokens/s, c={count}"] = ours[f"c{count}_tokens_per_second"] / theirs[f"c{count}_tokens_per_second"]
        ratios[f"TTFT p50, c={count}"] = ours[f"c{count}_ttft_seconds"] / theirs[f"c{count}_ttft_seconds"]
    ratios[f"prefill of {arguments.prefill_len}"] = ours["prefill_tokens_per_second"] / theirs["prefill_tokens_per_second"]
    ratios["memory (PSS)"] = ours["pss_bytes"] / theirs["pss_bytes"]
    ratios["first token after start"] = ours["first_token_seconds"] / theirs["first_token_seconds"]
    if generated is not None:
        ratios[f"tokens/s, c={counts[-1]}, against transformers generate"] = ours[f"c{counts[-1]}_tokens_per_second"] / generated
    return ratios


def rows(arguments: argparse.Namespace, figures: dict[str, float]) -> list[str]:
    """One side's column of the table."""
    cells = [f"{figures['first_token_seconds']:.2f}", f"{figures['prefill_tokens_per_second']:,.0f} ({figures['prefill_ttft_seconds'] * 1e3:,.0f})"]
    for count in levels(arguments):
        rate, ttft, tpot = (figures[f"c{count}_{name}"] for name in ("tokens_per_second", "ttft_seconds", "tpot_seconds"))
        cells.append(f"{rate:,.1f}; {ttft * 1e3:,.0f}; {tpot * 1e3:,.2f}")
    return [*cells, f"{figures['pss_bytes'] / 1e6:,.0f}"]


def main() -> int:
    """Measures both sides in turn and prints table and ratios."""
    arguments = parse()
    model = resolve_model(arguments.model, default_state_dir(), lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="vs-llamacpp-") as temporary:
        ours, theirs = contenders(arguments, model, arguments.state_dir or temporary)
        with running(ours) as (process, cold_seconds):
            wait_compiled(process)
        turns: dict[str, list[dict[str, float]]] = {ours.name: [], theirs.name: []}
        for turn in range(arguments.rounds):
            for contender in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
                turns[contender.name].append(measure(contender, arguments, turn))
                print(f"round {turn + 1}, {contender.name}: done", file=sys.stderr)
    generated = None if arguments.no_transformers else generate(arguments, model)
    mine, peer = medians(turns[ours.name]), medians(turns[theirs.name])
    ratios = compare(arguments, mine, peer, generated)
    names = ["first token after start, s", f"prefill of {arguments.prefill_len}, tokens/s (TTFT p50, ms)"]
    names += [f"c={count}: tokens/s; TTFT p50, ms; TPOT p50, ms" for count in levels(arguments)]
    table = list(zip([*names, "memory, PSS, MB"], rows(arguments, mine), rows(arguments, peer), strict=True))
    print(f"{Path(model).name}, {arguments.input_len} in, {arguments.output_len} out, {arguments.threads} threads, {arguments.rounds} rounds")
    print(plain_table(("", ours.name, theirs.name), table))
    print(f"first token after the first start (kernels not compiled yet): {cold_seconds:.2f} s")
    if generated is not None:
        print(f"transformers generate, bfloat16, one after another: {generated:.1f} tokens/s")
    print(plain_table(("ratio, ours / theirs", ""), [(name, f"{ratio:.2f}x") for name, ratio in ratios.items()]))
    if arguments.json:
        record = {"machine": machine(), "arguments": vars(arguments), "turns": turns, "cold_first_token_seconds": cold_seconds}
        record |= {"transformers_tokens_per_second": generated, "ratios": ratios}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
