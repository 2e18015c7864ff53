"""One level of load over several client processes, and the ceiling that they have by themselves."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from appliance.bench.records import FromWorker, Job, Outcome, RequestPlan, WorkerDone, WorkerProgress
from appliance.bench.worker import LENGTH, frame
from appliance.bench.workload import Lengths, plan_requests, share_out, shared_body

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator

_CEILING_TOKENS = 2_000
_decode: Callable[[bytes], FromWorker] = msgspec.msgpack.Decoder(FromWorker).decode
_ROOT = str(Path(__file__).resolve().parents[2])


class WorkerFailed(Exception):
    """A client process ended without a result."""


async def run_level(jobs: Sequence[Job], on_progress: Callable[[int], None]) -> tuple[list[Outcome], float]:
    """Run each job in a process of its own, all from the same moment; every outcome, and the CPU seconds of the busiest process."""
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(_python("appliance.bench.worker")) for _ in jobs]
        for worker, job in zip(workers, jobs, strict=True):
            await _write(worker, msgspec.msgpack.encode(job))
        for worker in workers:
            await _read(worker)  # WorkerReady
        counts = [0] * len(workers)

        async def follow(position: int) -> WorkerDone:
            while True:
                message = await _read(workers[position])
                if isinstance(message, WorkerDone):
                    return message
                if isinstance(message, WorkerProgress):
                    counts[position] = message.num_finished
                    on_progress(sum(counts))

        for worker in workers:
            await _write(worker, b"")
        results = await asyncio.gather(*(follow(position) for position in range(len(workers))))
    outcomes = sorted((outcome for result in results for outcome in result.outcomes), key=lambda outcome: outcome.index)
    on_progress(len(outcomes))
    return outcomes, max(result.cpu_seconds for result in results)


def split_job(job: Job, plans: Sequence[RequestPlan], num_processes: int) -> list[Job]:
    """`job` with `plans` over at most `num_processes` processes, its concurrency shared out as evenly as it goes."""
    num_processes = max(1, min(num_processes, job.concurrency, len(plans)))
    lanes = [job.concurrency // num_processes + (i < job.concurrency % num_processes) for i in range(num_processes)]
    shares = share_out(plans, num_processes)
    return [msgspec.structs.replace(job, plans=share, concurrency=count) for share, count in zip(shares, lanes, strict=True)]


async def measure_ceiling(num_processes: int, concurrency: int) -> float:
    """Events a second that these client processes take from null servers, one each: with nothing else to do, what is the most they can see?"""
    num_processes = max(1, min(num_processes, concurrency))
    each = max(1, concurrency // num_processes)
    num_requests = each * max(1, 40 // each)
    plans = plan_requests(num_requests, Lengths(1, 1), Lengths(_CEILING_TOKENS, _CEILING_TOKENS), 0)
    async with AsyncExitStack() as stack:
        ports = [await stack.enter_async_context(_null_server()) for _ in range(num_processes)]
        jobs = [
            Job(
                url=f"http://127.0.0.1:{port}/v1/completions",
                headers={},
                body=shared_body("null", False, 0.0, True, {}),
                chat=False,
                text_prompts=False,
                plans=plans,
                concurrency=each,
                seed=0,
                min_token_id=0,
                max_token_id=1,
                prefix_tokens=0,
                timeout_seconds=30.0,
                limit_seconds=30.0,
            )
            for port in ports
        ]
        outcomes, _ = await run_level(jobs, lambda _: None)
    good = [outcome for outcome in outcomes if outcome.error is None]
    if not good:
        raise WorkerFailed(f"the client's ceiling could not be measured: {outcomes[0].error}")
    seconds = max(outcome.last_at for outcome in good) - min(outcome.started_at for outcome in good)
    return sum(outcome.num_chunks for outcome in good) / seconds


@asynccontextmanager
async def _python(module: str) -> AsyncIterator[Process]:
    """A Python process running one of our modules, killed at the end of the block if it has not left by itself."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=environ, limit=1 << 26
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            try:
                process.terminate() if module.endswith("null_server") else None
                await asyncio.wait_for(process.wait(), 2.0)
            except TimeoutError:
                process.kill()
                await process.wait()


@asynccontextmanager
async def _null_server() -> AsyncIterator[int]:
    """The port of a null server that lives as long as the block."""
    async with _python("appliance.bench.null_server") as process:
        assert process.stdout is not None
        yield int(await process.stdout.readline())


async def _write(process: Process, body: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(frame(body))
    await process.stdin.drain()


async def _read(process: Process) -> FromWorker:
    assert process.stdout is not None
    try:
        (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        body = await process.stdout.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise WorkerFailed(f"a client process ended with status {await process.wait()}") from error
    return _decode(body)
