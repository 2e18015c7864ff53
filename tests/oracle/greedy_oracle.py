"""Greedy tokens of the engine against transformers' on the same GGUF file in float32, however the engine schedules them.

Run as a script it checks a device: python tests/oracle/greedy_oracle.py MODEL.gguf [--device cuda]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from appliance.engine.engine import Engine
from appliance.engine.loading import build_engine
from appliance.engine.wire import Sampling, Start, Submit, pack_ids, unpack_ids

NEAR_TIE = 1e-4  # logits closer than this may fall either way in another order of summation
PREFIX = (
    "The following is a collection of short texts. Each of them begins with the words that are given, goes on in plain language, and ends after "
    "a few sentences. None of them has anything to do with the others.\n\n"
)  # over two blocks, so that all prompts share a prefix
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "List three primary colours:",
    "The quick brown fox",
    "In 1969, humans first",
    "To bake bread you need flour,",
    "A prime number is a number that",
    "Dear Sir or Madam,\n\nI am writing to",
    "The opposite of hot is",
    "SELECT name FROM users WHERE",
    "Photosynthesis is the process by which",
    "My favourite season is autumn because",
    "The three laws of motion were stated by",
    "import numpy as np\n\nx = np.",
    "Roses are red, violets are blue,",
    "How do computers store numbers?",
    "The train to the mountains leaves at",
    "If it rains tomorrow, we will",
)


@dataclass(frozen=True)
class Reference:
    """What transformers generates: ids, and the gap between its two highest logits at each position."""

    prompt: list[int]
    output: list[int]
    gaps: list[float]


def reference_outputs(path: Path, num_prompts: int, num_tokens: int, device: str) -> list[Reference]:
    """Greedy continuations by transformers, one prompt at a time, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).to(device).eval()
    references = []
    with torch.inference_mode():
        for text in PROMPTS[:num_prompts]:
            prompt = tokenizer(PREFIX + text).input_ids
            ids, cache = torch.tensor([prompt], device=device), None
            output: list[int] = []
            gaps: list[float] = []
            for _ in range(num_tokens):
                step = model(ids, past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                top = step.logits[0, -1].topk(2)
                output.append(int(top.indices[0]))
                gaps.append(float(top.values[0] - top.values[1]))
                ids = top.indices[None, :1]
            references.append(Reference(prompt, output, gaps))
    return references


class _Silent:
    def enter(self, name: str, detail: str = "") -> None:
        pass

    def progress(self, share: float) -> None:
        pass


def make_engine(path: str, device: str, **overrides: Any) -> Engine:
    """A float32 engine in this process."""
    fields: dict[str, Any] = {
        "device": device,
        "dtype": "float32",
        "quantization": "none",
        "kernels": "reference" if device == "cpu" else "auto",
        "context_length": 512,
        "num_threads": torch.get_num_threads(),
        "cache_dir": tempfile.gettempdir() + "/oracle-cache",
    }
    engine, _ = build_engine(Start(model_path=path, **(fields | overrides)), _Silent(), lambda _: None)
    return engine


def generate(engine: Engine, references: list[Reference], num_tokens: int) -> tuple[list[list[int]], dict[str, int]]:
    """All prompts at once; their outputs, and sums of what the steps report."""
    for index, reference in enumerate(references):
        sampling = Sampling(max_tokens=num_tokens, seed=index, temperature=0.0)
        assert engine.submit(Submit(sequence_id=index, prompt_ids=pack_ids(reference.prompt), sampling=sampling)) is None
    outputs: list[list[int]] = [[] for _ in references]
    counts = {"num_preemptions": 0, "prefix_hit_tokens": 0, "graph_hit": 0, "num_steps": 0}
    while engine.has_work:
        step = engine.step()
        if step is None:
            continue
        for sequence_id, token_id in zip(unpack_ids(step.sequence_ids), unpack_ids(step.token_ids), strict=True):
            outputs[sequence_id].append(token_id)
        counts["num_steps"] += 1
        for name in ("num_preemptions", "prefix_hit_tokens", "graph_hit"):
            counts[name] += int(getattr(step.stats, name))
    return outputs, counts


def compare(references: list[Reference], outputs: list[list[int]]) -> int:
    """Raise AssertionError at the first token that differs without a near-tie; returns how many near-ties fell the other way.

    Behind such a fork the two texts are different prompts, so comparison of that sequence ends there.
    """
    num_ties = 0
    for reference, output in zip(references, outputs, strict=True):
        assert len(output) == len(reference.output)
        for position, (want, got) in enumerate(zip(reference.output, output, strict=True)):
            if want != got:
                gap = reference.gaps[position]
                assert gap < NEAR_TIE, f"token {position} is {got}, not {want}, though the logits lie {gap:.2e} apart"
                num_ties += 1
                break
    return num_ties


def check_device(path: Path, device: str, num_prompts: int, num_tokens: int, *, graphs: bool) -> list[str]:
    """Every way of scheduling against the reference; returns a line each. Raises AssertionError where one differs."""
    references = reference_outputs(path, num_prompts, num_tokens, device)
    lines = []

    def run(name: str, engine: Engine, only: slice = slice(None)) -> dict[str, int]:
        outputs, counts = generate(engine, references[only], num_tokens)
        lines.append(f"{name}: equal, {compare(references[only], outputs)} near-ties, {counts}")
        return counts

    alone = make_engine(str(path), device, max_num_seqs=1, cuda_graphs=False, prefix_caching=False)
    run("alone", alone)
    del alone
    batched = make_engine(str(path), device, max_num_seqs=32, cuda_graphs=False)
    run("batched", batched)
    assert run("prefix-cached", batched)["prefix_hit_tokens"] > 0, "no prefix was found"
    del batched
    chunked = make_engine(str(path), device, max_num_seqs=4, max_num_batched_tokens=5, cuda_graphs=False, prefix_caching=False)
    run("chunked", chunked)
    del chunked
    longest = max(len(reference.prompt) for reference in references) + num_tokens
    tiny = make_engine(
        str(path), device, max_num_seqs=8, num_blocks=-(-longest // 16) + 3, context_length=longest + 1, cuda_graphs=False, prefix_caching=False
    )
    assert run("preempted", tiny)["num_preemptions"] > 0, "the pool was not tiny enough to preempt"
    del tiny
    if graphs:
        replayed = make_engine(str(path), device, max_num_seqs=32, prefix_caching=False)
        assert run("graph-replayed", replayed)["graph_hit"] > 0, "no step replayed a graph"
    return lines


def main() -> None:
    """Check one device and print a line a way of scheduling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--num-tokens", type=int, default=64)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    for line in check_device(options.model, options.device, options.num_prompts, options.num_tokens, graphs=options.device == "cuda"):
        print(line, flush=True)


if __name__ == "__main__":
    main()
