"""Goodput of requests and of tokens, by key and model."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from appliance.events import RequestRecord, RequestUse
from appliance.metrics.recorder import Recorder

MakeRecord = Callable[..., RequestRecord]


def _key(recorder: Recorder, name: str, key: str) -> float:
    return recorder.instruments.total(f"appliance_key_{name}_total", lambda labels: labels[0] == key)


def test_goodput_is_of_requests_and_of_tokens(recorder: Recorder, make_record: MakeRecord) -> None:
    """One long good reply and one short bad one: half of the requests and nine tenths of the tokens were good; a refused one counts in neither."""
    recorder.on_request(make_record(key_id="web", num_generated_tokens=90))
    recorder.on_request(make_record(key_id="web", num_generated_tokens=10, ttft_seconds=9.0))
    recorder.on_request(make_record(key_id="web", status=400, num_generated_tokens=0, ttft_seconds=None, tpot_seconds=None))
    assert [_key(recorder, name, "web") for name in ("requests", "slo_requests", "slo_good_requests")] == [3, 2, 1]
    assert [_key(recorder, name, "web") for name in ("slo_tokens", "slo_good_tokens")] == [100, 90]
    cell = recorder.instruments.cell
    assert [cell(f"appliance_slo_{name}_total", "both").value for name in ("tokens", "good_tokens")] == [100, 90]
    assert [cell(f"appliance_slo_{name}_total", "tpot").value for name in ("tokens", "good_tokens")] == [100, 100]


def test_keys_are_apart_and_sum_to_the_whole(recorder: Recorder, make_record: MakeRecord) -> None:
    """Errors, tokens, engine time and joules go to the key that caused them; over all keys they are the node's."""
    recorder.on_request(make_record(key_id="a", joules=5.0), RequestUse(engine_seconds=0.5, num_longest_tokens=50))
    recorder.on_request(make_record(key_id="b", joules=7.0), RequestUse(engine_seconds=0.25, num_longest_tokens=50))
    recorder.on_request(make_record(key_id="b", status=500, ttft_seconds=None, tpot_seconds=None, num_generated_tokens=0))
    recorder.on_request(make_record(key_id="b", endpoint="/v1/embeddings"))
    assert [_key(recorder, "engine_seconds", key) for key in "ab"] == [0.5, 0.25]
    assert [_key(recorder, "joules", key) for key in "ab"] == [5.0, 7.0]
    assert [_key(recorder, "errors", key) for key in "ab"] == [0, 1]
    assert [_key(recorder, "requests", key) for key in "ab"] == [1, 2]
    total = recorder.instruments.total
    assert total("appliance_key_slo_good_requests_total") == total("appliance_slo_good_requests_total", lambda labels: labels == ("both",)) == 2
    assert recorder.instruments.histogram("appliance_request_joules").sum == 12.0
    assert recorder.instruments.histogram("appliance_request_joules_per_token").sum == pytest.approx(12.0 / 50)


def test_a_thousand_keys_are_bounded(recorder: Recorder, make_record: MakeRecord) -> None:
    """Past 256 keys the rest falls together, and no request is lost."""
    for number in range(1000):
        recorder.on_request(make_record(key_id=f"key {number}"))
    cells = recorder.instruments.cells("appliance_key_requests_total")
    assert len(cells) == 257
    assert cells["other", "other"].value == 744
    assert sum(cell.value for cell in cells.values()) == 1000
