"""The table of open sequences, driven step by step against an engine in the same process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine_harness import Collected, collect, request
from fake_engine import expected_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from model_engine import STATS, ModelEngine

from appliance.engine.generation import OpenSequence, Stage
from appliance.engine.replay import MAX_SEQUENCE_ID, PROBE_TOKENS, SequenceTable
from appliance.engine.wire import Abort, Finish, Rejected, SequenceEvent, StepOutput, pack_ids
from appliance.errors import ContextLengthExceeded, DeadlineExceeded, EngineFailed, Unavailable


def started(num_may_wait: int = 8, **options: Any) -> tuple[SequenceTable, ModelEngine]:
    """A table with a ready engine attached."""
    table = SequenceTable(num_may_wait)
    return table, attach(table, **options)


def attach(table: SequenceTable, **options: Any) -> ModelEngine:
    """A fresh engine for `table`."""
    engine = ModelEngine(table, **options)
    table.attach(engine, engine.facts, 0.0)
    return engine


def tokens_of(first: int, num_tokens: int) -> list[int]:
    """The first tokens of `request(first)`."""
    return expected_tokens([first, 5, 7, 11], first * 31, num_tokens)


def drain(table: SequenceTable, engine: ModelEngine, now: float = 1.0, most: int = 2000) -> None:
    """Step until nothing is open."""
    for _ in range(most):
        if not len(table):
            return
        engine.step(now)
        table.on_tick(now)
        now += 0.001
    raise AssertionError(f"{len(table)} sequences never ended")


def assert_empty(table: SequenceTable) -> None:
    """No count is left behind."""
    assert (len(table), len(table._held), len(table._suspects), table._num_unscheduled, table._num_never_scheduled) == (0, 0, 0, 0, 0)


async def test_everything_ready_comes_at_once() -> None:
    """Tokens of several steps, their times and the events come in one Delta, in order."""
    table, engine = started()
    generation = table.submit(request(1, 3), 0.0, restarting=False)
    for now in (1.0, 1.5, 2.5):
        engine.step(now)
    delta = await generation.next()
    assert (delta.token_ids, delta.token_times, delta.finish_reason) == (tokens_of(1, 3), [1.0, 1.5, 2.5], "length")
    assert [event.kind for event in delta.events] == ["scheduled"]
    assert (delta.logprobs, delta.error, generation.num_cached_tokens) == (None, None, 3)
    again = await generation.next()
    assert (again.token_ids, again.finish_reason) == ([], "length")


@pytest.mark.parametrize("announce", [True, False])
async def test_cached_tokens_are_those_of_the_first_prefill(announce: bool) -> None:
    """num_cached_tokens comes from the first "scheduled", also when it arrives with the first token, and a replay does not change it."""
    table, engine = started(announce=announce)
    generation = table.submit(request(1, 5), 0.0, restarting=False)
    engine.step(1.0)
    assert generation.num_cached_tokens == 3
    generation.num_cached_tokens = 2
    table.detach(2.0, "x")
    drain(table, attach(table, announce=announce))
    assert generation.num_cached_tokens == 2


async def test_a_token_under_way_does_not_hide_a_preemption() -> None:
    """A token that arrives after its sequence was preempted is delivered; the sequence counts as out of the batch until it is resumed."""
    table, engine = started()
    generation = table.submit(request(1, 5), 0.0, restarting=False)
    engine.step(1.0)
    table.on_events((SequenceEvent(generation.sequence_id, "preempted", 1.0, 1),))
    engine.step(1.1)
    assert generation.stage == Stage.PREEMPTED
    assert (await generation.next()).token_ids == tokens_of(1, 2)
    table.on_events((SequenceEvent(generation.sequence_id, "resumed", 1.2),))
    engine.step(1.3)
    assert (generation.stage, generation.settled) == (Stage.RUNNING, True)


async def test_a_cancelled_next_loses_no_token() -> None:
    """Cancelling next() after its tokens arrived leaves them for the one after it."""
    table, engine = started()
    generation = table.submit(request(1, 5), 0.0, restarting=False)
    task = asyncio.create_task(generation.next())
    await asyncio.sleep(0)
    engine.step(1.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await generation.next()).token_ids == tokens_of(1, 1)


async def test_gaps_are_grouped_by_step() -> None:
    """One step's inter-token gaps come as (seconds, sequences); a first token has none."""
    table, engine = started()
    table.submit(request(1), 0.0, restarting=False)
    table.submit(request(2), 0.0, restarting=False)
    assert engine.step(1.0) == []
    table.submit(request(3), 0.0, restarting=False)
    assert engine.step(1.25) == [(0.25, 2)]
    assert engine.step(1.5) == [(0.25, 3)]


