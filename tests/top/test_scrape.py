"""Asking an appliance: what is parsed, what is refused, and how that is said."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest

from appliance.top.options import KEY_VARIABLE, add_options, api_key
from appliance.top.scrape import Histogram, ServerAway, Target, parse

TEXT = """# TYPE appliance_requests counter
appliance_requests_total{endpoint="/v1/completions",status="200"} 5
appliance_requests_total{endpoint="/v1/chat/completions",status="200"} 3
appliance_requests_total{endpoint="/v1/completions",status="500"} 2
# TYPE appliance_wait_seconds histogram
appliance_wait_seconds_bucket{le="0.1",endpoint="a"} 1
appliance_wait_seconds_bucket{le="0.5",endpoint="a"} 3
appliance_wait_seconds_bucket{le="+Inf",endpoint="a"} 3
appliance_wait_seconds_bucket{le="0.1",endpoint="b"} 0
appliance_wait_seconds_bucket{le="0.5",endpoint="b"} 0
appliance_wait_seconds_bucket{le="+Inf",endpoint="b"} 1
appliance_wait_seconds_sum{endpoint="a"} 0.7
appliance_wait_seconds_sum{endpoint="b"} 2
appliance_build_info{model="m"} 1
vllm:num_requests_running 3
"""


def test_samples_are_summed_over_labels() -> None:
    """Totals by what matches, by one label, histograms over all; other families are left out."""
    scrape = parse(TEXT, 1.0)
    assert scrape.total("requests_total") == 10
    assert scrape.total("requests_total", status="200") == 8
    assert scrape.total("nothing_total") is None
    assert scrape.labelled("requests_total", "status") == {"200": 8, "500": 2}
    assert scrape.info("build_info") == {"model": "m"}
    histogram = scrape.histogram("wait_seconds")
    assert histogram == Histogram((0.1, 0.5, math.inf), (1, 3, 4), 2.7)
    assert not any("vllm" in name for name in scrape.samples)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.25, 0.1), (0.5, 0.3), (0.75, 0.5), (0.99, 0.5)])
def test_quantiles_are_those_of_promql(share: float, expected: float) -> None:
    """Linear within a bucket; beyond the last edge, that edge (histogram_quantile's rules)."""
    assert Histogram((0.1, 0.5, math.inf), (1, 3, 4), 2.7).quantile(share) == pytest.approx(expected)


def test_without_observations_there_is_no_quantile() -> None:
    """No data is not zero."""
    empty = Histogram((0.1, math.inf), (0, 0), 0)
    assert empty.quantile(0.5) is None
    assert empty.mean is None


def test_a_histogram_that_fell_began_anew() -> None:
    """After a restart everything counted is new; so it is where the edges changed."""
    before, now = Histogram((0.1, math.inf), (5, 9), 3.0), Histogram((0.1, math.inf), (2, 3), 1.0)
    assert now.since(before) is now
    assert now.since(Histogram((0.2, math.inf), (1, 1), 1.0)) is now
    assert Histogram((0.1, math.inf), (7, 12), 4.5).since(before) == Histogram((0.1, math.inf), (2, 3), 1.5)


@pytest.mark.parametrize("text", ["", "<html>\x00</html>", "appliance_x{", "go_goroutines 3\n", "appliance_requests_total abc\n"])
def test_what_is_no_exposition_of_ours_is_refused(text: str) -> None:
    """Said in words, without a traceback."""
    with pytest.raises(ServerAway, match="/metrics"):
        parse(text, 0.0)


def test_the_key_goes_along(site: Any) -> None:
    """As a bearer token, to the right path whatever the URL's form."""
    site.say("/metrics", TEXT)
    for url in (site.url, site.url + "/", site.url + "/v1", site.url + "/metrics", site.url.removeprefix("http://")):
        assert Target(url, "sk-1").scrape().total("requests_total") == 10
    assert {path for path, _ in site.asked} == {"/metrics"}
    assert {headers["Authorization"] for _, headers in site.asked} == {"Bearer sk-1"}


@pytest.mark.parametrize("url", ["ftp://host", "file:///etc/passwd", "http://", "://x"])
def test_other_urls_are_refused(url: str) -> None:
    """Only http and https."""
    with pytest.raises(ValueError, match="http or https"):
        Target(url, None)


def test_refusals_are_explained(site: Any) -> None:
    """A missing key, an error of the server, a redirect (never followed: it would carry the key away) and silence."""
    target = Target(site.url, "sk-1", timeout_seconds=2)
    site.say("/metrics", "{}", status=401)
    with pytest.raises(ServerAway, match="key is missing or not known"):
        target.scrape()
    site.say("/metrics", '{"error": {"message": "draining"}}', status=503)
    with pytest.raises(ServerAway, match="answered 503: draining"):
        target.scrape()
    site.say("/metrics", "", status=302, Location=site.url + "/elsewhere")
    site.say("/elsewhere", TEXT)
    with pytest.raises(ServerAway, match=r"redirects to .*/elsewhere"):
        target.scrape()
    assert "/elsewhere" not in {path for path, _ in site.asked}
    site.stop()
    with pytest.raises(ServerAway, match="refused"):
        target.scrape()


def test_a_reply_cut_short_is_no_answer(site: Any) -> None:
    """The server dies in the middle of its reply."""
    site.say("/metrics", TEXT, **{"Content-Length": "100000"})
    with pytest.raises(ServerAway):
        Target(site.url, None, timeout_seconds=1).scrape()


def test_rows_are_optional(site: Any) -> None:
    """Routes that are not there, not for us, or say something else give None."""
    target = Target(site.url, None)
    assert target.rows("/console/api/requests", "requests") is None
    site.say("/console/api/requests", "no json")
    assert target.rows("/console/api/requests", "requests") is None
    site.say("/console/api/requests", "[]")
    assert target.rows("/console/api/requests", "requests") is None
    site.say("/console/api/requests", '{"requests": [{"id": 1}, 2]}')
    assert target.rows("/console/api/requests", "requests") == [{"id": 1}]


def test_the_key_comes_from_file_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own file and variable serve; the key is never on the command line."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert api_key(parser.parse_args([])) is None
    monkeypatch.setenv(KEY_VARIABLE, "sk-env")
    assert api_key(parser.parse_args([])) == "sk-env"
    monkeypatch.setenv("OTHER", "sk-other")
    assert api_key(parser.parse_args(["--api-key-env", "OTHER"])) == "sk-other"
    (tmp_path / "keys").write_text("# ours\n\nweb:sk-file\nbatch:sk-2\n")
    assert api_key(parser.parse_args(["--key-file", str(tmp_path / "keys")])) == "sk-file"
    with pytest.raises(OSError, match="No such file"):
        api_key(parser.parse_args(["--key-file", str(tmp_path / "none")]))
