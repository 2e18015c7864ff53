"""One client process: reads a Job from standard input, waits for the word, sends its requests, writes what it saw to standard output.

Frames in both directions are msgpack with a four-byte little-endian length. The word is an empty frame.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO

import msgspec

from appliance.bench.loop import run
from appliance.bench.records import FromWorker, Job, Outcome, RequestPlan, WorkerDone, WorkerProgress, WorkerReady
from appliance.bench.sse_client import SseConnection
from appliance.bench.workload import request_body

LENGTH = struct.Struct("<I")
_PROGRESS_SECONDS = 0.2
_NOT_STARTED = "not started within the time limit"
_CUT = "cut off by the time limit"


async def run_job(job: Job, bodies: list[bytes], on_progress: Callable[[int], None]) -> list[Outcome]:
    """Send every request of `job`; one outcome each, in the order of the plans, failed ones included. Ends by `job.limit_seconds`.

    A closed loop keeps `concurrency` requests in flight, each on a connection of its own. In an open loop each is sent when it is due, whatever
    is in flight, up to `concurrency`; what is late because of that bound is late by `lag_seconds`.
    """
    started = time.monotonic()
    outcomes = [Outcome(plan.index, 0.0, error=_NOT_STARTED) for plan in job.plans]
    queue = iter(range(len(job.plans)))
    finished = 0

    async def lane() -> None:
        nonlocal finished
        connection = SseConnection(job.url, job.headers)
        try:
            for i in queue:
                await _until_due(job.plans[i], started)
                outcome = outcomes[i] = Outcome(job.plans[i].index, time.monotonic(), error=_CUT)
                outcome.error = None
                try:
                    await connection.request(bodies[i], outcome, job.timeout_seconds)
                except asyncio.CancelledError:
                    outcome.error = _CUT
                    raise
                due = job.plans[i].offset_seconds
                outcome.lag_seconds = 0.0 if due is None else max(0.0, outcome.started_at - started - due)
                finished += 1
                if not job.keep_alive:
                    connection.close()
        finally:
            connection.close()

    async def report() -> None:
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            on_progress(finished)

    reporter = asyncio.create_task(report())
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(job.limit_seconds), asyncio.TaskGroup() as lanes:
                for _ in range(min(job.concurrency, len(job.plans))):
                    lanes.create_task(lane())
    finally:
        reporter.cancel()
        with suppress(asyncio.CancelledError):
            await reporter
    for outcome in outcomes:
        outcome.started_at = outcome.started_at or started
    return outcomes


async def _until_due(plan: RequestPlan, started: float) -> None:
    if plan.offset_seconds is not None:
        delay = started + plan.offset_seconds - time.monotonic()
        if delay > 0:
            await asyncio.sleep(delay)


def read_frame(stream: BinaryIO) -> bytes:
    """The next frame's body. Raises EOFError where the other side has left."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError("the other side closed the pipe")
    (left,) = LENGTH.unpack(head)
    parts = []
    while left:
        part = stream.read(left)
        if not part:
            raise EOFError("the other side closed the pipe")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def frame(body: bytes) -> bytes:
    """`body` as a frame."""
    return LENGTH.pack(len(body)) + body


def _bodies(job: Job) -> Iterator[bytes]:
    for plan in job.plans:
        yield request_body(job, plan)


def main() -> int:
    """Work on the one job that standard input brings."""
    encode = msgspec.msgpack.Encoder().encode

    def tell(message: FromWorker) -> None:
        rest = memoryview(frame(encode(message)))
        while rest:  # under PYTHONUNBUFFERED standard output is a raw file, whose writes may be short
            rest = rest[sys.stdout.buffer.write(rest) :]
        sys.stdout.buffer.flush()

    try:
        job = msgspec.msgpack.decode(read_frame(sys.stdin.buffer), type=Job)
        bodies = list(_bodies(job))
        tell(WorkerReady())
        read_frame(sys.stdin.buffer)
        cpu = time.process_time()
        outcomes = run(run_job(job, bodies, lambda count: tell(WorkerProgress(count))))
        tell(WorkerDone(outcomes, time.process_time() - cpu))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return 1  # the parent is gone or has had enough
    return 0


if __name__ == "__main__":
    sys.exit(main())
