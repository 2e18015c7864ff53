"""Where a decode step's time goes: GPU time by kernel, and the host's by function, at a batch and context length; on a CPU time by part of a step.

Usage: python benchmarks/step_profile.py MODEL [--batch 1 256] [--context 512]
       python benchmarks/step_profile.py MODEL --device cpu --batch 1 8 --context 200
"""

from __future__ import annotations

import argparse
import collections
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from appliance.engine.engine import Engine
from appliance.engine.loading import build_engine
from appliance.engine.wire import Sampling, Start, Submit, pack_ids

_STEPS = 20


class _Silent:
    def enter(self, name: str, detail: str = "") -> None:
        pass

    def progress(self, share: float) -> None:
        pass


def main() -> None:
    """Profile each batch size in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--cache-dir")
    parser.add_argument("--host", action="store_true", help="time the host's part of a step too")
    options = parser.parse_args()
    start = Start(
        model_path=options.model,
        cache_dir=options.cache_dir or tempfile.mkdtemp(),
        device=options.device,
        context_length=4096,
        prefix_caching=False,
        quantization=options.quantization,
    )
    engine, ready = build_engine(start, _Silent(), lambda _: None)
    while engine.runner.capture_next_graph(lambda: None):
        pass
    print(f"{options.model.split('/')[-1]} {ready.device} {ready.dtype}", flush=True)
    for batch in options.batch:
        _fill(engine, batch, options.context, options.temperature)
        began = time.monotonic()
        for _ in range(_STEPS):
            engine.step()
        if engine.runner.device.type == "cpu":
            print(f"batch {batch}, context {options.context}: {1e3 * (time.monotonic() - began) / _STEPS:.3f} ms a step", flush=True)
            _print_cpu(engine)
            _drain(engine)
            continue
        torch.cuda.synchronize()
        print(f"batch {batch}, context {options.context}: {1e3 * (time.monotonic() - began) / _STEPS:.3f} ms a step", flush=True)
        if options.host:
            _print_host(engine)  # before the profiler, whose hooks slow every launch from then on
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(_STEPS):
                engine.step()
            torch.cuda.synchronize()
        _print_kernels(trace)
        _drain(engine)


def _fill(engine: Engine, batch: int, context: int, temperature: float) -> None:
    rng = random.Random(1)
    for index in range(batch):
        prompt = pack_ids(rng.randint(3, 10000) for _ in range(context))
        sampling = Sampling(max_tokens=3000, seed=index, temperature=temperature)
        engine.submit(Submit(sequence_id=index, prompt_ids=prompt, sampling=sampling))
    while engine.scheduler.waiting or any(sequence.is_prefilling for sequence in engine.scheduler.running):
        engine.step()
    for _ in range(4):
        engine.step()


def _print_kernels(trace: profile) -> None:
    total: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name] += event.device_time
            calls[event.name] += 1
    print(f"  {sum(total.values()) / _STEPS:9.1f} us in kernels")
    for name, spent in total.most_common(16):
        print(f"  {spent / _STEPS:9.1f} us {calls[name] / _STEPS:6.1f} x {spent / calls[name]:8.2f} us  {name[:110]}", flush=True)


def _print_host(engine: Engine) -> None:
    """Median microseconds of the host in a step, and then in each part of it, by wrapping the methods (which itself costs some); nested parts are
    indented."""
    runner, scheduler = engine.runner, engine.scheduler
    num_graphs = runner.graphs.num_graphs if runner.graphs else 0
    waits: list[float] = []
    runner.collect = _timed(runner.collect, waits)  # type: ignore[method-assign]
    print(f"  host {1e6 * _host_seconds(engine, waits):7.1f} us a step beside the wait for the device ({num_graphs} graphs)")
    parts = [
        (scheduler, "schedule", "schedule"),
        (runner, "launch", "launch"),
        (runner, "_update_rows", "  block tables and new rows"),
        (runner.batch, "upload_step", "  upload"),
        (runner.graphs, "replay", "  graph replay, forward and sampling"),
        (runner, "_fetch", "  output copy"),
        (engine, "_process", "process"),
        (engine, "_output", "report"),
    ]
    _print_parts(engine, parts)
    del runner.collect


def _print_cpu(engine: Engine) -> None:
    """Median microseconds of each part of a step: the layers with their attention, the output head, sampling, and what stands around them."""
    runner, decoder = engine.runner, engine.runner.decoder
    parts = [
        (engine.scheduler, "schedule", "schedule"),
        (runner, "launch", "launch"),
        (runner, "_update_rows", "  block tables and new rows"),
        (runner.batch, "upload_step", "  the step's rows"),
        (runner.ops, "prepare_inputs", "  inputs from the rows"),
        (decoder, "forward", "  embedding, layers with attention, norm"),
        (decoder, "logits", "  output head"),
        (runner.ops, "sample", "  sampling"),
        (runner.ops, "commit_sampled", "  ids into the rows"),
        (engine, "_process", "ids into the sequences"),
        (engine, "_output", "report"),
    ]
    print(f"  {1e6 * _host_seconds(engine, []):12.1f} us  in all")
    _print_parts(engine, parts)


def _print_parts(engine: Engine, parts: list[tuple[Any, str, str]]) -> None:
    """Median microseconds that some steps spend in each (owner or None, method, name)."""
    spent: dict[str, list[float]] = collections.defaultdict(list)
    present = [part for part in parts if part[0] is not None]
    for owner, method, name in present:
        setattr(owner, method, _timed(getattr(owner, method), spent[name]))
    _host_seconds(engine, [])
    for owner, method, _ in present:
        delattr(owner, method)
    for name, seconds in spent.items():
        if seconds:
            print(f"  {1e6 * statistics.median(seconds):12.1f} us  {name}", flush=True)


def _host_seconds(engine: Engine, waits: list[float]) -> float:
    """Median seconds of a step beside those that `waits` collects."""
    totals = []
    for _ in range(_STEPS * 4):
        began, waited = time.perf_counter(), len(waits)
        engine.step()
        totals.append(time.perf_counter() - began - sum(waits[waited:]))
    return statistics.median(totals)


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent.append(time.perf_counter() - began)

    return call


def _drain(engine: Engine) -> None:
    from appliance.engine.wire import Abort

    for sequence in list(engine.scheduler.running):
        engine.abort(Abort(sequence.id))
    while engine.has_work:
        engine.step()


if __name__ == "__main__":
    main()
