"""Times a model's layers on this CPU by form of weights and number of tokens, and says which form the engine would use.

    python benchmarks/cpu_kernels.py [--hidden 576 --inner 1536 --layers 30 ...] [--threads 2] [--architecture x86-64-v3]

The default shape is the embedded model's, with random weights. Times are the least of several runs, in milliseconds of wall time; on a machine that
does other work they are upper bounds (--cpu-time counts one thread's own time instead). `int4 stack` is a whole step's layers in one call, attention
over --context tokens included; `products` are the four projections of every layer alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from appliance.kernels.cpu.build import cpu_description, load_library
from appliance.kernels.cpu.calibration import Calibrator
from appliance.kernels.cpu_ops import CpuOps
from appliance.kernels.ops import AttentionBatch, LayerWeights, Linear, RowState, SamplingBatch

TOKENS = (1, 4, 8, 16, 32, 128, 512)
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
BLOCK = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def projections(self) -> list[tuple[tuple[int, ...], int]]:
        """Rows of each part, and in_features, of qkv, output, gate-up and down."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [((query, key, key), self.hidden), ((self.hidden,), query), ((self.inner, self.inner), self.hidden), ((self.hidden,), self.inner)]


class Stopwatch:
    """The least time of several runs."""

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Runs `work` at least 3 times and for about the given seconds; the least time of a run."""
        best, started, runs = float("inf"), time.monotonic(), 0
        while runs < 3 or time.monotonic() - started < self._seconds:
            before = self._clock()
            work()
            best = min(best, self._clock() - before)
            runs += 1
        return best * 1e3


def packed_layers(ops: CpuOps, shape: Shape, quantization: str) -> list[LayerWeights]:
    """Layers with random weights in int8 or int4, each its own memory, so that a step streams them all as a real one does."""

    def linear(rows: tuple[int, ...], width: int) -> Linear:
        parts = [torch.randn(count, width) * width**-0.5 for count in rows]
        return ops.make_linear(parts, None, device=CPU, dtype=torch.float32, quantization=quantization)[0]

    norm = torch.ones(shape.hidden)
    layers = []
    for _ in range(shape.layers):
        qkv, output, gate_up, down = (linear(rows, width) for rows, width in shape.projections())
        layers.append(LayerWeights(norm, qkv, None, None, output, norm, gate_up, down))
    return layers


def packed_products(layers: list[LayerWeights], shape: Shape, num_tokens: int) -> Callable[[], object]:
    """The four projections of all layers, in integers."""
    inputs = [torch.randn(num_tokens, width) for _, width in shape.projections()]
    return lambda: [linear(x) for layer in layers for linear, x in zip((layer.qkv, layer.output, layer.gate_up, layer.down), inputs, strict=True)]


def dense_products(shape: Shape, dtype: torch.dtype, num_tokens: int, weights: list[list[Tensor]]) -> Callable[[], object]:
    """The same with torch's dense product."""
    inputs = [torch.randn(num_tokens, width).to(dtype) for _, width in shape.projections()]
    return lambda: [functional.linear(x, weight) for layer in weights for x, weight in zip(inputs, layer, strict=True)]


