"""The composition root: builds every part from the settings, starts them in order, serves until told to stop, drains, stops in reverse.

Order of start: state folder, engine process (its load takes longest and runs beside the rest), text, database, HTTP, jobs. The API answers at once;
/ready says when a request would be served.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from aiohttp import web
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from sqlalchemy.exc import SQLAlchemyError

from appliance import __version__
from appliance.api.app import create_app
from appliance.api.context import KEY_ID
from appliance.api.keys import load_keys
from appliance.api.services import Drain, Services
from appliance.api.status import why_not_alive
from appliance.clock import Clock, SystemClock
from appliance.console.assembly import Keys, make_console
from appliance.engine.child import Spawned
from appliance.engine.supervisor import SupervisedEngine
from appliance.engine.wire import Start
from appliance.errors import EngineFailed, ListenError
from appliance.events import EngineEvent, StepStats
from appliance.logs import EngineLines, configure_logs
from appliance.metrics.event_loop import LoopLag
from appliance.metrics.goodput import choose_slo, judge
from appliance.metrics.hardware import HOST_SECONDS, HardwareReader, HardwareReading, detect_device
from appliance.metrics.nvml import Nvml
from appliance.metrics.recorder import Recorder
from appliance.metrics.sampler import Sampler
from appliance.metrics.silent import SilentRecorder
from appliance.model_files import resolve_model, served_name
from appliance.notify import Notifier
from appliance.scaling.adapters import state_json
from appliance.scaling.endpoint import add_scaling_routes
from appliance.scaling.loop import ScalingLoop
from appliance.scaling.policy import Policy, PolicyConfig
from appliance.scaling.webhook import Courier, Signer, check_endpoints
from appliance.settings import Settings
from appliance.state_folder import StateFolder
from appliance.store.database import Database, database_url
from appliance.store.outbox import Outbox
from appliance.store.upkeep import Upkeep
from appliance.store.writer import StoreWriter
from appliance.text.load import load_text
from appliance.tracing import open_tracing

_log = logging.getLogger(__name__)
_JOB_GRACE_SECONDS = 60  # APScheduler drops a job that is over a second late, unless told otherwise
_GC_THRESHOLDS = (10_000, 10, 10)  # Python's first is 700 or 2,000, reached ten times a second with 128 streams, to find next to no cycles
_ABORT_SECONDS = 2.0  # for handlers whose request was aborted to write so to their clients


class EngineReports:
    """Passes what the engine's client reports to the recorder and, where there is one, to SQL and the log."""

    def __init__(self, recorder: Recorder, writer: StoreWriter | None) -> None:
        self._recorder = recorder
        self._writer = writer
        self.on_step: Callable[[StepStats, Sequence[tuple[float, int]]], None] = recorder.on_step  # hundreds of times a second

    def on_engine_event(self, event: EngineEvent) -> None:
        self._recorder.on_engine_event(event)
        if self._writer is not None:
            self._writer.put_engine_event(event)
        level = logging.WARNING if event.kind in ("crashed", "hung", "failed") else logging.INFO
        _log.log(level, "engine %s: %s", event.kind, event.detail, extra={"engine_pid": event.pid, "in_flight": event.num_in_flight})


