"""The socket's server end: what is written when, what counts as writable, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

from appliance.engine.connection import EngineConnection
from appliance.engine.wire import Abort, Failure, FrameReader, Sampling, Submit, ToEngine, encode, pack_ids


class RecordingTransport(asyncio.Transport):
    """Remembers writes."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.aborted = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True


class Peer:
    """A connection with its transport and all it reports."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.lost: list[str | None] = []
        self.num_writable = 0
        self.connection = EngineConnection(self.messages.extend, self._on_writable, self.lost.append)
        self.transport = RecordingTransport()

    def _on_writable(self) -> None:
        self.num_writable += 1

    def received(self) -> list[object]:
        """What the engine would have read."""
        return FrameReader(ToEngine).feed(b"".join(self.transport.writes))


def large(sequence_id: int) -> Submit:
    """A frame of more than 800 kB."""
    return Submit(sequence_id=sequence_id, prompt_ids=pack_ids(range(200_000)), sampling=Sampling(max_tokens=1, seed=1))


async def test_frames_of_one_tick_are_one_write() -> None:
    """Frames sent before and after the connection is made go out in order, those of one tick together."""
    peer = Peer()
    peer.connection.send(Abort(1))
    peer.connection.connection_made(peer.transport)
    for sequence_id in (2, 3, 4):
        peer.connection.send(Abort(sequence_id))
    await asyncio.sleep(0)
    assert len(peer.transport.writes) == 2
    assert peer.received() == [Abort(1), Abort(2), Abort(3), Abort(4)]


async def test_a_full_tick_is_not_writable_until_it_is_flushed() -> None:
    """Over a megabyte pending stops large frames and the flush asks for more; small ones are always taken."""
    peer = Peer()
    peer.connection.connection_made(peer.transport)
    peer.connection.send(large(1))
    assert peer.connection.writable
    peer.connection.send(large(2))
    assert not peer.connection.writable
    peer.connection.send(Abort(1))
    await asyncio.sleep(0)
    assert (peer.connection.writable, peer.num_writable, len(peer.received())) == (True, 1, 3)


async def test_a_full_transport_is_not_writable_until_it_drains() -> None:
    """Between pause_writing and resume_writing large frames wait; the end of it asks for more."""
    peer = Peer()
    peer.connection.connection_made(peer.transport)
    peer.connection.pause_writing()
    assert not peer.connection.writable
    peer.connection.resume_writing()
    assert (peer.connection.writable, peer.num_writable) == (True, 1)


async def test_a_broken_frame_ends_it_once() -> None:
    """Garbage is reported once with its reason; later data, writes and the loss of the transport change nothing."""
    peer = Peer()
    peer.connection.connection_made(peer.transport)
    peer.connection.data_received(encode(Failure("good", permanent=False)))
    peer.connection.data_received(b"\x01\x00\x00\x00\xc1")
    peer.connection.data_received(encode(Failure("late", permanent=False)))
    peer.connection.connection_lost(None)
    peer.connection.send(Abort(1))
    await asyncio.sleep(0)
    assert peer.messages == [Failure("good", permanent=False)]
    assert len(peer.lost) == 1
    assert "broken frame" in str(peer.lost[0])
    assert (peer.transport.aborted, peer.transport.writes, peer.connection.writable) == (True, [], False)


async def test_a_close_of_ours_is_no_loss() -> None:
    """After close nothing is reported, and a transport that comes late is closed too."""
    peer = Peer()
    peer.connection.close()
    peer.connection.connection_made(peer.transport)
    peer.connection.connection_lost(None)
    assert (peer.lost, peer.transport.aborted) == ([], True)