def step(shape: Shape, num_tokens: int, context: int, chunk: bool) -> tuple[AttentionBatch, list[tuple[Tensor, Tensor]]]:
    """A batch of `num_tokens` decodes at `context` tokens each, or one chunk from the start of a sequence; and its caches."""
    length = num_tokens if chunk else context
    rows = 1 if chunk else num_tokens
    per_row = -(-length // BLOCK)
    tables = torch.randperm(rows * per_row).to(torch.int32).reshape(rows, per_row)
    positions = torch.arange(num_tokens) if chunk else torch.full((num_tokens,), context - 1)
    owner = torch.zeros(num_tokens, dtype=torch.int64) if chunk else torch.arange(num_tokens)
    slots = tables[owner, positions // BLOCK].long() * BLOCK + positions % BLOCK
    starts = torch.tensor([0, num_tokens]) if chunk else torch.arange(num_tokens + 1)
    batch = AttentionBatch(
        input_ids=torch.zeros(num_tokens, dtype=torch.int32),
        positions=positions.to(torch.int32),
        slot_mapping=slots,
        query_start=starts.to(torch.int32),
        context_lens=torch.full((rows,), length, dtype=torch.int32),
        rows=torch.arange(rows, dtype=torch.int32),
        block_tables=tables,
        logit_index=starts[1:] - 1,
        num_decodes=0 if chunk else num_tokens,
        max_query_len=num_tokens if chunk else 1,
        max_context_len=length,
    )
    size = (rows * per_row, shape.kv_heads, BLOCK, shape.head_dim)
    return batch, [(torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size, dtype=torch.bfloat16)) for _ in range(shape.layers)]


def products_table(ops: CpuOps, shape: Shape, watch: Stopwatch) -> None:
    """Prints milliseconds of all layers' projections by form and number of tokens."""
    columns: dict[str, Callable[[int], Callable[[], object]]] = {}
    for quantization in ("int4", "int8"):
        layers = packed_layers(ops, shape, quantization)
        columns[quantization] = lambda n, layers=layers: packed_products(layers, shape, n)  # type: ignore[misc]
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        weights = [[torch.randn(sum(rows), width).to(dtype) for rows, width in shape.projections()] for _ in range(shape.layers)]
        columns[name] = lambda n, dtype=dtype, weights=weights: dense_products(shape, dtype, n, weights)  # type: ignore[misc]
    multiplications = shape.layers * sum(sum(rows) * width for rows, width in shape.projections())
    print("\nproducts of all layers, ms (billions of multiplications a second)")
    print("tokens  " + "".join(f"{name:>18}" for name in columns))
    for num_tokens in TOKENS:
        times = [watch.milliseconds(column(num_tokens)) for column in columns.values()]
        print(f"{num_tokens:6}  " + "".join(f"{ms:10.2f} ({num_tokens * multiplications / ms / 1e6:5.0f})" for ms in times))


def step_table(ops: CpuOps, shape: Shape, context: int, watch: Stopwatch) -> None:
    """Prints a whole step's parts: int4 layers in one call, int8 output head over the rows that are sampled, greedy and random draws."""
    layers = packed_layers(ops, shape, "int4")
    stack = ops.make_decoder_stack(layers, num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, eps=1e-5)
    if stack is None:
        print("\nthe fused stack takes no layers of this shape")
        return
    head, _ = ops.make_linear([torch.randn(shape.vocab, shape.hidden)], None, device=CPU, dtype=torch.float32, quantization="int8")
    angles = torch.rand(max(context, TOKENS[-1]) + 1, shape.head_dim)
    state = RowState(torch.zeros(TOKENS[-1] + 1, 16, dtype=torch.int32), torch.zeros(TOKENS[-1] + 1, 1, dtype=torch.int32))
    warm = RowState(state.params.clone(), state.block_tables)
    warm.floats(5).fill_(1.0)
    print(f"\na step, ms: decodes at {context} tokens of context, and one prompt's chunk")
    print("         tokens  int4 stack    head  greedy    draw   total  tokens/s")
    for chunk, counts in ((False, [n for n in TOKENS if n <= 32]), (True, [n for n in TOKENS if n >= 32])):
        for num_tokens in counts:
            batch, caches = step(shape, num_tokens, context, chunk)
            hidden = torch.randn(num_tokens, shape.hidden) * 0.1
            rows = batch.rows
            last = torch.randn(len(rows), shape.hidden)
            logits = head(last)
            times = [
                watch.milliseconds(lambda hidden=hidden, caches=caches, batch=batch: stack(hidden.clone(), angles, caches, batch)),  # type: ignore[misc]
                watch.milliseconds(lambda last=last: head(last)),  # type: ignore[misc]
                watch.milliseconds(lambda rows=rows, logits=logits: ops.sample(logits, SamplingBatch(rows, state, all_greedy=True))),  # type: ignore[misc]
                watch.milliseconds(lambda rows=rows, logits=logits: ops.sample(logits, SamplingBatch(rows, warm))),  # type: ignore[misc]
            ]
            total = sum(times[:3])
            figures = f"{times[0]:10.2f} {times[1]:7.2f} {times[2]:7.2f} {times[3]:7.2f} {total:7.2f}  {num_tokens / total * 1e3:8.0f}"
            print(f"{'chunk' if chunk else 'decodes':>8} {num_tokens:6}  {figures}")


def main() -> None:
    """Parses the shape, prints the machine and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 576), ("inner", 1536), ("layers", 30), ("heads", 9), ("kv-heads", 3), ("head-dim", 64), ("vocab", 49152)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--context", type=int, default=200, help="tokens of context of each decode")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each figure")
    parser.add_argument("--architecture", default="native", help="-march of the C++ kernels; x86-64-v3 shows the AVX2 paths")
    parser.add_argument("--cpu-time", action="store_true", help="the process's CPU time instead of wall time; use with --threads 1")
    options = parser.parse_args()
    shape = Shape(options.hidden, options.inner, options.layers, options.heads, options.kv_heads, options.head_dim, options.vocab)
    torch.set_num_threads(options.threads)
    name, flags = cpu_description()
    print(f"{name}, {options.threads} threads, {options.architecture}: {' '.join(flag for flag in FLAGS if flag in flags.split())}")
    library = load_library(options.architecture)
    ops = CpuOps(library, copy_bytes=0)
    watch = Stopwatch(time.process_time if options.cpu_time else time.perf_counter, options.seconds)
    calibrator = Calibrator(ops._library)
    if not calibrator.is_known:
        for _ in calibrator.measure():
            pass
    for quantization in ("int4", "int8"):
        least = calibrator.min_dense_tokens(quantization)
        print(f"{quantization} weights: " + ("integers for every step" if least is None else f"a bfloat16 copy from {least} tokens on"))
    products_table(ops, shape, watch)
    step_table(ops, shape, options.context, watch)


if __name__ == "__main__":
    main()
