"""The text of families: prometheus_client's parsers read back what was put in, whatever the label values and numbers are."""

from __future__ import annotations

import math
import shutil
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from appliance.clock import ManualClock
from appliance.metrics.exposition import END, Exemplar, FamilyText, number
from appliance.metrics.goodput import Slo
from appliance.metrics.recorder import Recorder
from appliance.settings import MetricsSettings

_labels = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from('"\\\n'), max_size=12)


@given(_labels, st.floats())
def test_any_label_and_number_comes_back(label: str, value: float) -> None:
    """Quotes, backslashes and newlines in a label, infinities and NaN as values, in both formats."""
    text = FamilyText("gauge", "appliance_x", 'A "help" with \\ in it.', ("name", "other"))
    for openmetrics, parse in ((False, parse_text), (True, parse_openmetrics)):
        out = [text.head(openmetrics=openmetrics)]
        text.value(out, (label, "o"), value)
        (family,) = parse("".join(out) + (END if openmetrics else ""))
        assert family.documentation == 'A "help" with \\ in it.'
        (sample,) = family.samples
        assert sample.labels == {"name": label, "other": "o"}
        assert sample.value == value or (math.isnan(sample.value) and math.isnan(value))


@given(st.lists(st.integers(0, 10**9), min_size=4, max_size=4), st.floats(0, 1e12))
def test_buckets_are_cumulative(counts: list[int], total: float) -> None:
    """Each bucket holds all below it, +Inf and _count hold all, and an exemplar stays with its bucket."""
    text = FamilyText("histogram", "appliance_h_seconds", "H.", ("endpoint",), "seconds")
    out = [text.head(openmetrics=True)]
    text.histogram(out, ("a",), [0.1, 1.0, 5.0], counts, total, {1: Exemplar("id-1", 0.5, 1_700_000_000.25)})
    (family,) = parse_openmetrics("".join(out) + END)
    assert (family.type, family.unit) == ("histogram", "seconds")
    buckets = [(sample.labels["le"], sample.value) for sample in family.samples if sample.name.endswith("_bucket")]
    assert buckets == [("0.1", counts[0]), ("1.0", sum(counts[:2])), ("5.0", sum(counts[:3])), ("+Inf", sum(counts))]
    rest = {sample.name: sample.value for sample in family.samples if not sample.name.endswith("_bucket")}
    assert rest == {"appliance_h_seconds_count": sum(counts), "appliance_h_seconds_sum": total}
    exemplars = [sample.exemplar for sample in family.samples if sample.exemplar is not None]
    assert [(e.labels, e.value, float(e.timestamp)) for e in exemplars] == [({"request_id": "id-1"}, 0.5, 1_700_000_000.25)]


def test_series_that_are_gone_are_forgotten() -> None:
    """A label that changes for ever (an engine's facts after each restart) keeps no memory for ever."""
    text = FamilyText("gauge", "appliance_info", "I.", ("pid",))
    for pid in range(1000):
        text.value([], (str(pid),), 1.0)
        text.forget({(str(pid),): None})
    assert len(text._series) < 100


def test_numbers_are_floats() -> None:
    """Counters that are integers in memory are floats in the text, as everywhere in Prometheus."""
    assert [number(value) for value in (3, True, 0.1, 1e17, math.inf, -math.inf)] == ["3.0", "1.0", "0.1", "1e+17", "+Inf", "-Inf"]


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text;version=1.0.0"])
def test_a_scrape_holds_the_event_loop_for_a_moment(clock: ManualClock, slo: Slo, accept: str) -> None:
    """Under 5 ms with everything on (0.5 ms on an idle core; prometheus_client's encoder took 15): the best of many, since the machine is shared."""
    recorder = Recorder(clock=clock, slo=slo, settings=MetricsSettings(compat=("vllm", "otel")))

    def scrape() -> float:
        started = time.process_time()
        recorder.exposition(accept)
        return time.process_time() - started

    assert min(scrape() for _ in range(20)) < 5e-3


def test_promtool_finds_nothing_to_say(recorder: Recorder) -> None:
    """Prometheus' own linter accepts every family: names, units, suffixes and help texts."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run([promtool, "check", "metrics"], input=recorder.exposition()[0], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
