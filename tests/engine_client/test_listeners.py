"""Listeners: who is called, when and how often."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref

import pytest
from engine_harness import request
from model_engine import ModelEngine

from appliance.engine.client import Delta
from appliance.engine.replay import SequenceTable
from appliance.errors import Unavailable


def started() -> tuple[SequenceTable, ModelEngine]:
    """A table with a ready engine attached."""
    table = SequenceTable(8)
    engine = ModelEngine(table)
    table.attach(engine, engine.facts, 0.0)
    return table, engine


async def test_a_shared_listener_is_called_once_a_tick() -> None:
    """Two sequences, three steps, one call, and never inside the table's own."""
    table, engine = started()
    generations = [table.submit(request(first, 9), 0.0, restarting=False) for first in (1, 2)]
    taken: list[list[Delta]] = []

    def listener() -> None:
        taken.append([generation.take() for generation in generations])

    for generation in generations:
        generation.listen(listener, every_token=True)
    for now in (1.0, 1.1, 1.2):
        engine.step(now)
    assert taken == []
    await asyncio.sleep(0)
    assert [[len(delta.token_ids) for delta in deltas] for deltas in taken] == [[3, 3]]
    assert generations[0].take() == Delta([], [], None, [], None, None)
    await asyncio.sleep(0)
    assert len(taken) == 1


async def test_what_came_before_the_listener_is_told_at_once() -> None:
    """Listening to a sequence that has something to take already calls the listener in the next tick."""
    table, engine = started()
    generation = table.submit(request(1, 9), 0.0, restarting=False)
    engine.step(1.0)
    calls: list[int] = []
    generation.listen(lambda: calls.append(1), every_token=True)
    await asyncio.sleep(0)
    assert calls == [1]


async def test_without_every_token_only_the_first_and_the_end_wake() -> None:
    """The tokens between wait, and come with the end, each with its own time."""
    table, engine = started()
    generation = table.submit(request(1, 5), 0.0, restarting=False)
    deltas: list[Delta] = []
    generation.listen(lambda: deltas.append(generation.take()), every_token=False)
    for now in (1.0, 2.0, 3.0, 4.0, 5.0):
        engine.step(now)
        await asyncio.sleep(0)
    assert [delta.token_times for delta in deltas] == [[1.0], [2.0, 3.0, 4.0, 5.0]]
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("end", ["abort", "end_all"])
async def test_an_end_wakes_the_listener(end: str) -> None:
    """So that no handler waits for a sequence that is gone."""
    table, engine = started()
    generation = table.submit(request(1, 5), 0.0, restarting=False)
    deltas: list[Delta] = []
    generation.listen(lambda: deltas.append(generation.take()), every_token=False)
    engine.step(1.0)
    await asyncio.sleep(0)
    if end == "abort":
        generation.abort()
    else:
        table.end_all(lambda: Unavailable("bye"))
    await asyncio.sleep(0)
    assert len(deltas) == 2
    assert (deltas[-1].finish_reason == "abort") == (end == "abort")
    assert isinstance(deltas[-1].error, Unavailable) == (end == "end_all")


@pytest.mark.parametrize("late", [False, True], ids=["while it runs", "after its end"])
async def test_an_ended_sequence_lets_go_of_its_listener(late: bool) -> None:
    """A listener holds its sequence, and with it the whole request: in a circle they would stay until garbage is collected."""
    table, engine = started()

    class Handler:
        def __init__(self) -> None:
            self.generation = table.submit(request(1, 2), 0.0, restarting=False)
            self.deltas: list[Delta] = []

        def take(self) -> None:
            self.deltas.append(self.generation.take())

    handler = Handler()
    if not late:
        handler.generation.listen(handler.take, every_token=True)
    for now in (1.0, 2.0):
        engine.step(now)
    if late:
        handler.generation.listen(handler.take, every_token=True)
    await asyncio.sleep(0)
    assert handler.deltas[-1].finish_reason == "length"
    gone = weakref.ref(handler)
    gc.disable()
    try:
        del handler
        assert gone() is None
    finally:
        gc.enable()


async def test_a_listener_that_fails_does_not_take_others_along(caplog: pytest.LogCaptureFixture) -> None:
    """Its exception is logged, and the next listener called."""
    table, engine = started()
    one, two = (table.submit(request(first, 5), 0.0, restarting=False) for first in (1, 2))
    calls: list[int] = []

    def failing() -> None:
        raise ZeroDivisionError

    one.listen(failing, every_token=True)
    two.listen(lambda: calls.append(2), every_token=True)
    with caplog.at_level(logging.ERROR):
        engine.step(1.0)
        await asyncio.sleep(0)
    assert calls == [2]
    assert "a listener failed" in caplog.text
