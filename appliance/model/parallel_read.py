"""Byte ranges of files read by several threads into tensors on a device, ahead of the loader that takes them.

A reader copies a piece from the page cache (or the disk) into a pinned buffer of its own and sends it to the device on a stream of its own, while it
reads the next one into its other buffer: disk, host memory and bus are busy at once. One thread of a host copies 3-6 GB/s and one page fault at
a time reads 128 KiB; a pageable copy to the device does both in turn. On a CPU device pieces are read straight into the tensor.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from appliance.errors import ModelError

PIECE_BYTES: Final = 8 << 20
WINDOW_BYTES: Final = 512 << 20  # read or being read, and not yet taken
MAX_READERS: Final = 8


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor's bytes lie."""

    name: str
    path: Path
    offset: int
    num_bytes: int


@dataclass(slots=True)
class _Arrival:
    """A tensor on its way. `missing` counts its pieces; guarded by the reader's lock."""

    target: Tensor
    missing: int
    ready: torch.cuda.Event | None  # the memory of `target` is free of earlier work
    copied: list[torch.cuda.Event] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Piece:
    arrival: _Arrival
    span: Span
    start: int
    end: int


class ParallelReader:
    """Reads `spans` in their order, at most `window_bytes` ahead of what was taken. `take` and `close` belong to one thread.

    num_readers: default one a core, at most 8.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        device: torch.device,
        *,
        num_readers: int | None = None,
        window_bytes: int = WINDOW_BYTES,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._window_bytes = window_bytes
        self._piece_bytes = piece_bytes
        self._spans = {span.name: span for span in spans}
        self._ahead = collections.deque(span.name for span in spans)
        self._arrivals: dict[str, _Arrival] = {}
        self._bytes_held = 0
        self._files: dict[Path, int] = {}
        self._lock = threading.Condition()
        self._pieces: collections.deque[_Piece] = collections.deque()
        self._error: BaseException | None = None
        self._closed = False
        count = num_readers or min(MAX_READERS, len(os.sched_getaffinity(0)))
        self._threads = [threading.Thread(target=self._run, name=f"weights-{i}", daemon=True) for i in range(count)]
        self._schedule_ahead()
        for thread in self._threads:
            thread.start()

    def take(self, name: str) -> Tensor:
        """The bytes of a span, `[num_bytes]` uint8 on the device, for use on the current stream. A span can be taken again: it is read again.

        Raises ModelError where its file cannot be read or is cut short.
        """
        if name not in self._arrivals:
            self._schedule(self._spans[name], urgent=True)
        with self._lock:
            arrival = self._arrivals.pop(name)
            self._lock.wait_for(lambda: arrival.missing == 0 or self._error is not None)
            if self._error is not None:
                raise self._error
        self._bytes_held -= self._spans[name].num_bytes
        for event in arrival.copied:
            torch.cuda.current_stream(self._device).wait_event(event)
        self._schedule_ahead()
        return arrival.target

    def close(self) -> None:
        """End the threads and close the files. What was taken stays valid."""
        with self._lock:
            self._closed = True
            self._pieces.clear()
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._arrivals.clear()

    def _schedule_ahead(self) -> None:
        while self._ahead and self._bytes_held < self._window_bytes:
            name = self._ahead.popleft()
            if name not in self._arrivals:
                self._schedule(self._spans[name], urgent=False)

    def _schedule(self, span: Span, *, urgent: bool) -> None:
        """Allocate on the caller's stream and hand the pieces to the readers; urgent ones before all others."""
        if urgent:
            self._ahead = collections.deque(name for name in self._ahead if name != span.name)
        if span.path not in self._files:
            try:
                self._files[span.path] = os.open(span.path, os.O_RDONLY)
            except OSError as error:
                raise ModelError(f"{span.path} cannot be read: {error}") from error
        target = torch.empty(span.num_bytes, dtype=torch.uint8, device=self._device)
        ready = None
        if self._is_cuda:  # the allocator may have given memory that kernels of this stream still read
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        starts = range(0, span.num_bytes, self._piece_bytes)
        arrival = _Arrival(target, len(starts), ready)
        pieces = [_Piece(arrival, span, start, min(start + self._piece_bytes, span.num_bytes)) for start in starts]
        self._bytes_held += span.num_bytes
        with self._lock:
            self._arrivals[span.name] = arrival
            if urgent:
                self._pieces.extendleft(reversed(pieces))
            else:
                self._pieces.extend(pieces)
            self._lock.notify_all()

    def _run(self) -> None:
        try:
            staging = _PinnedBuffers(self._device, self._piece_bytes) if self._is_cuda else None
            while (piece := self._next()) is not None:
                if staging is None:
                    self._read(piece, piece.arrival.target[piece.start : piece.end])
                    copied = None
                else:
                    copied = staging.send(piece, self._read)
                with self._lock:
                    piece.arrival.missing -= 1
                    if copied is not None:
                        piece.arrival.copied.append(copied)
                    if piece.arrival.missing == 0:
                        self._lock.notify_all()
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
                self._lock.notify_all()

    def _next(self) -> _Piece | None:
        with self._lock:
            self._lock.wait_for(lambda: self._pieces or self._closed or self._error is not None)
            return self._pieces.popleft() if self._pieces and self._error is None else None

    def _read(self, piece: _Piece, host: Tensor) -> None:
        """Fill `host`, host memory of the piece's size."""
        view = host.numpy().data
        at = piece.span.offset + piece.start
        descriptor = self._files[piece.span.path]
        while view:
            try:
                count = os.preadv(descriptor, [view], at)
            except OSError as error:
                raise ModelError(f"{piece.span.path} cannot be read: {error}") from error
            if count == 0:
                raise ModelError(f"{piece.span.path}: {piece.span.name} ends behind the file, which is cut short")
            view, at = view[count:], at + count


class _PinnedBuffers:
    """Two pinned buffers and a stream of one reader thread: while one is on its way to the device, the other is filled."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def send(self, piece: _Piece, read: Callable[[_Piece, Tensor], None]) -> torch.cuda.Event:
        """Read the piece and start its copy; the event passes when it has arrived."""
        turn, self._turn = self._turn, 1 - self._turn
        if (sent := self._sent[turn]) is not None:
            sent.synchronize()
        host = self._buffers[turn][: piece.end - piece.start]
        read(piece, host)
        with torch.cuda.stream(self._stream):
            if piece.arrival.ready is not None:
                self._stream.wait_event(piece.arrival.ready)
            piece.arrival.target[piece.start : piece.end].copy_(host, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._sent[turn] = event
        return event