async def test_logprobs_stay_aligned_across_a_crash() -> None:
    """Each token has its log-probabilities, those before a crash and those after it."""
    table, engine = started()
    generation = table.submit(request(1, 6, sampling={"num_logprobs": 0}), 0.0, restarting=False)
    engine.step(1.0)
    first = await generation.next()
    engine.step(1.1)
    table.detach(2.0, "x")
    drain(table, attach(table))
    rest = await generation.next()
    entries = (first.logprobs or []) + (rest.logprobs or [])
    assert [entry.top_ids[0] for entry in entries] == first.token_ids + rest.token_ids == tokens_of(1, 6)


async def test_missing_logprobs_end_that_sequence_alone() -> None:
    """A token without the log-probabilities that were asked for ends its sequence with EngineFailed."""
    table, _engine = started()
    asked = table.submit(request(1, 6, sampling={"num_logprobs": 0}), 0.0, restarting=False)
    other = table.submit(request(2, 6), 0.0, restarting=False)
    ids = pack_ids([asked.sequence_id, other.sequence_id])
    table.on_step(StepOutput(stats=STATS, sequence_ids=ids, token_ids=pack_ids([1, 2])), 1.0)
    assert isinstance((await asked.next()).error, EngineFailed)
    assert (await other.next()).token_ids == [2]


@pytest.mark.parametrize("where", ["held", "waiting", "running", "ended"])
async def test_abort_is_safe_at_any_time(where: str) -> None:
    """Aborted twice wherever it is, a sequence ends once, leaves no count, and the engine hears of it only if it has it."""
    table = SequenceTable(8)
    engine = attach(table) if where != "held" else None
    generation = table.submit(request(1, 1 if where == "ended" else 9), 0.0, restarting=False)
    if engine and where != "waiting":
        engine.step(1.0)
    generation.abort()
    generation.abort()
    collected = await collect(generation)
    assert collected.finish_reason == ("length" if where == "ended" else "abort")
    if engine:
        assert engine.finished == ([] if where == "ended" else [(generation.sequence_id, "abort", "")])
    drain(table, attach(table))
    assert_empty(table)


async def test_finish_drops_what_lies_beyond() -> None:
    """Pending tokens beyond num_tokens are not delivered, those before it are, and the end is `finish`."""
    table, engine = started()
    generation = table.submit(request(1, 9), 0.0, restarting=False)
    for _ in range(5):
        engine.step(1.0)
    generation.finish(3)
    generation.finish(2)
    delta = await generation.next()
    assert (delta.token_ids, delta.finish_reason, len(delta.token_times)) == (tokens_of(1, 3), "finish", 3)
    engine.step(2.0)
    assert table.num_stale_tokens == 0
    assert_empty(table)


async def test_finish_below_what_was_taken_drops_all_that_is_pending() -> None:
    """A stop string found late drops every pending token with its time; what the handler took stays its own."""
    table, engine = started()
    generation = table.submit(request(1, 9), 0.0, restarting=False)
    for taken in (3, 0):
        for _ in range(3):
            engine.step(1.0)
        if taken:
            assert len((await generation.next()).token_ids) == taken
    generation.finish(1)
    delta = await generation.next()
    assert (delta.token_ids, delta.token_times, delta.finish_reason) == ([], [], "finish")


async def test_a_finished_sequence_is_not_resumed() -> None:
    """A crash between finish() and the engine's answer does not bring the sequence back."""
    table, engine = started()
    generation = table.submit(request(1, 9), 0.0, restarting=False)
    engine.step(1.0)
    generation.finish(1)
    table.detach(2.0, "x")
    assert attach(table).submits == []
    assert (await collect(generation)).finish_reason == "finish"


@pytest.mark.parametrize(
    ("fields", "reason"), [({"max_tokens": 2}, "length"), ({"sampling": {"stop_token_ids": tuple(tokens_of(1, 2))[1:]}}, "stop")]
)
async def test_a_sequence_past_its_stop_ends_at_the_crash(fields: dict[str, Any], reason: str) -> None:
    """If its last token arrived but its end did not, a crash ends it as the engine would have."""
    table, _ = started()
    generation = table.submit(request(1, **fields), 0.0, restarting=False)
    for token in tokens_of(1, 2):
        table.on_step(StepOutput(stats=STATS, sequence_ids=pack_ids([generation.sequence_id]), token_ids=pack_ids([token])), 1.0)
    table.detach(2.0, "x")
    collected = await collect(generation)
    assert (collected.token_ids, collected.finish_reason) == (tokens_of(1, 2), reason)
    assert_empty(table)


