"""Our server against transformers' `generate`, on the same GGUF, the same requests and the same cores, in one run.

Ours answers through HTTP at each level of concurrency; transformers takes the requests one after another, in bfloat16 and in float32, and the
faster of the two counts. Greedy, ignore_eos, random token ids as prompts. Each side runs alone: its processes have ended before the other starts.
It needs a quiet machine: torch's threads wait for each other at every operator, and lose most of their speed beside other work.

    python benchmarks/vs_transformers.py [--model FILE.gguf] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appliance.bench.records import Job
from appliance.bench.workload import Lengths, plan_requests, request_body, shared_body
from appliance.model_files import resolve_model
from appliance.settings import default_state_dir

MIN_TOKEN_ID, MAX_TOKEN_ID = 100, 30_000


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="GGUF file or Hugging Face folder (%(default)s)")
    parser.add_argument("--concurrency", default="1,4,8", help="levels (%(default)s)")
    parser.add_argument("--num-requests", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of transformers (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each side (%(default)s)")
    parser.add_argument("--device", default="cpu", help="of both sides (%(default)s)")
    parser.add_argument("--server-flags", default="", help="more flags for `appliance serve`")
    parser.add_argument("--limit-seconds", type=float, default=120.0, help="start no further request of transformers after that (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--generate", metavar="DTYPE", help=argparse.SUPPRESS)  # this script's own child process
    return parser.parse_args()


def prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """The very prompts that `appliance bench --seed 0` sends."""
    job = Job(
        url="", headers={}, body=shared_body("", False, 0.0, True, {}), chat=False, text_prompts=False, plans=[], concurrency=1, seed=0,
        min_token_id=MIN_TOKEN_ID, max_token_id=MAX_TOKEN_ID, prefix_tokens=0, timeout_seconds=1.0, limit_seconds=1.0,
    )  # fmt: skip
    lengths = Lengths(arguments.input_len, arguments.input_len), Lengths(arguments.output_len, arguments.output_len)
    return [json.loads(request_body(job, plan))["prompt"] for plan in plan_requests(arguments.num_requests, *lengths, 0)]


@contextlib.contextmanager
def server(arguments: argparse.Namespace, model: str) -> Iterator[str]:
    """The base URL of our server, ready, with a state folder of its own; drained and gone at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="vs-transformers-") as state:
        command = [sys.executable, "-m", "appliance.cli", "serve", "--model", model, "--port", "0", "--state-dir", state]
        command += ["--device", arguments.device, "--num-threads", str(arguments.threads), "--scaling-mode", "off", "--log-level", "warning"]
        command += arguments.server_flags.split()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = ""
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("API"):
                    url = line.split()[1].removesuffix("/v1")
                    break
            if not url:
                raise SystemExit("the server did not start")
            wait_ready(url, process)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_ready(url: str, process: subprocess.Popen[str], seconds: float = 300.0) -> None:
    """Until /ready answers 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server left with status {process.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready within {seconds:g} s")


def measure_ours(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """The report of `appliance bench` over all levels."""
    with server(arguments, model) as url, tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "appliance.bench", "--base-url", url, "--concurrency", arguments.concurrency, "--json", file.name]
        command += ["--num-requests", str(arguments.num_requests), "--input-len", str(arguments.input_len), "--output-len", str(arguments.output_len)]
        command += ["--token-ids", f"{MIN_TOKEN_ID}:{MAX_TOKEN_ID}"]
        subprocess.run(command, check=True)
        report: dict[str, Any] = json.loads(Path(file.name).read_text())
        return report


def measure_transformers(arguments: argparse.Namespace, dtype: str) -> dict[str, float]:
    """Tokens a second of `generate` in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, *sys.argv, "--generate", dtype, "--json", file.name]
        subprocess.run(command, check=True, env=os.environ | {"TQDM_DISABLE": "1"})
        result: dict[str, float] = json.loads(Path(file.name).read_text())
        return result


def generate(arguments: argparse.Namespace, model_path: str, dtype: str) -> dict[str, float]:
    """Serve every prompt with transformers, one after another; what a user of the library would write."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    torch.set_num_threads(arguments.threads)
    path = Path(model_path)
    where = (
        {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        if path.is_file()
        else {"pretrained_model_name_or_path": str(path)}
    )
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype)).to(arguments.device).eval()
    limits = {"do_sample": False, "pad_token_id": 0}

    def one(prompt: list[int]) -> int:
        ids = torch.tensor([prompt], device=arguments.device)
        with torch.inference_mode():
            return int(model.generate(ids, attention_mask=torch.ones_like(ids), **limits).shape[1]) - len(prompt)

    work = prompts(arguments)
    limits |= {"min_new_tokens": 4, "max_new_tokens": 4}
    one(work[-1])  # warm-up, as the other side gets one
    limits |= {"min_new_tokens": arguments.output_len, "max_new_tokens": arguments.output_len}
    started = time.monotonic()
    num_tokens = num_requests = 0
    for prompt in work:  # all alike, so a rate over fewer of them is the same rate
        num_tokens += one(prompt)
        num_requests += 1
        seconds = time.monotonic() - started
        if seconds > arguments.limit_seconds:
            break
    return {"requests": num_requests, "output_tokens": num_tokens, "seconds": seconds, "tokens_per_second": num_tokens / seconds}


def main() -> int:
    """Measure both sides, print the ratios, write JSON."""
    arguments = parse()
    model = resolve_model(arguments.model, default_state_dir(), lambda *_: None)
    if arguments.generate:
        Path(arguments.json).write_text(json.dumps(generate(arguments, model, arguments.generate)))
        return 0
    theirs = {dtype: measure_transformers(arguments, dtype) for dtype in arguments.dtypes.split(",")}
    ours = measure_ours(arguments, model)
    fastest = max(result["tokens_per_second"] for result in theirs.values())
    for dtype, result in theirs.items():
        print(f"transformers generate, {dtype}: {result['tokens_per_second']:.1f} tokens/s")
    ratios = {}
    for level in ours["levels"]:
        ratios[level["label"]] = ratio = level["output_tokens_per_second"] / fastest
        print(f"appliance, {level['label']}: {level['output_tokens_per_second']:.1f} tokens/s, {ratio:.2f} x the faster of them")
    if arguments.json:
        record = {"machine": machine(), "model": model.rpartition("/")[2], "transformers": theirs, "appliance": ours, "ratios": ratios}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    return 1 if any(level["num_failed"] for level in ours["levels"]) else 0


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    from importlib import metadata

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


if __name__ == "__main__":
    sys.exit(main())
