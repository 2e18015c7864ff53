"""A file's bytes as a tensor, memory-mapped, and a way to bring them into the page cache early."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from appliance.errors import ModelError

_CHUNK_BYTES: Final = 16 << 20
_PAGE_BYTES: Final = 4096
_NUM_READERS: Final = 8  # a page fault reads 128 KiB at a time; NVMe needs several of them in flight


def map_bytes(path: Path) -> Tensor:
    """The whole file as `[size]` uint8: a private, copy-on-write map, shared with the page cache while nobody writes."""
    try:
        size = path.stat().st_size
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be mapped into memory: {error}") from error


class ReadAhead:
    """Background threads that touch maps page by page, in order, so that a loader which follows finds them in memory.

    Use as a context manager; leaving it stops the threads. Without effect but for the time it saves.
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        self._chunks = [part for data in maps for part in torch.split(data, _CHUNK_BYTES)]
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(min(_NUM_READERS, os.cpu_count() or 1), thread_name_prefix="read-ahead")

    def __enter__(self) -> ReadAhead:
        for chunk in self._chunks:
            self._pool.submit(self._touch, chunk)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _touch(self, chunk: Tensor) -> None:
        if not self._stop.is_set():
            torch.max(chunk[::_PAGE_BYTES])  # reads a byte of each page, without the interpreter's lock