async def test_a_full_context_ends_a_probe_for_good() -> None:
    """A suspect that fills the context while alone ends with length and is not submitted again."""
    table, engine = started()
    generation = table.submit(request(1, 50), 0.0, restarting=False)
    for _ in range(2):
        engine.step(1.0)
        table.detach(2.0, "x")
        engine = attach(table, context_length=8)
    drain(table, engine)
    assert (await collect(generation)).finish_reason == "length"
    assert engine.alone_log == [1]


async def test_replay_resumes_with_the_events_of_the_ledger() -> None:
    """A sequence past its prefill is in engine_restart until its next token; one that waited queues and prefills like a new one."""
    table, engine = started(max_num_seqs=1)
    running = table.submit(request(1), 0.0, restarting=False)
    waiting = table.submit(request(2), 0.0, restarting=False)
    engine.step(1.0)
    await running.next()
    table.detach(2.0, "x")
    late = table.submit(request(3), 2.5, restarting=True)
    engine = attach(table, max_num_seqs=2)
    assert [event.kind for event in (await running.next()).events] == ["engine_restart"]
    engine.step(3.0)
    assert [(event.kind, event.at) for event in (await running.next()).events] == [("resumed", 3.0)]
    assert [event.kind for event in (await waiting.next()).events] == ["engine_restart", "resumed", "queued", "scheduled"]
    assert [event.kind for event in (await late.next()).events] == ["engine_restart", "resumed", "queued"]
    assert (running.num_restarts, waiting.num_restarts, late.num_restarts) == (1, 1, 0)


async def test_a_submission_carries_all_it_needs() -> None:
    """The frame of a resumption has prompt, outputs, sampling, age, deadline, priority, key and salt of the first one."""
    table, engine = started()
    generation = table.submit(request(1, deadline_at=99.0, priority=3, key_id="k", cache_salt="s"), 7.0, restarting=False)
    engine.step(8.0)
    table.detach(9.0, "x")
    first, again = engine.submits[0], attach(table).submits[0]
    assert again.output_ids == pack_ids(tokens_of(1, 1))
    for name in ("sequence_id", "prompt_ids", "sampling", "deadline_at", "queued_at", "priority", "key_id", "cache_salt", "alone"):
        assert getattr(again, name) == getattr(first, name)
    assert (first.queued_at, first.deadline_at, first.key_id) == (7.0, 99.0, "k")
    generation.abort()


async def test_the_waiting_are_bounded() -> None:
    """Beyond max_waiting never-scheduled sequences submit raises Unavailable with Retry-After, up or down, and recovers as they leave."""
    table = SequenceTable(3)
    generations = [table.submit(request(i), 0.0, restarting=True) for i in range(1, 4)]
    with pytest.raises(Unavailable) as refused:
        table.submit(request(9), 0.0, restarting=True)
    assert refused.value.code == "queue_full"
    assert refused.value.retry_after_seconds is not None
    engine = attach(table, max_num_seqs=2)
    engine.step(1.0)
    generations.append(table.submit(request(9), 1.0, restarting=False))
    drain(table, engine)
    assert [(await collect(g)).finish_reason for g in generations] == ["length"] * 4


async def test_a_replay_does_not_overflow_the_engines_queue() -> None:
    """Running and waiting sequences together exceed the engine's queue; they are sent as room comes, the running ones first."""
    table, engine = started(4, max_num_seqs=4, max_waiting=4)
    generations = [table.submit(request(i, 5), 0.0, restarting=False) for i in range(1, 5)]
    engine.step(1.0)
    generations += [table.submit(request(i, 5), 0.0, restarting=False) for i in range(5, 9)]
    table.detach(2.0, "x")
    engine = attach(table, max_num_seqs=4, max_waiting=4)
    assert [submit.sequence_id for submit in engine.submits] == [1, 2, 3, 4]
    drain(table, engine)
    assert engine.rejected == []
    assert [(await collect(g)).token_ids for g in generations] == [tokens_of(i, 5) for i in range(1, 9)]


