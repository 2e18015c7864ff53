"""Puts the console together from what the composition root has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.clock import Clock
from appliance.console.assets import load_assets
from appliance.console.live import LiveFeed
from appliance.console.login import Login
from appliance.console.pages import Pages
from appliance.console.routes import About, Console
from appliance.console.sessions import SessionCookies, load_secret
from appliance.metrics.hardware import HardwareReading
from appliance.metrics.live import EngineView
from appliance.metrics.recorder import Recorder
from appliance.settings import Settings
from appliance.store.database import Database


@dataclass(frozen=True, slots=True)
class Keys:
    """What the login needs to know of the API keys: the name of a key (compared in constant time), and a digest by name that changes with the key."""

    name_of: Callable[[str], str | None]
    digest_of: Callable[[str], bytes | None]


def make_console(
    settings: Settings,
    *,
    clock: Clock,
    recorder: Recorder,
    engine: EngineView,
    model_name: str,
    version: str,
    database: Database | None = None,
    hardware: Callable[[], HardwareReading | None] = lambda: None,
    scaling: Callable[[], dict[str, Any] | None] = lambda: None,
    keys: Keys | None = None,
    secret_file: Path | None = None,
) -> Console:
    """The console; with `keys` behind a login, whose signing secret lies in `secret_file`. Raises ConfigError where that cannot be used."""
    slo = recorder.slo
    about = About(
        model=model_name,
        instance_id=settings.instance_id,
        fleet=settings.fleet,
        version=version,
        ttft_slo_seconds=slo.ttft_seconds,
        tpot_slo_seconds=slo.tpot_seconds,
        slo_target=slo.target,
        slo_reason=slo.reason,
        scaling_mode=settings.scaling.mode,
        sample_seconds=settings.metrics.sample_seconds,
        retention_days=settings.store.retention_days,
        metrics_enabled=settings.metrics.enabled,
    )
    pages = Pages(load_assets(), title=model_name)
    login = None
    if keys is not None:
        assert secret_file is not None
        login = Login(SessionCookies(load_secret(secret_file), keys.digest_of, clock=clock), keys.name_of, pages)
    feed = LiveFeed(recorder, engine, clock=clock, hardware=hardware, scaling=scaling)
    return Console(about, pages, feed, database=database, login=login, clock=clock)
