"""How close the engine's own form of a model is to float32: greedy agreement and perplexity, teacher-forced, at small and large steps.

    python benchmarks/agreement.py [--model FILE.gguf] [--steps 1,8,64,256,512] [--tokens 2000] [--text FILE] [--json FILE]

The reference is plain torch in float32 over the same file, widened. The other side is what `appliance serve` would run on this CPU (kernels,
dtypes, cache), fed the same text in steps of so many tokens. Agreement is the share of positions whose most likely next token is the reference's;
perplexity is that of the text. The default text is CPython's own reference manual as the interpreter carries it: technical English that a small
model does not know by heart. Exit status 1 where a step misses --min-agreement or --max-perplexity-change.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from appliance.engine.loading import choose_dtypes
from appliance.engine.wire import Start
from appliance.kernels.cpu.build import cpu_description
from appliance.kernels.ops import AttentionBatch, Ops
from appliance.kernels.ops import select as select_ops
from appliance.model.decoder import Decoder, load_model
from appliance.model_files import resolve_model
from appliance.settings import default_state_dir
from appliance.text.load import load_text

CPU = torch.device("cpu")
BLOCK_SIZE = 16
REFERENCE_STEP = 250


@dataclass(frozen=True, slots=True)
class Positions:
    """What is kept of each position's logits."""

    greedy: Tensor  # [T] int64: the most likely next token
    margin: Tensor  # [T] float32: by how much its logit leads
    log_likelihood: Tensor  # [T - 1] float32, of the token that does follow


@dataclass(frozen=True, slots=True)
class Agreement:
    """One way of running, against the reference."""

    step_tokens: int
    agreement: float  # 0-1
    perplexity: float
    perplexity_change: float  # relative to the reference's
    largest_lost_margin: float  # the reference's lead, in logits, where another token won


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="GGUF file or Hugging Face folder (%(default)s)")
    parser.add_argument("--steps", default="1,8,64,256,512", help="tokens of a step (%(default)s)")
    parser.add_argument("--tokens", type=int, default=2000, help="length of the text (%(default)s)")
    parser.add_argument("--text", metavar="FILE", help="another text")
    parser.add_argument("--quantization", default="auto", help="as in `appliance serve` (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="as in `appliance serve` (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--min-agreement", type=float, default=0.95)
    parser.add_argument("--max-perplexity-change", type=float, default=0.01)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def read_ids(model: str, text_file: str | None, num_tokens: int) -> list[int]:
    """The first tokens of the text."""
    if text_file is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        text = Path(text_file).read_text()
    ids = load_text(model).tokenizer.encode(text[: 16 * num_tokens], add_special_tokens=True)
    if len(ids) < num_tokens:
        raise SystemExit(f"the text has only {len(ids)} tokens")
    return list(ids[:num_tokens])


def run(decoder: Decoder, ids: list[int], step_tokens: int, kv_dtype: torch.dtype) -> Positions:
    """Feed `ids` as one sequence in steps, and keep what the comparison needs of every position."""
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    shape = decoder.kv_shape(num_blocks, BLOCK_SIZE)
    caches = [(torch.zeros(shape, dtype=kv_dtype), torch.zeros(shape, dtype=kv_dtype)) for _ in range(decoder.config.num_layers)]
    greedy, margins, likelihoods = [], [], []
    for start in range(0, len(ids), step_tokens):
        chunk = ids[start : start + step_tokens]
        logits = decoder.logits(decoder.forward(one_chunk(chunk, start, num_blocks), caches)).float()
        top = logits.topk(2, dim=1)
        greedy.append(top.indices[:, 0])
        margins.append(top.values[:, 0] - top.values[:, 1])
        following = torch.tensor(ids[start + 1 : start + len(chunk) + 1])
        likelihoods.append(logits[: len(following)].log_softmax(1).gather(1, following.unsqueeze(1)).squeeze(1))
    return Positions(torch.cat(greedy), torch.cat(margins), torch.cat(likelihoods))


def one_chunk(ids: list[int], start: int, num_blocks: int) -> AttentionBatch:
    """A step of one sequence that holds `start` tokens already, with logits for every token."""
    count = len(ids)
    positions = torch.arange(start, start + count)
    return AttentionBatch(
        input_ids=torch.tensor(ids, dtype=torch.int32),
        positions=positions.to(torch.int32),
        slot_mapping=positions,
        query_start=torch.tensor([0, count], dtype=torch.int32),
        context_lens=torch.tensor([start + count], dtype=torch.int32),
        rows=torch.zeros(1, dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
        logit_index=torch.arange(count),
        num_decodes=0,
        max_query_len=count,
        max_context_len=start + count,
    )


def compare(step_tokens: int, found: Positions, reference: Positions) -> Agreement:
    """The figures of one run."""
    same = found.greedy == reference.greedy
    change = math.exp(float(reference.log_likelihood.double().mean() - found.log_likelihood.double().mean())) - 1
    lost = reference.margin[~same]
    return Agreement(
        step_tokens=step_tokens,
        agreement=float(same.double().mean()),
        perplexity=perplexity(found),
        perplexity_change=change,
        largest_lost_margin=float(lost.max()) if len(lost) else 0.0,
    )


def perplexity(positions: Positions) -> float:
    """Of the text."""
    return math.exp(-float(positions.log_likelihood.double().mean()))


def measure(model: str, ops: Ops, ids: list[int], steps: list[int], quantization: str, dtype_name: str) -> tuple[Positions, list[Agreement]]:
    """The reference, and each step size against it."""
    decoder = load_model(model, ops=select_ops(CPU, "reference"), device=CPU, dtype=torch.float32, quantization="none")
    reference = run(decoder, ids, REFERENCE_STEP, torch.float32)
    start = Start(model_path=model, cache_dir="", dtype=dtype_name, quantization=quantization)
    dtype, kv_dtype = choose_dtypes(start, CPU)
    decoder = load_model(model, ops=ops, device=CPU, dtype=dtype, quantization=quantization)
    return reference, [compare(step, run(decoder, ids, step, kv_dtype), reference) for step in steps]


def main() -> int:
    """Measures and prints; the exit status says whether all steps hold."""
    arguments = parse()
    torch.set_grad_enabled(False)
    torch.set_num_threads(arguments.threads)
    model = resolve_model(arguments.model, default_state_dir(), lambda *_: None)
    ids = read_ids(model, arguments.text, arguments.tokens)
    ops = select_ops(CPU, "cpu")
    steps = [int(step) for step in arguments.steps.split(",")]
    reference, results = measure(model, ops, ids, steps, arguments.quantization, arguments.dtype)
    print(f"{Path(model).name}, {len(ids)} tokens, kernels {ops.name}, {cpu_description()[0]}; float32 perplexity {perplexity(reference):.4f}")
    held = True
    for result in results:
        held &= result.agreement >= arguments.min_agreement and abs(result.perplexity_change) <= arguments.max_perplexity_change
        figures = f"agreement {result.agreement:.2%}, perplexity {result.perplexity:.4f} ({result.perplexity_change:+.3%})"
        print(f"steps of {result.step_tokens:4}: {figures}, largest lead lost {result.largest_lost_margin:.3f}")
    if arguments.json:
        record = {"model": Path(model).name, "tokens": len(ids), "kernels": ops.name, "reference_perplexity": perplexity(reference)}
        record["steps"] = [asdict(result) for result in results]
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
