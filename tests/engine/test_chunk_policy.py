"""The chunk policy: as many prompt tokens as keep a step within its target, learned from steps."""

from __future__ import annotations

import pytest

from appliance.engine.chunk_policy import ChunkPolicy

BASE, RATE = 0.008, 20e-6  # seconds of a decode step, and a prompt token


def run(policy: ChunkPolicy, num_steps: int, *, mixed: bool) -> None:
    """Steps of a machine that takes BASE + RATE a token, with what the policy allows."""
    for _ in range(num_steps):
        tokens = policy.budget if mixed else 0
        policy.observe(64, tokens, BASE + RATE * tokens)


def test_the_budget_fills_the_target() -> None:
    """Once base and rate are known, a step with the budget takes the target."""
    policy = ChunkPolicy(0.030, 4096)
    run(policy, 50, mixed=False)
    run(policy, 50, mixed=True)
    assert policy.budget == pytest.approx((0.030 - BASE) / RATE, rel=0.05)


@pytest.mark.parametrize("stalled_tokens", [0, 256])
def test_a_stall_is_forgotten_though_every_step_carries_prompt_tokens(stalled_tokens: int) -> None:
    """Half a second lost in one step, with or without prefill, does not hold the budget down when only mixed steps follow."""
    policy = ChunkPolicy(0.030, 4096)
    run(policy, 50, mixed=False)
    run(policy, 50, mixed=True)
    for _ in range(20):
        policy.observe(64, stalled_tokens, 0.5)
    run(policy, 120, mixed=True)
    assert policy.budget == pytest.approx((0.030 - BASE) / RATE, rel=0.1)


def test_before_evidence_and_at_the_limits_the_budget_is_sane() -> None:
    """A quarter of the largest step at first; never below 64, never above the largest step."""
    assert ChunkPolicy(0.030, 2048).budget == 512
    slow, fast = ChunkPolicy(0.030, 2048), ChunkPolicy(0.030, 2048)
    slow.observe(8, 0, 1.0)
    slow.observe(8, 512, 2.0)
    fast.observe(0, 512, 1e-4)
    assert slow.budget == 64
    assert fast.budget == 2048
