"""The wire: what is encoded comes back whole, however the stream is cut, and what is broken is refused."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.engine.wire import (
    MAX_FRAME_BYTES,
    Abort,
    Events,
    Failure,
    Finish,
    FrameReader,
    FromEngine,
    Heartbeat,
    Rejected,
    Sampling,
    SequenceEvent,
    Start,
    StepOutput,
    Submit,
    ToEngine,
    TokenLogprobs,
    encode,
    pack_ids,
    unpack_ids,
)
from appliance.events import StepStats

ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50)
sequence_id = st.integers(0, 2**31 - 1)
finite = st.floats(allow_nan=False, width=64)
text = st.text(max_size=30)
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 2**31),
    seed=st.integers(-(2**63), 2**63 - 1),
    temperature=finite,
    logit_bias=st.dictionaries(st.integers(0, 10**6), finite, max_size=3),
    stop_token_ids=st.lists(st.integers(0, 10**6), max_size=3).map(tuple),
    num_logprobs=st.none() | st.integers(0, 20),
)
to_engine = st.one_of(
    st.builds(Abort, sequence_id),
    st.builds(Finish, sequence_id, st.integers(0, 10**6)),
    st.builds(Start, model_path=text, cache_dir=text, context_length=st.none() | st.integers(16, 10**6)),
    st.builds(
        Submit,
        sequence_id=sequence_id,
        prompt_ids=ids.map(pack_ids),
        output_ids=ids.map(pack_ids),
        sampling=samplings,
        deadline_at=st.none() | finite,
        cache_salt=text,
        alone=st.booleans(),
    ),
)
events = st.lists(st.builds(SequenceEvent, sequence_id, text, finite, st.integers(0, 10**6)), max_size=4).map(tuple)
stats = st.integers(0, 10**9).map(
    lambda step: StepStats(**{**dict.fromkeys(StepStats.__struct_fields__, 0), "chunks": (), "block_ends": None, "step": step, "graph_hit": True})
)
logprobs = st.dictionaries(sequence_id, st.builds(TokenLogprobs, finite, sequence_id, st.just((1, 2)), st.just((-1.0, -2.0))), max_size=3)
from_engine = st.one_of(
    st.builds(Heartbeat, text, finite, st.just(float("inf")) | finite, finite, text),
    st.builds(Rejected, sequence_id, text, text),
    st.builds(Failure, text, st.booleans()),
    st.builds(Events, events),
    st.builds(
        StepOutput,
        stats=stats,
        sequence_ids=ids.map(pack_ids),
        token_ids=ids.map(pack_ids),
        finished=st.lists(st.tuples(sequence_id, text, text), max_size=3).map(tuple),
        events=events,
        logprobs=st.none() | logprobs,
    ),
)


def cut(stream: bytes, lengths: list[int]) -> list[bytes]:
    """`stream` in pieces of these lengths, over and over."""
    pieces, at, turn = [], 0, 0
    while at < len(stream):
        length = lengths[turn % len(lengths)]
        pieces.append(stream[at : at + length])
        at, turn = at + length, turn + 1
    return pieces


@settings(deadline=None)
@given(st.lists(to_engine, max_size=6), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_frames_to_the_engine_survive_any_cutting(messages: list[Any], lengths: list[int]) -> None:
    """Messages come back equal and in order however the stream is split."""
    reader = FrameReader(ToEngine)
    received = [m for piece in cut(b"".join(map(encode, messages)), lengths) for m in reader.feed(piece)]
    assert received == messages


@settings(deadline=None)
@given(st.lists(from_engine, max_size=6), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_frames_from_the_engine_survive_any_cutting(messages: list[Any], lengths: list[int]) -> None:
    """Messages come back equal and in order however the stream is split."""
    reader = FrameReader(FromEngine)
    received = [m for piece in cut(b"".join(map(encode, messages)), lengths) for m in reader.feed(piece)]
    assert received == messages


@given(ids)
def test_packed_ids_come_back(token_ids: list[int]) -> None:
    """Ids take four bytes each and come back equal."""
    packed = pack_ids(token_ids)
    assert len(packed) == 4 * len(token_ids)
    assert unpack_ids(packed) == token_ids


@pytest.mark.parametrize("token_id", [2**31, -(2**31) - 1])
def test_ids_outside_int32_are_refused(token_id: int) -> None:
    """An id that does not fit raises instead of wrapping round."""
    with pytest.raises(OverflowError):
        pack_ids([token_id])


def test_half_an_id_is_refused() -> None:
    """Bytes that are no whole number of ids raise ValueError."""
    with pytest.raises(ValueError, match="multiple"):
        unpack_ids(b"\x01\x00\x00")


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=60))
def test_noise_in_a_frame_raises_or_decodes_but_never_else(noise: bytes) -> None:
    """A whole frame of noise gives a message of the union or one of the two documented errors."""
    reader = FrameReader(FromEngine)
    try:
        messages = reader.feed(struct.pack("<I", len(noise)) + noise)
    except (msgspec.ValidationError, msgspec.DecodeError, ValueError):
        return
    assert len(messages) == 1


@settings(deadline=None)
@given(from_engine, st.data())
def test_a_damaged_frame_is_never_taken_for_two(message: Any, data: st.DataObject) -> None:
    """One flipped byte in a frame's body raises or yields at most that one message."""
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(4, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(msgspec.ValidationError, msgspec.DecodeError, ValueError):
        assert len(FrameReader(FromEngine).feed(bytes(frame))) <= 1


def test_a_frame_over_the_limit_is_refused_from_its_prefix() -> None:
    """A length over the limit raises before a single byte of the body is buffered."""
    with pytest.raises(ValueError, match="over the limit"):
        FrameReader(FromEngine).feed(struct.pack("<I", MAX_FRAME_BYTES + 1))


def test_a_message_of_the_other_direction_is_refused() -> None:
    """The engine's side does not accept what only an engine says."""
    with pytest.raises(msgspec.ValidationError):
        FrameReader(ToEngine).feed(encode(Failure("no", permanent=False)))


def test_the_reader_keeps_no_more_than_the_incomplete_frame() -> None:
    """After many frames only the unfinished one is buffered."""
    reader = FrameReader(FromEngine)
    frame = encode(Rejected(1, "queue_full", "x" * 1000))
    for _ in range(100):
        assert len(reader.feed(frame[10:] if _ else frame)) == 1
        assert reader.feed(frame[:10]) == []
        assert len(reader._buffer) == 10