class Appliance:
    """The running program. `start` inside an AsyncExitStack's life; all parts live on one event loop."""

    def __init__(self, settings: Settings, clock: Clock, spawned: Spawned | None = None) -> None:
        self.settings = settings
        self.clock = clock
        self._spawned = spawned
        self.drain = Drain()
        self.notifier = Notifier()
        self.url = ""
        self.engine: SupervisedEngine
        self.recorder: Recorder
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Bring everything up; returns once the API answers. Raises ConfigError, ModelError or MigrationFailed with nothing left running."""
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()

    async def stop(self) -> None:
        """End everything, in the reverse order of its start."""
        await self._stack.aclose()

    async def drain_requests(self, abort: asyncio.Event) -> None:
        """Turn new requests away and wait for the open ones, `server.drain_seconds` at most or until `abort` is set; then end what is left."""
        self.drain.begin()
        self.notifier.stopping(f"draining {self.drain.num_open} requests")
        if self.drain.num_open:
            _log.info("draining %d requests, at most %g s; a second signal aborts them", self.drain.num_open, self.settings.server.drain_seconds)
        waits = {asyncio.create_task(self.drain.wait_idle()), asyncio.create_task(abort.wait())}
        _, pending = await asyncio.wait(waits, timeout=self.settings.server.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if self.drain.num_open:
            _log.warning("aborting %d requests", self.drain.num_open)
            closing = asyncio.create_task(self.engine.close())  # ends every sequence, so that each stream says why
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.drain.wait_idle(), _ABORT_SECONDS)
            await closing

    async def _start(self, stack: AsyncExitStack) -> None:
        settings = self.settings
        folder = StateFolder(settings.state_dir)
        stack.callback(folder.close)
        keys = load_keys(settings.server)
        endpoints = check_endpoints(settings.scaling.webhook_urls)
        policy = Policy(PolicyConfig.from_settings(settings))
        model_path = await asyncio.to_thread(resolve_model, settings.model.path, settings.state_dir)
        model_name = settings.model.served_name or served_name(settings.model.path)
        nvml = Nvml.open()
        slo = choose_slo(settings.slo, detect_device(settings.engine.device, nvml))
        self.recorder = (Recorder if settings.metrics.enabled else SilentRecorder)(
            clock=self.clock,
            slo=slo,
            settings=settings.metrics,
            block_size=settings.engine.block_size,
            version=__version__,
            model=model_name,
            instance_id=settings.instance_id,
            fleet=settings.fleet,
        )
        database = Database(database_url(settings)) if settings.store.enabled else None
        writer = self._writer(database, folder)
        start = engine_start(settings, model_path, folder, slo.tpot_seconds)
        self.engine = SupervisedEngine(
            start,
            clock=self.clock,
            observer=EngineReports(self.recorder, writer),
            max_restarts=settings.engine.max_restarts,
            spawned=self._spawned,
            pass_on_stderr=EngineLines(),
        )
        hardware = HardwareReader(
            clock=self.clock,
            state_dir=folder.path,
            engine_pid=lambda: self.engine.pid,
            nvml=nvml,
            host_seconds=min(HOST_SECONDS, settings.metrics.sample_seconds),  # a sample holds what the processes took since the one before
            on_reading=_on_this_loop(self.recorder.on_hardware),
        )
        self.recorder.bind_engine(self.engine)
        self.recorder.bind_hardware(lambda: hardware.latest)
        if database is not None and writer is not None:
            self.recorder.bind_store(lambda: writer.stats, settings.store.queue_rows)
            stack.push_async_callback(database.close)
            stack.push_async_callback(writer.close)
        await self.engine.start()
        stack.push_async_callback(self.engine.close)
        text = await asyncio.to_thread(load_text, model_path, settings.model.chat_template)
        if database is not None and writer is not None:
            await _migrate(database)
            writer.start()
        if settings.metrics.enabled:
            hardware.start()
            stack.callback(LoopLag(self.recorder.on_loop_lag).stop)
        stack.callback(hardware.stop)
        loop = await self._scaling(stack, policy, endpoints, database)
        tracing = open_tracing(settings.instance_id, settings.fleet, __version__)
        stack.push_async_callback(asyncio.to_thread, tracing.close)
        console = make_console(
            settings,
            clock=self.clock,
            recorder=self.recorder,
            engine=self.engine,
            model_name=model_name,
            version=__version__,
            database=database,
            hardware=lambda: hardware.latest,
            scaling=lambda: state_json(loop.view()) if loop is not None else None,
            keys=Keys(keys.name_of, keys.digest_of) if keys else None,
            secret_file=folder.path / "console.secret",
        )
        services = Services(
            settings=settings,
            engine=self.engine,
            text=text,
            clock=self.clock,
            model_name=model_name,
            keys=keys,
            drain=self.drain,
            observer=self.recorder,
            metrics_text=self.recorder.exposition,
            on_record=writer.put_request if writer is not None else lambda _: None,
            tracing=tracing,
            browser_login=console.login,
        )
        app = create_app(services)
        console.add_routes(app)
        if loop is not None:
            add_scaling_routes(app, loop, caller=lambda request: str(request.get(KEY_ID, "")))
        self.url = await _listen(stack, app, settings)
        scheduler = self._schedule(stack, hardware, database, writer, services)
        if loop is not None:
            loop.schedule(scheduler, settings.scaling.interval_seconds)
        _log.info("SLO: first token within %g s, %g s per output token (%s)", slo.ttft_seconds, slo.tpot_seconds, slo.reason)

    def _writer(self, database: Database | None, folder: StateFolder) -> StoreWriter | None:
        if database is None:
            return None
        settings = self.settings
        return StoreWriter(
            database,
            settings=settings.store,
            clock=self.clock,
            spool_dir=folder.spool,
            instance_id=settings.instance_id,
            fleet=settings.fleet,
            judge=partial(judge, slo=self.recorder.slo),
        )

    async def _scaling(self, stack: AsyncExitStack, policy: Policy, endpoints: tuple[str, ...], database: Database | None) -> ScalingLoop | None:
        settings, scaling = self.settings, self.settings.scaling
        if scaling.mode == "off" or not settings.metrics.enabled:
            return None
        outbox = Outbox(database, instance_id=settings.instance_id, fleet=settings.fleet) if database is not None else None
        courier = None
        if outbox is not None and endpoints and scaling.webhook_secret is not None:
            courier = Courier(outbox, Signer(scaling.webhook_secret.get_secret_value()), clock=self.clock, observer=self.recorder)
            courier.start()
            stack.push_async_callback(courier.close)
        return ScalingLoop(
            policy,
            self.recorder.snapshot,
            clock=self.clock,
            outbox=outbox,
            courier=courier,
            endpoints=endpoints,
            observer=self.recorder,
        )

    def _schedule(
        self, stack: AsyncExitStack, hardware: HardwareReader, database: Database | None, writer: StoreWriter | None, services: Services
    ) -> AsyncIOScheduler:
        scheduler = AsyncIOScheduler(job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": _JOB_GRACE_SECONDS}, timezone="UTC")

        async def watchdog() -> None:
            """Alive to systemd only while the engine lives: one that has failed for good is helped by a restart of the service."""
            if why_not_alive(services) is None:
                self.notifier.watchdog()

        if self.notifier.watchdog_seconds is not None:
            scheduler.add_job(watchdog, "interval", seconds=self.notifier.watchdog_seconds / 2)
        if database is not None and writer is not None:
            sampler = Sampler(self.recorder)

            async def sample() -> None:
                writer.put_sample(sampler.take(hardware.latest))

            if self.settings.metrics.enabled:
                scheduler.add_job(sample, "interval", seconds=self.settings.metrics.sample_seconds)
            Upkeep(database, settings=self.settings.store, clock=self.clock).schedule(scheduler)
        scheduler.start()
        stack.callback(scheduler.shutdown, wait=False)
        return scheduler


def engine_start(settings: Settings, model_path: str, folder: StateFolder, itl_target_seconds: float) -> Start:
    """The first frame to the engine. Fields that Start shares with the settings go over by name."""
    shared = {name: value for name, value in settings.engine if name in Start.__struct_fields__}
    model = settings.model
    return Start(
        model_path=model_path,
        cache_dir=str(folder.cache),
        dtype=model.dtype,
        quantization=model.quantization,
        context_length=model.context_length,
        seed=model.seed,
        itl_target_seconds=itl_target_seconds,
        **shared,
    )


def _on_this_loop(take: Callable[[HardwareReading], None]) -> Callable[[HardwareReading], None]:
    """`take`, called from another thread, runs on this one's event loop; not at all once that has closed."""
    loop = asyncio.get_running_loop()

    def hand_over(reading: HardwareReading) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(take, reading)

    return hand_over


