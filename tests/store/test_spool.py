"""The spool: rows on disk, whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from appliance.store.spool import Spool, SpoolFull


def _row(index: int) -> tuple[str, dict[str, object]]:
    return ("requests", {"id": str(index), "seed": -(1 << 63), "ttft_seconds": 0.1 + index, "client_request_id": None})


def _drain(spool: Spool) -> list[tuple[str, dict[str, object]]]:
    rows = []
    while (segment := spool.oldest()) is not None:
        rows += segment[1]
        spool.remove(segment[0])
    return rows


def test_rows_come_back_in_order_after_a_restart(tmp_path: Path) -> None:
    """What one process spooled the next one reads, exactly, oldest first; nothing is left behind."""
    first = Spool(tmp_path / "spool")
    first.append([_row(0), _row(1)])
    first.append([_row(2)], durable=False)
    second = Spool(tmp_path / "spool")
    assert second.num_rows == 3
    second.append([_row(3)])
    assert _drain(second) == [_row(index) for index in range(4)]
    assert second.num_rows == 0
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_segment_being_read_takes_no_more_rows(tmp_path: Path) -> None:
    """Rows that arrive while a segment is replayed go to the next one, so that removing the first loses none."""
    spool = Spool(tmp_path)
    spool.append([_row(0)])
    segment = spool.oldest()
    assert segment is not None
    spool.append([_row(1)])
    spool.remove(segment[0])
    assert _drain(spool) == [_row(1)]


def test_segments_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that is large enough is followed by another; order is kept across ten of them."""
    monkeypatch.setattr("appliance.store.spool._SEGMENT_BYTES", 200)
    spool = Spool(tmp_path)
    for index in range(30):
        spool.append([_row(index)])
    assert len(list(tmp_path.iterdir())) == 10
    assert _drain(Spool(tmp_path)) == [_row(index) for index in range(30)]


def test_a_torn_line_is_counted_and_left_out(tmp_path: Path) -> None:
    """A crash in the middle of a write costs that row alone, and it is counted."""
    spool = Spool(tmp_path)
    spool.append([_row(0), _row(1)])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    spool = Spool(tmp_path)
    assert _drain(spool) == [_row(0)]
    assert spool.num_broken == 1


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk takes half of a batch and then no more, none of the batch stays."""
    spool = Spool(tmp_path)
    spool.append([_row(0)])
    written: list[int] = []
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write(descriptor, data[:20]))
        return written[0]

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            spool.append([_row(1)])
    spool.append([_row(2)])
    assert spool.num_rows == 2
    assert _drain(spool) == [_row(0), _row(2)]
    assert spool.num_broken == 0


def test_the_spool_is_bounded(tmp_path: Path) -> None:
    """Beyond its bound the spool refuses rows instead of filling the disk, and takes them again once replayed."""
    spool = Spool(tmp_path, max_bytes=300)
    for index in range(3):
        spool.append([_row(index)])
    with pytest.raises(SpoolFull):
        spool.append([_row(3)])
    held = spool.num_rows
    assert held == 3
    assert len(_drain(spool)) == held
    spool.append([_row(11)])
    assert spool.num_rows == 1


def test_a_segment_that_vanished_is_counted(tmp_path: Path) -> None:
    """Somebody deleted the file: its rows count as lost and the spool goes on."""
    spool = Spool(tmp_path)
    spool.append([_row(0), _row(1)])
    for path in tmp_path.iterdir():
        path.unlink()
    assert _drain(spool) == []
    assert spool.num_broken == 2
