"""Requests, lengths and arrivals: what the flags say, and the same for the same seed."""

from __future__ import annotations

import itertools
import json

import msgspec
import pytest

from appliance.bench.load import split_job
from appliance.bench.records import Job
from appliance.bench.workload import Lengths, plan_requests, request_body, shared_body

JOB = Job(
    url="http://127.0.0.1/v1/completions",
    headers={},
    body=shared_body("m", False, 0.0, True, {"top_p": 0.5}),
    chat=False,
    text_prompts=False,
    plans=[],
    concurrency=1,
    seed=3,
    min_token_id=100,
    max_token_id=200,
    prefix_tokens=5,
    timeout_seconds=1.0,
    limit_seconds=1.0,
)


@pytest.mark.parametrize(
    ("text", "ratio", "bounds"), [("128", 0.0, (128, 128)), ("128", 0.5, (64, 192)), ("100:1024", 0.3, (100, 1024)), ("1", 1.0, (1, 2))]
)
def test_lengths(text: str, ratio: float, bounds: tuple[int, int]) -> None:
    """A number, a number with a ratio, and a range."""
    lengths = Lengths.parse(text, ratio)
    assert (lengths.low, lengths.high) == bounds


@pytest.mark.parametrize("text", ["0", "5:4", "x", "0:3"])
def test_impossible_lengths_are_refused(text: str) -> None:
    """No empty prompts, no reversed ranges."""
    with pytest.raises(ValueError, match=r"lengths need|invalid literal"):
        Lengths.parse(text)


def test_plans_follow_from_the_seed() -> None:
    """The same seed gives the same lengths and arrivals, another seed others; lengths cover their range."""
    first = plan_requests(2000, Lengths(10, 20), Lengths(1, 3), 1, 50.0)
    assert first == plan_requests(2000, Lengths(10, 20), Lengths(1, 3), 1, 50.0)
    assert first != plan_requests(2000, Lengths(10, 20), Lengths(1, 3), 2, 50.0)
    assert {plan.num_input_tokens for plan in first} == set(range(10, 21))
    assert {plan.num_output_tokens for plan in first} == {1, 2, 3}


def test_arrivals_are_poisson() -> None:
    """Gaps have the mean of the rate and the standard deviation of their mean; the first request is sent at once."""
    plans = plan_requests(5000, Lengths(1, 1), Lengths(1, 1), 0, 50.0)
    offsets = [plan.offset_seconds or 0.0 for plan in plans]
    gaps = [b - a for a, b in itertools.pairwise(offsets)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert offsets[0] == 0.0
    assert mean == pytest.approx(0.02, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05)


def test_prompts_of_ids() -> None:
    """As many ids as planned, within their range, the first ones shared and the rest a request's own; the body holds every field."""
    bodies = [json.loads(request_body(JOB, plan)) for plan in plan_requests(2, Lengths(50, 50), Lengths(7, 7), 0)]
    one, two = (body["prompt"] for body in bodies)
    assert len(one) == len(two) == 50
    assert all(100 <= token <= 200 for token in one + two)
    assert one[:5] == two[:5]
    assert one[5:] != two[5:]
    assert {key: value for key, value in bodies[0].items() if key != "prompt"} == {
        "model": "m",
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "top_p": 0.5,
        "max_tokens": 7,
    }


def test_prompts_of_text() -> None:
    """Chat requests carry one user message of as many words as tokens were planned."""
    job = msgspec.structs.replace(JOB, chat=True, text_prompts=True)
    (plan,) = plan_requests(1, Lengths(30, 30), Lengths(1, 1), 0)
    (message,) = json.loads(request_body(job, plan))["messages"]
    assert message["role"] == "user"
    assert len(message["content"].split()) == 30


@pytest.mark.parametrize(("processes", "concurrency", "requests"), [(1, 8, 20), (3, 8, 20), (4, 2, 20), (4, 8, 3)])
def test_processes_share_requests_and_concurrency(processes: int, concurrency: int, requests: int) -> None:
    """Every request is in exactly one job, and the streams of all jobs add up to what was asked for."""
    plans = plan_requests(requests, Lengths(1, 1), Lengths(1, 1), 0)
    jobs = split_job(msgspec.structs.replace(JOB, concurrency=concurrency), plans, processes)
    assert sorted(plan.index for job in jobs for plan in job.plans) == list(range(requests))
    assert sum(job.concurrency for job in jobs) == concurrency
    assert all(job.concurrency >= 1 and job.plans for job in jobs)
    assert len(jobs) <= processes