async def _migrate(database: Database) -> None:
    """Bring the schema up to date. A database that is away is no reason not to serve: rows spool, and the writer migrates when it answers."""
    try:
        await database.migrate()
    except (SQLAlchemyError, OSError) as error:
        _log.warning("the database does not answer (%s): serving on, rows are spooled", error)


async def _listen(stack: AsyncExitStack, app: web.Application, settings: Settings) -> str:
    """Answer on the configured address; the base URL with the port that was taken."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_ABORT_SECONDS)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, settings.server.host, settings.server.port, backlog=1024)
    try:
        await site.start()
    except OSError as error:
        where = f"{settings.server.host}:{settings.server.port}"
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ListenError(f"cannot listen on {where} (server.host, server.port): {reason}") from error
    port = runner.addresses[0][1]
    host = settings.server.host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@asynccontextmanager
async def running(settings: Settings, clock: Clock | None = None, spawned: Spawned | None = None) -> AsyncIterator[Appliance]:
    """An appliance for the length of the block, stopped at its end whatever happens. `spawned`: an engine process that was started ahead."""
    appliance = Appliance(settings, clock or SystemClock(), spawned)
    await appliance.start()
    try:
        yield appliance
    finally:
        await appliance.stop()


async def serve(settings: Settings, spawned: Spawned | None = None) -> int:
    """Serve until SIGINT or SIGTERM; drain; the exit status. A second signal aborts what is still open."""
    with contextlib.closing(configure_logs(settings.log, background=True)):
        failure = await _serve(settings, spawned)
    if failure is not None:
        print(f"appliance: {failure.message}", file=sys.stderr)  # below the log, which another thread writes
        return 1
    return 0


async def _serve(settings: Settings, spawned: Spawned | None) -> EngineFailed | None:
    """`serve`, with the logs configured; why the engine cannot serve at all, if that is so."""
    stop, abort = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: abort.set() if stop.is_set() else stop.set())
    async with running(settings, spawned=spawned) as appliance:
        gc.collect()
        gc.freeze()  # what the start has made stays: a collection that walks through it takes 0.1 s, while every stream waits
        gc.set_threshold(*_GC_THRESHOLDS)
        _print_urls(appliance)
        readiness = asyncio.create_task(_announce(appliance))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({readiness, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if readiness.done() and (failure := await readiness) is not None:
            stopped.cancel()
            return failure
        await stopped
        readiness.cancel()
        await appliance.drain_requests(abort)
    return None


async def _announce(appliance: Appliance) -> EngineFailed | None:
    """Say what the engine chose once it serves; what it failed of if it cannot serve at all."""
    appliance.notifier.ready("loading the model")  # the API answers; /ready tells the rest
    try:
        ready = await appliance.engine.wait_ready()
    except EngineFailed as error:
        return error
    for reason in ready.reasons:
        _log.info(reason)
    _log.info("ready after %.1f s: %s, %s, %d parameters", ready.load_seconds, ready.device, ready.dtype, ready.num_parameters)
    appliance.notifier.status(f"serving on {appliance.url}")
    return None


def _print_urls(appliance: Appliance) -> None:
    url = appliance.url
    body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 100}'
    print(
        f"API      {url}/v1\nConsole  {url}/\nMetrics  {url}/metrics\nReady    {url}/ready\n\nTry:\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n",
        flush=True,
    )
