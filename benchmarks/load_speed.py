"""How fast safetensors reach the device: maps copied one after another against the parallel reader, from the page cache.

    python benchmarks/load_speed.py FOLDER [--gb 8] [--device cuda] [--readers 1,2,4,8] [--keep]

Writes shards of random bfloat16 matrices to FOLDER (on the disk to be measured), reads them once so that they lie in the page cache, and prints
GB/s of each way, twice. For the disk itself, drop the page cache first and give one number of readers.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from appliance.model.parallel_read import ParallelReader, Span

SHARD_BYTES = 2 << 30
ROWS, COLUMNS = 14336, 4096


def write_shards(folder: Path, num_bytes: int) -> list[Span]:
    """Shards of as many gate projections of an 8B model as fit; returns where each lies."""
    matrix = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16).normal_()
    size = matrix.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    spans: list[Span] = []
    while len(spans) * size < num_bytes:
        names = [f"weight.{len(spans) + i}" for i in range(SHARD_BYTES // size)]
        file = folder / f"shard-{len(spans)}.safetensors"
        save_file({name: matrix.clone() for name in names}, file)
        start = file.stat().st_size - len(names) * size
        spans += [Span(name, file, start + i * size, size) for i, name in enumerate(names)]
    return spans


def read_maps(spans: list[Span], device: torch.device) -> None:
    """What a loader without readers does: a copy from the map, one tensor after another."""
    maps = {span.path: torch.from_file(str(span.path), shared=False, size=span.path.stat().st_size, dtype=torch.uint8) for span in spans}
    for span in spans:
        part = maps[span.path][span.offset : span.offset + span.num_bytes]
        _ = part.clone() if device.type == "cpu" else part.to(device)


def read_parallel(spans: list[Span], device: torch.device, num_readers: int) -> None:
    """The same through the reader."""
    reader = ParallelReader(spans, device, num_readers=num_readers)
    for span in spans:
        reader.take(span.name)
    reader.close()


def main() -> None:
    """Writes, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=8.0, help="bytes to write, in 1e9 (%(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--readers", default="1,2,4,8", help="(%(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the shards in FOLDER")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    spans = write_shards(arguments.folder / "load-speed", int(arguments.gb * 1e9))
    total = sum(span.num_bytes for span in spans)
    try:
        for _ in range(2):
            for what in ("maps", *arguments.readers.split(",")):
                started = time.perf_counter()
                if what == "maps":
                    read_maps(spans, device)
                else:
                    read_parallel(spans, device, int(what))
                if device.type == "cuda":
                    torch.cuda.synchronize()
                print(
                    f"{'maps, one thread' if what == 'maps' else f'{what} readers':20} {total / (time.perf_counter() - started) / 1e9:6.2f} GB/s",
                    flush=True,
                )
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder / "load-speed")


if __name__ == "__main__":
    main()
