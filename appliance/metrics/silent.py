"""The recorder of a server that measures nothing (`metrics.enabled = false`): takes every report and keeps none."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.events import EngineEvent, RequestRecord, RequestUse, StepStats
from appliance.metrics.goodput import CHAT
from appliance.metrics.hardware import HardwareReading
from appliance.metrics.recorder import Recorder


class SilentRecorder(Recorder):
    """Its families stay as they were made, and its snapshots have no data."""

    def on_step(self, stats: StepStats, gaps: Sequence[tuple[float, int]] = ()) -> None:
        """Nothing."""

    def on_engine_event(self, event: EngineEvent) -> None:
        """Nothing."""

    def on_received(self, endpoint: str) -> None:
        """Nothing."""

    def on_admitted(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Nothing."""

    def on_rejected(self, code: str) -> None:
        """Nothing."""

    def on_first_token(self, seconds: float, endpoint: str = CHAT, request_id: str = "") -> None:
        """Nothing."""

    def on_other_first_token(self) -> None:
        """Nothing."""

    def on_request(self, record: RequestRecord, use: RequestUse | None = None) -> None:
        """Nothing."""

    def on_hardware(self, reading: HardwareReading) -> None:
        """Nothing."""

    def on_loop_lag(self, seconds: float) -> None:
        """Nothing."""
