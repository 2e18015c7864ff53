"""Goodput and use by API key and model: who is served how well, and what that takes."""

from __future__ import annotations

from appliance.events import RequestRecord, RequestUse
from appliance.metrics.goodput import Judgement
from appliance.metrics.instruments import Cell, Instruments

_MAX_KEYS = 256  # pairs of key and model with series of their own; what comes after falls together as "other"
_NAMES = ("requests", "errors", "slo_requests", "slo_good_requests", "slo_tokens", "slo_good_tokens", "prompt_tokens", "generated_tokens")


class KeyCounters:
    """Counts finished generation requests. The key's label is its name in the server's own list, so a user cannot make series."""

    def __init__(self, instruments: Instruments) -> None:
        self._instruments = instruments
        self._cells: dict[tuple[str, str], tuple[Cell, ...]] = {}

    def on_request(self, record: RequestRecord, judgement: Judgement, use: RequestUse | None) -> None:
        """A generation request ended."""
        labels = (record.key_id, record.model)
        if labels not in self._cells and len(self._cells) >= _MAX_KEYS:
            labels = ("other", "other")
        cells = self._cells.get(labels)
        if cells is None:
            cells = self._cells[labels] = tuple(
                self._instruments.cell(f"appliance_key_{name}_total", *labels) for name in (*_NAMES, "engine_seconds")
            )
        requests, errors, judged, good, judged_tokens, good_tokens, prompt, generated, engine_seconds = cells
        requests.value += 1
        errors.value += record.status >= 500
        if judgement.both is not None:
            judged.value += 1
            judged_tokens.value += record.num_generated_tokens
            if judgement.both:
                good.value += 1
                good_tokens.value += record.num_generated_tokens
        prompt.value += record.num_prompt_tokens
        generated.value += record.num_generated_tokens
        if use is not None:
            engine_seconds.value += use.engine_seconds
        if record.joules is not None:
            self._instruments.cell("appliance_key_joules_total", *labels).value += record.joules
