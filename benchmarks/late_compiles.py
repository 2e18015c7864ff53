"""Kernels that Triton compiles while an engine serves: each stalls every stream for as long as it takes. There should be none.

    python benchmarks/late_compiles.py dummy:SHAPE [--idle-work] [--cache-dir FOLDER] [--json FILE]

Starts an engine with an empty kernel cache (or that of --cache-dir, as a server's state folder has it) and runs, without HTTP, loads that meet many
shapes of steps: one to 256 sequences at once, prompts of one token to 1,500, repeated prompts that the prefix cache answers, greedy and sampled
rows, with filters, penalties, bias and logprobs. Prints each late compilation with its kernel, constants and seconds, and the longest step; exit
status 1 if any.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from appliance.engine.engine import Engine
from appliance.engine.loading import build_engine
from appliance.engine.wire import Sampling, Start, Submit, pack_ids

COUNTS = (1, 2, 3, 5, 9, 17, 33, 40, 50, 65, 100, 129, 140, 200, 256)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.05},
    {"num_logprobs": 3},
    {"temperature": 0.8, "presence_penalty": 0.5, "num_logprobs": 7},
    {"temperature": 0.8, "repetition_penalty": 1.1, "top_p": 0.9},
    {"logit_bias": {5: 1.0}},
)


class _Silent:
    def enter(self, name: str, detail: str = "") -> None:
        pass

    def progress(self, share: float) -> None:
        pass


class Compilations:
    """What Triton compiles or reads from its cache on disk from now on."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self._began = 0.0
        triton.knobs.runtime.jit_cache_hook = self._begin
        triton.knobs.runtime.jit_post_compile_hook = self._end

    def _begin(self, **_: Any) -> bool:
        self._began = time.perf_counter()
        return False

    def _end(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        constants = {str(name): value for name, value in compile["constants"].items()}
        self.seen.append({"kernel": fn.name, "seconds": round(time.perf_counter() - self._began, 3), "constants": constants})
        print(self.seen[-1], flush=True)
        return False


def run(engine: Engine, rng: random.Random, prompts: list[list[int]], sampling: Sequence[dict[str, Any]]) -> float:
    """Sequences of which up to 40 come between two steps; the longest step, in seconds."""
    longest, waiting = 0.0, list(enumerate(prompts))
    while waiting or engine.has_work:
        count = rng.randint(1, 40)
        for index, prompt in waiting[:count]:
            options = {"temperature": 0.0, **sampling[index % len(sampling)]}
            wanted = Sampling(max_tokens=rng.randint(2, 12), seed=index, **options)
            engine.submit(Submit(sequence_id=index, prompt_ids=pack_ids(prompt), sampling=wanted))
        del waiting[:count]
        began = time.perf_counter()
        engine.step()
        longest = max(longest, time.perf_counter() - began)
    return longest


def main() -> int:
    """Runs the loads; the exit status says whether nothing was compiled late."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a GGUF file or dummy:FOLDER")
    parser.add_argument("--idle-work", action="store_true", help="capture all graphs first, as an idle engine does")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="keep compiled kernels there (default: a new folder)")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    began = time.perf_counter()
    cache = arguments.cache_dir or tempfile.mkdtemp()
    os.environ["TRITON_CACHE_DIR"], os.environ["APPLIANCE_CACHE_DIR"] = os.path.join(cache, "triton"), cache
    start = Start(model_path=arguments.model, cache_dir=cache, context_length=4096)
    engine, ready = build_engine(start, _Silent(), lambda _: None)
    print(f"{ready.device}: engine built in {time.perf_counter() - began:.1f} s, kernels in {cache}", flush=True)
    began = time.perf_counter()
    while arguments.idle_work and engine.runner.capture_next_graph(lambda: None):
        pass
    print(f"idle work: {time.perf_counter() - began:.1f} s", flush=True)
    compilations, rng = Compilations(), random.Random(0)
    repeated = [rng.randint(100, 9000) for _ in range(512)]
    loads: list[tuple[str, list[list[int]]]] = []
    for count in COUNTS:
        loads += [
            (f"{count} prompts of 1 to 1,500 tokens", [_prompt(rng, rng.choice((1, 3, 16, 50, 400, 1500))) for _ in range(count)]),
            (f"{count} prompts of 1 to 20 tokens", [_prompt(rng, rng.randint(1, 20)) for _ in range(count)]),
            (f"{count} times one prompt of 512", [repeated] * count),
        ]
    longest = {}
    for what, prompts in loads:
        for chosen in ([one] for one in SAMPLINGS) if len(prompts) < 10 else [SAMPLINGS[:1], SAMPLINGS[:2], SAMPLINGS[:6], SAMPLINGS]:
            longest[what] = max(longest.get(what, 0.0), run(engine, rng, prompts, chosen))
    slow = sorted(longest.items(), key=lambda item: -item[1])[:5]
    print(f"{len(compilations.seen)} kernels compiled late; longest steps: " + "; ".join(f"{what} {1e3 * seconds:.0f} ms" for what, seconds in slow))
    if arguments.json:
        record = {"device": ready.device, "late": compilations.seen, "longest_step_seconds": longest}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    return 1 if compilations.seen else 0


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randint(100, 9000) for _ in range(length)]


if __name__ == "__main__":
    sys.exit(main())