async def test_a_replayed_sequence_survives_a_full_queue() -> None:
    """queue_full ends a new sequence with Unavailable, but one that was accepted before tries again."""
    table, engine = started(8, max_waiting=8)
    old = table.submit(request(1, 5), 0.0, restarting=False)
    engine.step(1.0)
    table.detach(2.0, "x")
    engine = attach(table)
    engine.waiting.clear()
    table.on_rejected(Rejected(old.sequence_id, "queue_full", "full"), 2.0)
    new = table.submit(request(2), 2.0, restarting=False)
    table.on_tick(2.1)
    table.on_rejected(Rejected(new.sequence_id, "queue_full", "full"), 2.2)
    error = (await collect(new)).error
    assert isinstance(error, Unavailable)
    engine.waiting = [row for row in engine.waiting if row.submit.sequence_id == old.sequence_id]
    drain(table, engine)
    assert (await collect(old)).token_ids == tokens_of(1, 5)
    assert_empty(table)


async def test_rejections_and_errors_map_to_the_error_tree() -> None:
    """context_length_exceeded becomes a 400 wherever it comes from, other errors of one sequence a 500 for it alone."""
    table, _ = started()
    rejected, failed, too_long = (table.submit(request(i), 0.0, restarting=False) for i in range(1, 4))
    table.on_rejected(Rejected(rejected.sequence_id, "context_length_exceeded", "too long"), 1.0)
    finished = ((failed.sequence_id, "error", "NaN"), (too_long.sequence_id, "error", "context_length_exceeded: the pool is too small"))
    table.on_step(StepOutput(stats=STATS, sequence_ids=b"", token_ids=b"", finished=finished), 1.0)
    errors = [(await collect(g)).error for g in (rejected, failed, too_long)]
    assert [type(error) for error in errors] == [ContextLengthExceeded, EngineFailed, ContextLengthExceeded]
    assert [str(error) for error in errors] == ["too long", "NaN", "the pool is too small"]
    assert_empty(table)


@pytest.mark.parametrize("where", ["held", "waiting", "running"])
async def test_deadlines_hold_everywhere(where: str) -> None:
    """Past its deadline a sequence ends with DeadlineExceeded though no engine says so, and the engine is told if it has it."""
    table = SequenceTable(8)
    engine = attach(table) if where != "held" else None
    generation = table.submit(request(1, deadline_at=5.0), 0.0, restarting=False)
    if engine and where == "running":
        engine.step(1.0)
    table.on_tick(4.9)
    assert len(table) == 1
    table.on_tick(5.0)
    collected = await collect(generation)
    assert collected.finish_reason == "deadline"
    assert isinstance(collected.error, DeadlineExceeded)
    if engine:
        assert engine.finished == [(generation.sequence_id, "abort", "")]
    assert_empty(table)


def crash_with(table: SequenceTable, engine: ModelEngine, poison: int) -> bool:
    """Step; True if the poison was in the batch, and so the engine died before it could say anything."""
    engine.schedule()
    return any(row.prompt_ids[0] == poison for row in engine.running)


@pytest.mark.parametrize("announce", [True, False])
async def test_a_poisoned_prompt_is_convicted_alone(announce: bool) -> None:
    """A prompt that kills the engine in its first step dies at the third crash, alone; its neighbours lose nothing, nor does the queue."""
    table, engine = started(20, max_num_seqs=4, announce=announce)
    innocent = [table.submit(request(i, 30), float(i), restarting=False) for i in range(1, 4)]
    engine.step(4.0)
    poisoned = table.submit(request(66, 30), 5.0, restarting=False)
    queued = table.submit(request(4, 30), 6.0, restarting=False)
    num_crashes, convictions, alone = 0, [], []
    for _ in range(400):
        if not len(table):
            break
        if crash_with(table, engine, 66):
            num_crashes += 1
            convictions.append(table.detach(7.0, "boom"))
            alone += engine.alone_log
            engine = attach(table, max_num_seqs=4, announce=announce)
        else:
            engine.step(8.0)
    assert (num_crashes, convictions) == (3, [False, False, True])
    assert alone + engine.alone_log == [66], "once it is convicted its neighbours need no probe"
    error = (await collect(poisoned)).error
    assert isinstance(error, EngineFailed)
    assert "boom" in str(error)
    for first, generation in zip((1, 2, 3, 4), [*innocent, queued], strict=True):
        assert (await collect(generation)).token_ids == tokens_of(first, 30)
    assert_empty(table)


