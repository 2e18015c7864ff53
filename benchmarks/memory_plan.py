"""What a start takes of a GPU against what the plan predicted, part by part; the share of the card by which the whole is off.

    python benchmarks/memory_plan.py dummy:SHAPE [--context-length N] [--quantization fp8] [--kv-cache-dtype fp8] [--json FILE]

Builds the engine as `appliance serve` does, captures every graph that idle time would, and reads the driver's count of used memory in between. The
constants to correct lie in appliance/engine/footprint.py. Exit status 1 where the prediction is off by more than 2 % of the card.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from appliance.engine.footprint import Demand
from appliance.engine.gpu_memory import gpu_memory
from appliance.engine.loading import build_engine, plan_start
from appliance.engine.memory_plan import DeviceMemory
from appliance.engine.wire import Start


class _Silent:
    def enter(self, name: str, detail: str = "") -> None:
        pass

    def progress(self, share: float) -> None:
        pass


def used_bytes() -> int:
    """Of the whole card, by the driver; nobody else may run there."""
    memory = gpu_memory()
    if memory is None:
        free, total = torch.cuda.mem_get_info()
        return total - free
    return memory.total_bytes - memory.free_bytes


def print_part(what: str, predicted: int, measured: int, card: DeviceMemory) -> None:
    """One line."""
    share = (measured - predicted) / card.total_bytes
    print(f"{what:44} predicted {predicted / 1e9:7.3f} GB, measured {measured / 1e9:7.3f} GB, off by {share:+.2%} of the card")


def main() -> int:
    """Measures and prints; the exit status says whether the plan holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a GGUF file or dummy:FOLDER")
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    start = Start(
        model_path=arguments.model,
        cache_dir=tempfile.gettempdir() + "/memory-plan",
        context_length=arguments.context_length,
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
    )
    before = used_bytes()
    plan = plan_start(start, torch.device("cuda"))
    demand: Demand = plan.demand
    engine, ready = build_engine(start, _Silent(), lambda _: None)
    torch.cuda.synchronize()
    pool = ready.num_blocks * demand.kv_block
    ready_bytes = used_bytes() - before - pool
    allocated = torch.cuda.memory_allocated() - pool
    while engine.runner.capture_next_graph(lambda: None):
        pass
    torch.cuda.synchronize()
    captured_bytes = used_bytes() - before - pool
    print("\n".join(ready.reasons))
    at_start = demand.weights + demand.runtime + demand.buffers + demand.activations
    print_part("weights", demand.weights, ready.weight_bytes, plan.device)
    print_part("allocated beside the cache", demand.weights + demand.buffers, allocated, plan.device)
    print_part("held when ready, beside the cache", at_start, ready_bytes, plan.device)
    graphs = engine.runner.graphs.num_graphs if engine.runner.graphs is not None else 0
    print_part(f"more for {graphs} captured graphs", demand.graphs, captured_bytes - ready_bytes, plan.device)
    print_part("in all, beside the cache", at_start + demand.graphs, captured_bytes, plan.device)
    off = (plan.kv_tokens - ready.num_blocks * ready.block_size) * demand.kv_block / start.block_size / plan.device.total_bytes
    print(f"KV tokens: predicted {plan.kv_tokens} (as many as fit), taken {ready.num_blocks * ready.block_size} (no more than are of use)")
    share = (captured_bytes - at_start - demand.graphs) / plan.device.total_bytes
    if arguments.json:
        record = {"predicted": at_start + demand.graphs, "measured": captured_bytes, "ready": ready_bytes, "graphs": graphs, "kv_tokens_off": off}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    return 0 if abs(share) <= 0.02 else 1


if __name__ == "__main__":
    sys.exit(main())
