"""What fp8 costs in accuracy: greedy agreement and perplexity, teacher-forced, of an fp8 KV cache and of fp8 weights beside bfloat16.

    python benchmarks/agreement_gpu.py [--model FILE] [--steps 1,64,512] [--tokens 4000] [--text FILE] [--device cuda] [--json FILE]

Every form reads the same text in steps of so many tokens: steps of 1 run the decode kernels, others the prefill ones. Each is compared with float32
on the same device and with bfloat16. On a CPU, where there are no fp8 weights, plain torch shows the cache alone: `--device cpu`. Exit status 1
where a form agrees with bfloat16 in fewer than --min-agreement of positions, or its perplexity is above bfloat16's by more than the limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from agreement import BLOCK_SIZE, Agreement, Positions, compare, perplexity, read_ids
from torch import Tensor

from appliance.kernels.kv_cache import FP8, allocate_fp8
from appliance.kernels.ops import AttentionBatch
from appliance.kernels.ops import select as select_ops
from appliance.model.decoder import Decoder, load_model
from appliance.model_files import resolve_model
from appliance.settings import default_state_dir


@dataclass(frozen=True, slots=True)
class Form:
    """One way of holding the model."""

    name: str
    dtype: torch.dtype
    quantization: str
    cache: torch.dtype


FLOAT32 = Form("float32", torch.float32, "none", torch.float32)
BFLOAT16 = Form("bfloat16", torch.bfloat16, "none", torch.bfloat16)
FORMS = (
    Form("fp8 cache", torch.bfloat16, "none", FP8),
    Form("fp8 weights", torch.bfloat16, "fp8", torch.bfloat16),
    Form("fp8 weights and cache", torch.bfloat16, "fp8", FP8),
)


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="GGUF file or Hugging Face folder (%(default)s)")
    parser.add_argument("--steps", default="1,64,512", help="tokens of a step (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4000, help="length of the text (%(default)s)")
    parser.add_argument("--text", metavar="FILE", help="another text than CPython's reference manual")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--min-agreement", type=float, default=0.95)
    parser.add_argument("--max-perplexity-increase", type=float, default=0.01)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


class Model:
    """A model in one form, which reads texts of at most `num_tokens`."""

    def __init__(self, path: str, form: Form, device: torch.device, num_tokens: int) -> None:
        ops = select_ops(device, "triton" if device.type == "cuda" else "reference")
        self._decoder: Decoder = load_model(path, ops=ops, device=device, dtype=form.dtype, quantization=form.quantization)
        self._device = device
        self._num_blocks = -(-num_tokens // BLOCK_SIZE)
        shape = self._decoder.kv_shape(self._num_blocks, BLOCK_SIZE)
        self._caches = [(self._cache(shape, form.cache), self._cache(shape, form.cache)) for _ in range(self._decoder.config.num_layers)]

    def _cache(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        return allocate_fp8(shape, self._device) if dtype == FP8 else torch.zeros(shape, dtype=dtype, device=self._device)

    def read(self, ids: list[int], step_tokens: int) -> Positions:
        """Feed `ids` as one sequence in steps, and keep what the comparison needs of every position, on the host."""
        greedy, margins, likelihoods = [], [], []
        following_ids = torch.tensor(ids[1:], device=self._device)
        for start in range(0, len(ids), step_tokens):
            chunk = ids[start : start + step_tokens]
            logits = self._decoder.logits(self._decoder.forward(self._batch(chunk, start), self._caches)).float()
            top = logits.topk(2, dim=1)
            greedy.append(top.indices[:, 0])
            margins.append(top.values[:, 0] - top.values[:, 1])
            following = following_ids[start : start + len(chunk)]
            likelihoods.append(logits[: len(following)].log_softmax(1).gather(1, following.unsqueeze(1)).squeeze(1))
        return Positions(torch.cat(greedy).cpu(), torch.cat(margins).cpu(), torch.cat(likelihoods).cpu())

    def _batch(self, ids: list[int], start: int) -> AttentionBatch:
        count, device = len(ids), self._device
        positions = torch.arange(start, start + count, device=device)
        return AttentionBatch(
            input_ids=torch.tensor(ids, dtype=torch.int32, device=device),
            positions=positions.to(torch.int32),
            slot_mapping=positions,
            query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
            context_lens=torch.tensor([start + count], dtype=torch.int32, device=device),
            rows=torch.zeros(1, dtype=torch.int32, device=device),
            block_tables=torch.arange(self._num_blocks, dtype=torch.int32, device=device).unsqueeze(0),
            logit_index=torch.arange(count, device=device),
            num_decodes=int(count == 1),
            max_query_len=count,
            max_context_len=start + count,
        )


def line(result: Agreement) -> str:
    """Agreement and change of perplexity in words."""
    return f"{result.agreement:7.2%} ({result.perplexity_change:+.3%}, lead lost {result.largest_lost_margin:.2f})"


def main() -> int:
    """Measures and prints; the exit status says whether all forms hold."""
    arguments = parse()
    torch.set_grad_enabled(False)
    device = torch.device(arguments.device)
    path = resolve_model(arguments.model, default_state_dir(), lambda *_: None)
    ids = read_ids(path, arguments.text, arguments.tokens)
    steps = [int(step) for step in arguments.steps.split(",")]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "plain torch on a CPU"
    exact = Model(path, FLOAT32, device, len(ids)).read(ids, 256)
    print(f"{Path(path).name}, {len(ids)} tokens, {where}; float32 perplexity {perplexity(exact):.4f}")
    plain = Model(path, BFLOAT16, device, len(ids))
    baselines = {step: plain.read(ids, step) for step in steps}
    for step, found in baselines.items():
        print(f"{'bfloat16':22} steps of {step:4}: float32 {line(compare(step, found, exact))}")
    del plain
    held, records = True, []
    for form in FORMS:
        if form.quantization == "fp8" and device.type != "cuda":
            continue
        model = Model(path, form, device, len(ids))
        for step in steps:
            found = model.read(ids, step)
            to_exact, to_plain = compare(step, found, exact), compare(step, found, baselines[step])
            print(f"{form.name:22} steps of {step:4}: float32 {line(to_exact)}; bfloat16 {line(to_plain)}", flush=True)
            held &= to_plain.agreement >= arguments.min_agreement and to_plain.perplexity_change <= arguments.max_perplexity_increase
            records.append({"form": form.name, "against_float32": asdict(to_exact), "against_bfloat16": asdict(to_plain)})
    if arguments.json:
        record = {"model": Path(path).name, "device": where, "tokens": len(ids), "float32_perplexity": perplexity(exact), "forms": records}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
