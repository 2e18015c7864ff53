"""Rows on disk while the database is away: segments of JSON lines, replayed oldest first."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from appliance.store.rows import Row

_log = logging.getLogger(__name__)

_SEGMENT_BYTES = 4 * 1024 * 1024
MAX_SPOOL_BYTES = 2 * 1024 * 1024 * 1024  # some three million ledger rows; beyond it we would rather lose rows than fill the operator's disk

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(tuple[str, Row])


class SpoolFull(OSError):
    """The spool has reached its bound."""


class Spool:
    """A folder of segments `rows-<number>.jsonl`. Thread-safe; blocks on the disk, so call it in a thread.

    Rows are in the file when `append` returns, or, if it raises, not at all. Reading deletes nothing: `remove` does, once the rows are in the
    database, so a crash in between replays a segment and the database ignores what it has.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_SPOOL_BYTES) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._counts: dict[Path, int] = {}  # rows of each segment, oldest first
        self._bytes: dict[Path, int] = {}
        self._open: Path | None = None  # the segment that is appended to
        self._next = 0
        self.num_broken = 0  # lines that a crash tore
        self._scan()

    @property
    def num_rows(self) -> int:
        """Rows that wait on disk."""
        return sum(self._counts.values())

    def append(self, rows: Sequence[tuple[str, Row]], *, durable: bool = True) -> None:
        """Write rows at the end; `durable` also waits for the disk. Raises OSError, and then nothing was written."""
        data = b"".join(_encoder.encode(row) + b"\n" for row in rows)
        with self._lock:
            if sum(self._bytes.values()) + len(data) > self._max_bytes:
                raise SpoolFull(f"{self.folder} has reached {self._max_bytes} bytes")
            path = self._open
            if path is None or self._bytes[path] >= _SEGMENT_BYTES:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"rows-{self._next:010d}.jsonl"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                self._write(descriptor, data, self._bytes.get(path, 0))
            except OSError:
                os.close(descriptor)
                raise
            if path is not self._open:
                self._open, self._next = path, self._next + 1
            self._counts[path] = self._counts.get(path, 0) + len(rows)
            self._bytes[path] = self._bytes.get(path, 0) + len(data)
        try:
            if durable:  # outside the lock: a slow disk must not hold up the event loop's own append
                os.fsync(descriptor)
        except OSError as error:
            _log.warning("%s: fsync: %s", path, error)  # the rows are in the file all the same
        finally:
            os.close(descriptor)

    def oldest(self) -> tuple[Path, list[tuple[str, Row]]] | None:
        """The oldest segment with its rows; None when empty. The segment takes no more rows. A torn line is counted and left out."""
        with self._lock:
            path = next(iter(self._counts), None)
            if path is None:
                return None
            if path == self._open:
                self._open = None
        rows = []
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            _log.error("%s is gone, and %d rows with it", path, self._counts[path])
            self.num_broken += self._counts[path]
            data = b""
        for line in data.splitlines():
            try:
                rows.append(_decoder.decode(line))
            except msgspec.DecodeError:
                self.num_broken += 1
        return path, rows

    def remove(self, path: Path) -> None:
        """Forget a segment whose rows are in the database."""
        path.unlink(missing_ok=True)
        with self._lock:
            self._counts.pop(path, None)
            self._bytes.pop(path, None)

    def _write(self, descriptor: int, data: bytes, size: int) -> None:
        """All of `data`, or the file as it was."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise

    def _scan(self) -> None:
        """Find what an earlier run left."""
        for path in sorted(path for path in self.folder.glob("rows-*.jsonl") if path.stem.removeprefix("rows-").isdecimal()):
            with path.open("rb") as file:
                self._counts[path] = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
            self._bytes[path] = path.stat().st_size
            self._next = int(path.stem.removeprefix("rows-")) + 1
