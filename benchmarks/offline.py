"""Offline throughput of the engine alone: 256 sequences of random lengths in and out, no server. One JSON line a repetition.

The work is nano-vllm's: prompts and outputs of 100 to 1,024 tokens, seed 0, ignore_eos, temperature 0.6. With --profile the host's time in each
part of a step is printed too. `--prompt-len N` runs one prompt of N tokens and one output token instead (prefill time).
Usage: python benchmarks/offline.py MODEL (a folder, a GGUF file or dummy:FOLDER)
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from typing import Any

from appliance.engine.engine import Engine
from appliance.engine.loading import build_engine
from appliance.engine.wire import Sampling, Start, StepOutput, Submit, pack_ids, unpack_ids


class _Silent:
    """Takes the phases of a load."""

    def enter(self, name: str, detail: str = "") -> None:
        pass

    def progress(self, share: float) -> None:
        pass


def main() -> None:
    """Load, warm up, run."""
    options = _options()
    fixed: dict[str, Any] = {name: getattr(options, name) for name in ("max_num_seqs", "max_num_batched_tokens", "num_blocks")}
    start = Start(
        model_path=options.model,
        cache_dir=options.cache_dir or tempfile.mkdtemp(),
        context_length=options.context_length,
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        cuda_graphs=not options.eager,
        prefix_caching=False,
        itl_target_seconds=options.itl_target,
        **fixed,
    )
    began = time.monotonic()
    engine, ready = build_engine(start, _Silent(), lambda _: None)
    while engine.runner.capture_next_graph(lambda: None):
        pass
    facts = {"model": options.model.split("/")[-1], "device": ready.device, "dtype": ready.dtype, "quantization": ready.quantization}
    print(json.dumps(facts | {"start_seconds": round(time.monotonic() - began, 2), "reasons": ready.reasons}), flush=True)
    for length in options.prompt_len:
        for _ in range(3):
            seconds, _ = _run(engine, [_prompt(random.Random(length), length)], [1], options.temperature)
            print(json.dumps(facts | {"prompt_tokens": length, "seconds": round(seconds, 4), "tok_s": round(length / seconds)}), flush=True)
    if options.prompt_len:
        return
    rng = random.Random(0)
    prompts = [_prompt(rng, rng.randint(options.in_min, options.in_max)) for _ in range(options.num_seqs)]
    outputs = [rng.randint(options.out_min, options.out_max) for _ in range(options.num_seqs)]
    for _ in range(options.repeat):
        seconds, steps = _run(engine, prompts, outputs, options.temperature)
        result = {"prompt_tokens": sum(map(len, prompts)), "output_tokens": sum(outputs), "seconds": round(seconds, 3)}
        print(json.dumps(facts | result | {"tok_s": round(sum(outputs) / seconds, 1)} | _step_times(steps)), flush=True)
        for prompt in prompts:
            prompt[0] = (prompt[0] + 7) % 10000


def _run(engine: Engine, prompts: list[list[int]], outputs: list[int], temperature: float) -> tuple[float, list[StepOutput]]:
    began = time.monotonic()
    for index, (prompt, num) in enumerate(zip(prompts, outputs, strict=True)):
        sampling = Sampling(max_tokens=num, seed=index, temperature=temperature)
        rejected = engine.submit(Submit(sequence_id=index, prompt_ids=pack_ids(prompt), sampling=sampling, queued_at=began))
        if rejected is not None:
            raise SystemExit(rejected.message)
    steps, received = [], [0] * len(prompts)
    while engine.has_work:
        output = engine.step()
        if output is not None:
            steps.append(output)
            for sequence_id in unpack_ids(output.sequence_ids):
                received[sequence_id] += 1
    seconds = time.monotonic() - began
    assert received == outputs, "a sequence got another number of tokens than it asked for"
    return seconds, steps


def _step_times(steps: list[StepOutput]) -> dict[str, Any]:
    """Host milliseconds of a step by part, and what kinds of steps there were."""
    stats = [step.stats for step in steps if step.stats.num_sequences]
    decode = [s for s in stats if not s.num_prefill_tokens]
    parts = ("schedule_seconds", "launch_seconds", "wait_seconds", "output_seconds")
    table = {part.removesuffix("_seconds"): round(1e3 * statistics.median(getattr(s, part) for s in decode or stats), 3) for part in parts}
    return {
        "steps": len(stats),
        "mixed_steps": len(stats) - len(decode),
        "graph_hits": sum(s.graph_hit for s in stats),
        "preemptions": sum(s.num_preemptions for s in stats),
        "decode_step_ms_p50": table,
    }


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randint(0, 10000) for _ in range(length)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--context-length", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--num-blocks", type=int)
    parser.add_argument("--itl-target", type=float)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--cache-dir")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--num-seqs", type=int, default=256)
    for name, value in (("in-min", 100), ("in-max", 1024), ("out-min", 100), ("out-max", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--prompt-len", type=int, nargs="*", default=[])
    return parser.parse_args()


if __name__ == "__main__":
    main()