async def test_innocent_suspects_run_alone_shortly_and_then_together() -> None:
    """In flight at two crashes, each runs alone for a few tokens, the newest first, and then they share the batch again."""
    table, engine = started()
    generations = [table.submit(request(i, 20), float(i), restarting=False) for i in range(1, 4)]
    for _ in range(2):
        engine.step(1.0)
        table.detach(2.0, "x")
        engine = attach(table)
    assert table.submit(request(9), 3.0, restarting=False).stage is Stage.HELD, "newcomers wait for the probes"
    drain(table, engine)
    assert engine.alone_log == [3, 2, 1]
    probe = engine.submits[0]
    assert probe.sampling.max_tokens == 2 + PROBE_TOKENS
    assert [submit.alone for submit in engine.submits] == [True, True, True, False, False, False, False]
    for first, generation in enumerate(generations, 1):
        collected = await collect(generation)
        assert (collected.token_ids, collected.finish_reason) == (tokens_of(first, 20), "length")


async def test_nothing_is_taken_for_a_sequence_that_waits_its_turn() -> None:
    """Tokens and events under the id of a sequence that was cleared and waits to be sent again are stale."""
    table, engine = started()
    generations = [table.submit(request(i, 20), float(i), restarting=False) for i in (1, 2)]
    for _ in range(2):
        engine.step(1.0)
        table.detach(2.0, "x")
        engine = attach(table)
    while engine.alone_log == [2]:
        engine.step(3.0)
    held = generations[1]
    num_outputs = len(held.outputs)
    events = (SequenceEvent(held.sequence_id, "scheduled", 3.0, 0),)
    table.on_step(StepOutput(stats=STATS, sequence_ids=pack_ids([held.sequence_id]), token_ids=pack_ids([1]), events=events), 3.0)
    assert (held.stage, len(held.outputs), table.num_stale_tokens) == (Stage.HELD, num_outputs, 1)
    drain(table, engine)
    assert (await collect(held)).token_ids == tokens_of(2, 20)


async def test_waiting_in_the_queue_is_no_suspicion() -> None:
    """A sequence that was only queued at many crashes never has to run alone, nor does a preempted one."""
    table, engine = started(max_num_seqs=1)
    running = table.submit(request(1, 40), 0.0, restarting=False)
    waiting = table.submit(request(2, 3), 0.0, restarting=False)
    for _ in range(3):
        engine.step(1.0)
        table.on_events((SequenceEvent(running.sequence_id, "preempted", 1.0, 1),))
        table.detach(2.0, "x")
        engine = attach(table, max_num_seqs=1)
    assert isinstance(running, OpenSequence)
    assert isinstance(waiting, OpenSequence)
    assert (running.num_crashes, waiting.num_crashes, running.num_preemptions) == (0, 0, 3)
    drain(table, engine)
    assert engine.alone_log == []


async def test_an_aborted_probe_keeps_the_engine_until_its_end_is_reported() -> None:
    """The next suspect does not join while the aborted one may still be in the batch, nor is it blamed for a crash then."""
    table, engine = started()
    generations = [table.submit(request(i, 20), float(i), restarting=False) for i in (1, 2)]
    for _ in range(2):
        engine.step(1.0)
        table.detach(2.0, "x")
        engine = attach(table)
    generations[1].abort()
    table.on_tick(3.0)
    assert engine.alone_log == [2]
    engine.step(3.0)
    assert engine.alone_log == [2, 1]
    drain(table, engine)
    assert (await collect(generations[0])).token_ids == tokens_of(1, 20)


async def test_a_slow_socket_holds_prompts_back_unencoded() -> None:
    """While the link is not writable nothing is sent; sequences may be aborted meanwhile and go out once it drains."""
    table, engine = started()
    engine.writable = False
    kept, dropped = (table.submit(request(i), 0.0, restarting=False) for i in (1, 2))
    assert engine.submits == []
    dropped.abort()
    engine.writable = True
    table.pump(1.0)
    assert [submit.sequence_id for submit in engine.submits] == [kept.sequence_id]


async def test_sequence_ids_wrap_around_those_in_use() -> None:
    """Ids stay within int32 and never name two open sequences."""
    table, _ = started()
    first = table.submit(request(1), 0.0, restarting=False)
    table._ids = iter([MAX_SEQUENCE_ID, MAX_SEQUENCE_ID + 1])  # type: ignore[assignment]
    assert table.submit(request(2), 0.0, restarting=False).sequence_id == MAX_SEQUENCE_ID
    assert table.submit(request(3), 0.0, restarting=False).sequence_id == first.sequence_id + 1


