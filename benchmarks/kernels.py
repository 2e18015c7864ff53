"""Check and time the Triton kernels on a GPU. Run from the repository root: `python benchmarks/kernels.py --check --time --out result.json`.

--check compares every kernel with float64 twins; --time replays CUDA graphs and prints each kernel's share of the copy bandwidth or matrix rate
measured in the same run; --sweep tries the candidate cuts of attention and skinny linears. --only takes section names. One kernel that fails is
reported and does not stop the others.
"""
# ruff: noqa: B023 - closures over loop variables are called within their iteration

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import triton
from kernel_cases import SHAPES, Shape, make_batch, make_caches, make_fp8_caches
from kernel_checks import CHECKS, PREFILL_CONFIGS, TRITON
from torch import Tensor

from appliance.kernels import linear, ops, paged_decode, paged_prefill
from appliance.kernels.skinny_linear import SkinnyConfig, choose_config, skinny_linear

Row = tuple[str, float, float, str]  # what, seconds, bytes (or operations) a second over what was measured possible, note
COPY, MATRIX = "copy", "matrix"


class Bench:
    """Times closures by graph replay and knows the two ceilings of this card."""

    def __init__(self) -> None:
        self.copy_rate = self._measure_copy()
        x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.matrix_rate = 2 * 8192**3 / self.seconds([lambda: x @ y])

    def _measure_copy(self) -> float:
        source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
        source.random_()
        return 2 * source.numel() / self.seconds([lambda: target.copy_(source)])

    def seconds(self, runs: list[Callable[[], Any]], repeat: int = 7) -> float:
        """Median seconds of one of `runs`, all captured one after another in a graph (several where inputs must not stay in the cache)."""
        for run in runs:
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        graph.replay()
        samples = []
        for _ in range(repeat):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1e3 / len(runs))
        return statistics.median(samples)

    def moved(self, what: str, runs: list[Callable[[], Any]], num_bytes: float, note: str = "") -> Row:
        """A row for a kernel bound by memory; few runs are repeated until the graph is long enough to time."""
        seconds = self.seconds(runs * max(1, 12 // len(runs)))
        return what, seconds, num_bytes / seconds / self.copy_rate, note or COPY

    def computed(self, what: str, run: Callable[[], Any], operations: float, note: str = "") -> Row:
        """A row for a kernel bound by arithmetic."""
        seconds = self.seconds([run] * 2)
        return what, seconds, operations / seconds / self.matrix_rate, note or MATRIX


DECODE_CASES = [  # name, shape, contexts
    ("256 x 1024", "0.6b", [1024] * 256),
    ("256 x 1024", "8b", [1024] * 256),
    ("64 x 1024", "8b", [1024] * 64),
    ("256 mixed", "8b", [100 + (i * 797) % 1900 for i in range(256)]),
    ("32 x 1024", "0.6b", [1024] * 32),
    ("1 x 700", "0.6b", [700]),
    ("1 x 700", "8b", [700]),
    ("1 x 32768", "8b", [32768]),
    ("256 x 600", "135m", [600] * 256),
]

SWEPT_DECODE_CASES = ("256 x 1024", "1 x 700")


def time_fp8_decode(bench: Bench, sweep: bool) -> Iterator[Row]:
    """The decodes over an e4m3 cache, whose bytes are half and a scale for each token and head."""
    return time_decode(bench, sweep, fp8=True)


def time_decode(bench: Bench, sweep: bool, *, fp8: bool = False) -> Iterator[Row]:
    """Bytes: K and V of every context."""
    for what, name, contexts in DECODE_CASES:
        shape = SHAPES[name]
        num_blocks = sum(-(-c // 16) for c in contexts) + 2
        blocks = max(num_blocks, 2000)
        key, value = make_fp8_caches(blocks, shape)[:2] if fp8 else make_caches(blocks, shape, torch.bfloat16)
        batch = make_batch(contexts, [], num_blocks)
        q = torch.randn(len(contexts), shape.num_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(len(contexts), shape.num_heads * shape.head_dim, device="cuda", dtype=torch.bfloat16)
        num_bytes = sum(contexts) * shape.num_kv_heads * (2 * shape.head_dim + 2 if fp8 else 4 * shape.head_dim)
        configs: list[paged_decode.DecodeConfig | None] = [None]
        if sweep and what in SWEPT_DECODE_CASES:
            tiles = [(64, 4, 3), (64, 4, 5), (64, 2, 5), (32, 2, 5), (32, 2, 7), (32, 1, 5), (128, 8, 5)]
            tiles += [(32, 4, 5), (32, 4, 7), (64, 8, 4), (64, 8, 6)] if fp8 else []
            splits = [1, 2] if len(contexts) > 64 else [1, 2, 4, 8] if len(contexts) > 1 else [8, 16, 32, 64]
            configs += [paged_decode.DecodeConfig(n, s, w, g) for (n, w, g), s in itertools.product(tiles, splits)]

        def run(config: paged_decode.DecodeConfig | None, inputs: tuple[Any, ...] = (q, key, value, batch, 0.088, None, out)) -> Callable[[], None]:
            return lambda: paged_decode.paged_decode(*inputs, config)

        yield from _tried(
            [(f"{'fp8 ' if fp8 else ''}decode {name} {what} {_short(c)}", [run(c)]) for c in configs],
            lambda title, runs: bench.moved(title, runs, num_bytes),
            keep=6,
        )


PREFILL_CASES = [  # name, shape, chunks of (tokens before, length)
    ("2048", "8b", [(0, 2048)]),
    ("8192", "8b", [(0, 8192)]),
    ("32768", "8b", [(0, 32768)]),
    ("2048 at 30720", "8b", [(30720, 2048)]),
    ("16 x 512", "8b", [(0, 512)] * 16),
    ("16 x 512", "0.6b", [(0, 512)] * 16),
    ("512 at 0", "0.6b", [(0, 512)]),
    ("64 at 8192", "8b", [(8192, 64)]),
]


def time_prefill(bench: Bench, sweep: bool) -> Iterator[Row]:
    """Operations: 4 * D for every (query, key) pair under the causal mask and every query head."""
    for what, name, chunks in PREFILL_CASES:
        shape = SHAPES[name]
        num_blocks = sum(-(-sum(chunk) // 16) for chunk in chunks) + 2
        key, value = make_caches(num_blocks, shape, torch.bfloat16)
        batch = make_batch([], chunks, num_blocks)
        num_tokens = batch.input_ids.shape[0]
        q = torch.randn(num_tokens, shape.num_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(num_tokens, shape.num_heads * shape.head_dim, device="cuda", dtype=torch.bfloat16)
        pairs = sum(length * before + length * (length + 1) / 2 for before, length in chunks)
        operations = 4 * pairs * shape.head_dim * shape.num_heads
        auto = paged_prefill.choose_config(batch.max_query_len, shape.num_heads // shape.num_kv_heads, shape.head_dim, 2)
        configs = [auto, *(PREFILL_CONFIGS if sweep else [])]

        def run(config: paged_prefill.PrefillConfig, inputs: tuple[Any, ...] = (q, key, value, batch, 0.088, None, out)) -> Callable[[], None]:
            return lambda: paged_prefill.paged_prefill(*inputs, config)

        yield from _tried(
            [(f"prefill {name} {what} {_short(c)}", [run(c)]) for c in configs],
            lambda title, runs: bench.computed(title, runs[0], operations),
            keep=6,
        )


def time_elementwise(bench: Bench, sweep: bool) -> Iterator[Row]:
    """Small inputs stay in the L2 cache, as they do in a step; large ones do not."""
    for name, num_tokens in itertools.product(("0.6b", "8b"), (1, 256, 8192)):
        shape = SHAPES[name]
        x, weight = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((num_tokens, shape.hidden), (shape.hidden,)))
        residual = torch.randn_like(x)
        gate_up = torch.randn(num_tokens, 2 * shape.intermediate, device="cuda", dtype=torch.bfloat16)
        yield bench.moved(f"rms_norm {name} {num_tokens}", [lambda: TRITON.rms_norm(x, weight, 1e-5)], 4 * x.numel())
        yield bench.moved(f"add_rms_norm {name} {num_tokens}", [lambda: TRITON.add_rms_norm(x, residual, weight, 1e-5)], 8 * x.numel())
        yield bench.moved(f"silu_mul {name} {num_tokens}", [lambda: TRITON.silu_mul(gate_up)], 3 * gate_up.numel())
        yield bench.moved(f"quantize_rows {name} {num_tokens}", [lambda: linear.quantize_rows(x)], 3 * x.numel())
        yield _time_rope(bench, name, shape, num_tokens)


def _time_rope(bench: Bench, name: str, shape: Shape, num_tokens: int) -> Row:
    batch = make_batch([], [(0, num_tokens)], 520)
    qkv = torch.randn(num_tokens, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, device="cuda", dtype=torch.bfloat16)
    cos_sin = torch.randn(8192, shape.head_dim, device="cuda")
    key, value = make_caches(520, shape, torch.bfloat16)
    norm = torch.randn(shape.head_dim, device="cuda", dtype=torch.bfloat16) if shape.qk_norm else None
    return bench.moved(
        f"rope_store_kv {name} {num_tokens}", [lambda: TRITON.rope_store_kv(qkv, cos_sin, key, value, batch, norm, norm, 1e-6)], 4 * qkv.numel()
    )


def time_step(bench: Bench, sweep: bool) -> Iterator[Row]:
    """The bookkeeping of a step of 256 decodes with and without 8,192 tokens of chunks (host launch excluded: graphs)."""
    device = torch.device("cuda")

    def ints(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)

    for num_chunks, num_chunk_tokens in ((0, 0), (16, 8192)):
        state = ops.RowState(ints(257, 16), ints(257, 2048))
        num_entries, num_tokens = 256 + num_chunks, 256 + num_chunk_tokens
        step = ops.StepInput(ints(num_entries), ints(num_entries), ints(num_chunks), ints(num_chunks), ints(num_chunk_tokens), 256)
        if num_chunks:
            step.chunk_lens.fill_(num_chunk_tokens // num_chunks)
        batch = ops.AttentionBatch(
            ints(num_tokens), ints(num_tokens), ints(num_tokens).long(), ints(num_entries + 1), ints(num_entries), ints(num_entries),
            state.block_tables, ints(num_entries).long(), 256, 8192, 32768,
        )  # fmt: skip
        token_ids = ints(num_entries)
        yield bench.moved(f"prepare_inputs 256 + {num_chunk_tokens}", [lambda: TRITON.prepare_inputs(state, step, batch, 16)], 16 * num_tokens)
        yield bench.moved(f"commit_sampled {num_entries}", [lambda: TRITON.commit_sampled(state, step, batch, token_ids)], 32 * num_entries)
    rows, params, blocks = torch.arange(256, dtype=torch.int32, device=device), ints(256, 16), ints(256, 3)
    yield bench.moved("apply_updates 256 + 256", [lambda: TRITON.apply_updates(state, rows, params, blocks)], 256 * 140)


def time_sampling(bench: Bench, sweep: bool) -> Iterator[Row]:
    """Bytes: the logits once."""
    for num_rows, dtype in itertools.product((1, 256), (torch.bfloat16, torch.float32)):
        for spread in (1.0, 4.0):
            logits = (torch.randn(num_rows, 151936, device="cuda") * spread).to(dtype)
            params = torch.zeros(num_rows, 16, dtype=torch.int32)
            floats = params.view(torch.float32)
            floats[:, ops.TEMPERATURE], floats[:, ops.TOP_P], floats[:, ops.MIN_P], params[:, ops.TOP_K] = 0.7, 0.95, 0.01, 50
            state = ops.RowState(params.cuda(), torch.zeros(num_rows, 1, dtype=torch.int32, device="cuda"))
            rows = torch.arange(num_rows, dtype=torch.int32, device="cuda")
            variants: list[dict[str, Any]] = [
                {"all_greedy": True},
                {},
                {"use_top_k": True},
                {"use_top_p": True},
                {"all_greedy": True, "num_logprobs": 5},
            ]
            for flags in variants if spread == 4.0 else variants[2:4]:
                batch = ops.SamplingBatch(rows, state, **flags)
                name = f"sample {num_rows} {str(dtype)[6:]} spread {spread} {' '.join(flags) or 'temperature'}"
                yield from _tried([(name, [lambda: TRITON.sample(logits, batch)])], lambda title, runs: bench.moved(title, runs, logits.nbytes))


def time_linear(bench: Bench, sweep: bool) -> Iterator[Row]:
    """Bytes: the weight once, rotated so that it never lies in the cache. The skinny kernel against cuBLAS, layer by layer."""
    for name in ("0.6b", "8b"):
        shape = SHAPES[name]
        qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        layers = [
            ("qkv", qkv, shape.hidden, False),
            ("o", shape.hidden, shape.num_heads * shape.head_dim, False),
            ("gate-up", shape.intermediate, shape.hidden, True),
            ("down", shape.hidden, shape.intermediate, False),
            ("head", shape.vocab, shape.hidden, False),
        ]
        for (what, num_outputs, size, gate), num_tokens in itertools.product(layers, (1, 2, 4, 8, 16)):
            num_rows = num_outputs * (1 + gate)
            copies = max(1, min(12, 400_000_000 // (2 * num_rows * size)))
            weights = [torch.randn(num_rows, size, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
            x, norm = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((num_tokens, size), (size,)))
            num_bytes, title = 2 * num_rows * size, f"linear {name} {what} {num_tokens}"
            yield bench.moved(f"{title} cublas", [lambda w=w: torch.nn.functional.linear(x, w) for w in weights], num_bytes)  # type: ignore[misc]
            auto = choose_config(num_tokens, num_outputs, size, gate, 132)
            configs = [auto]
            if sweep and num_tokens in (1, 8):
                if num_tokens == 1:
                    tiles = [(4, 512, 4, 1), (8, 512, 4, 1), (4, 1024, 4, 1), (8, 256, 4, 1), (16, 256, 8, 1), (2, 1024, 4, 1)]
                else:
                    tiles = [(16, 256, 4, 3), (32, 256, 4, 3), (32, 128, 4, 5), (64, 128, 4, 4)]
                configs += [SkinnyConfig(n, k, s, w, g) for (n, k, w, g), s in itertools.product(tiles, (1, 2, 4)) if size // s >= max(k, 512)]

            def run(
                config: SkinnyConfig, x: Tensor = x, norm: Tensor = norm, weights: list[Tensor] = weights, gate: bool = gate
            ) -> list[Callable[[], Tensor]]:
                fused = {"norm": (norm, 1e-5), "gate": True} if gate else {}
                return [lambda w=w: skinny_linear(x, w, None, config=config, **fused) for w in weights]  # type: ignore[misc,arg-type]

            yield from _tried(
                [(f"{title} {_short(c)}", run(c)) for c in configs],
                lambda title, runs: bench.moved(title, runs, num_bytes),
                keep=4 if len(configs) > 1 else 1,
            )


def _short(config: Any) -> str:
    return "auto" if config is None else "/".join(str(getattr(config, name)) for name in type(config).__slots__)


def _tried(
    candidates: list[tuple[str, list[Callable[[], Any]]]], measure: Callable[[str, list[Callable[[], Any]]], Row], keep: int = 1
) -> Iterator[Row]:
    """The first candidate's row (the default) and the fastest of the others; one that fails is named. They are compiled side by side first."""
    if len(candidates) > 1:
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(_attempt, [runs[0] for _, runs in candidates]))
    rows = []
    for title, runs in candidates:
        try:
            rows.append(measure(title, runs))
        except Exception as error:
            torch.cuda.synchronize()
            print(f"  failed: {title}: {type(error).__name__}: {str(error)[:120]}", flush=True)
    yield from rows[:1]
    for what, seconds, share, note in sorted(rows[1:], key=lambda row: row[1])[: keep - 1]:
        yield f"  {what}", seconds, share, note


def _attempt(run: Callable[[], Any]) -> None:
    with suppress(Exception):  # the same call fails again, and is named, when it is measured
        run()


TIMES: dict[str, Callable[[Bench, bool], Iterator[Row]]] = {
    "decode": time_decode,
    "fp8_decode": time_fp8_decode,
    "prefill": time_prefill,
    "elementwise": time_elementwise,
    "step": time_step,
    "sampling": time_sampling,
    "linear": time_linear,
}


def main() -> int:
    """Run what is asked for; the exit status says whether every check held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="with --time: try every candidate cut")
    parser.add_argument("--only", nargs="*", choices=sorted(TIMES), default=sorted(TIMES), metavar="SECTION")
    parser.add_argument("--out", type=Path, help="write all rows as JSON")
    options = parser.parse_args()
    torch.manual_seed(time.time_ns() % (1 << 31))
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(facts, flush=True)
    record: dict[str, Any] = {"facts": facts, "checks": [], "times": []}
    failures = 0
    for section in [name for name in CHECKS if options.check and name in options.only]:
        failures += _section(section, lambda s=section: _check(CHECKS[s], record["checks"]))  # type: ignore[misc]
    if options.time:
        bench = Bench()
        facts |= {"copy_bytes_per_second": bench.copy_rate, "matrix_operations_per_second": bench.matrix_rate}
        print(f"copy {bench.copy_rate / 1e12:.2f} TB/s, matrix {bench.matrix_rate / 1e12:.0f} TFLOP/s", flush=True)
        for section in [name for name in TIMES if name in options.only]:
            failures += _section(section, lambda s=section: _time(TIMES[s](bench, options.sweep), record["times"]))  # type: ignore[misc]
    if options.out:
        options.out.write_text(json.dumps(record, indent=1))
    print(f"{failures} failures", flush=True)
    return min(failures, 1)


def _section(name: str, run: Callable[[], int]) -> int:
    began = time.monotonic()
    try:
        failures = run()
    except Exception:
        traceback.print_exc(limit=-6)
        failures = 1
    print(f"[{name}: {time.monotonic() - began:.0f} s]", flush=True)
    return failures


def _check(check: Callable[[], Iterator[Any]], record: list[Any]) -> int:
    count = failures = 0
    worst = ("", 0.0, 1.0)
    for what, error, limit in check():
        count += 1
        record.append({"what": what, "error": error, "limit": limit})
        if not error <= limit:
            failures += 1
            print(f"  WRONG {what}: {error:.3g} > {limit:.3g}", flush=True)
        if limit and error / limit > worst[1] / worst[2]:
            worst = (what, error, limit)
    print(f"  {count} checks, {failures} wrong; nearest its limit: {worst[0]} {worst[1]:.2g} of {worst[2]:.2g}", flush=True)
    return failures


def _time(rows: Iterator[Row], record: list[Any]) -> int:
    for what, seconds, share, note in rows:
        record.append({"what": what.strip(), "seconds": seconds, "share": share, "of": note})
        print(f"  {what:62s} {seconds * 1e6:10.1f} us {share * 100:6.1f} % of {note}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