async def test_mismatched_arrays_are_refused() -> None:
    """A step whose ids and tokens differ in number raises ValueError."""
    table, _ = started()
    with pytest.raises(ValueError, match="argument 2"):
        table.on_step(StepOutput(stats=STATS, sequence_ids=pack_ids([1]), token_ids=pack_ids([1, 2])), 1.0)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 25)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("crash"), st.booleans()),
        st.tuples(st.just("attach"), st.just(0)),
        st.tuples(st.sampled_from(["abort", "finish", "take"]), st.integers(0, 30)),
        st.tuples(st.just("block"), st.booleans()),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(operations, st.booleans(), st.integers(1, 5))
def test_any_schedule_of_crashes_yields_the_uncrashed_tokens(script: list[tuple[str, Any]], announce: bool, max_num_seqs: int) -> None:
    """Under any order of submissions, steps, crashes, aborts and takes, each sequence's tokens are those of an engine that never crashed."""
    asyncio.run(_play(script, announce=announce, max_num_seqs=max_num_seqs))


async def _play(script: list[tuple[str, Any]], **options: Any) -> None:
    table = SequenceTable(6)
    engine: ModelEngine | None = attach(table, **options)
    opened: list[tuple[int, int, OpenSequence, Collected, list[int | None]]] = []
    now = 0.0
    for kind, value in script:
        now += 1.0
        if kind == "submit":
            first = len(opened) + 1
            try:
                opened.append((first, value, table.submit(request(first, value), now, restarting=engine is None), Collected(), [None]))
            except Unavailable:
                continue
        elif kind == "step" and engine is not None:
            for _ in range(value):
                engine.step(now)
        elif kind == "crash" and engine is not None:
            engine.step(now, lose_output=value)
            table.detach(now, "x")
            engine = None
        elif kind == "attach" and engine is None:
            engine = attach(table, **options)
        elif kind == "block" and engine is not None:
            engine.writable = not value
            table.on_tick(now)
        elif kind in ("abort", "finish", "take") and opened:
            await _act(kind, opened[value % len(opened)], value)
    if engine is None:
        engine = attach(table, **options)
    engine.writable = True
    drain(table, engine, now + 1.0)
    for first, max_tokens, generation, collected, cut_at in opened:
        if collected.finish_reason is None and collected.error is None:
            collected.add(await generation.next())
        _check(first, max_tokens, collected, cut_at[0])
    assert_empty(table)
    assert table._probe_id is None or any(row.submit.sequence_id == table._probe_id for row in engine.running) or engine.finished


async def _act(kind: str, entry: tuple[int, int, OpenSequence, Collected, list[int | None]], value: int) -> None:
    _, _, generation, collected, cut_at = entry
    if kind == "abort":
        generation.abort()
    elif kind == "finish":
        if generation.stage is not Stage.ENDED and cut_at[0] is None:
            cut_at[0] = max(len(collected.token_ids), value)
        generation.finish(max(len(collected.token_ids), value))
    elif generation._times or generation._events or generation.stage is Stage.ENDED:
        collected.add(await generation.next())


def _check(first: int, max_tokens: int, collected: Collected, cut_at: int | None) -> None:
    expected = tokens_of(first, max_tokens)
    if collected.error is not None:
        assert isinstance(collected.error, EngineFailed)  # it happened to run alone at a third crash
        assert collected.token_ids == expected[: len(collected.token_ids)]
    elif collected.finish_reason == "length":
        assert collected.token_ids == expected
    elif collected.finish_reason == "finish":
        assert cut_at is not None
        assert collected.token_ids == expected[: min(cut_at, len(collected.token_ids))]
    else:
        assert collected.finish_reason == "abort"
        assert collected.token_ids == expected[: len(collected.token_ids)]


async def test_end_commands_reach_the_engine_in_order() -> None:
    """What a handler asks of a running sequence is sent after its Submit, once."""
    sent: list[Any] = []

    class Link:
        writable = True

        def send(self, message: Any) -> None:
            sent.append(message)

    table = SequenceTable(8)
    engine = ModelEngine(table)
    table.attach(Link(), engine.facts, 0.0)
    one, two = (table.submit(request(i), 0.0, restarting=False) for i in (1, 2))
    one.abort()
    two.finish(0)
    one.finish(3)
    assert [type(message).__name__ for message in sent] == ["Submit", "Submit", "Abort", "Finish"]
    assert sent[2:] == [Abort(one.sequence_id), Finish(two.sequence_id, 0)]
