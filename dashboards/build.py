"""Dashboards as code: `python dashboards/build.py` writes json/*.json beside this file, --check only says what is not current."""

from __future__ import annotations

import sys
from pathlib import Path

from boards import engine, gpu, latency, machine, scaling, slo, tenants
from boards.frame import render

OUTPUT = Path(__file__).with_name("json")
BOARDS = tuple(module.BOARD for module in (slo, latency, engine, gpu, tenants, scaling, machine))


def build() -> dict[str, str]:
    """Every dashboard's JSON by its file name."""
    return {f"{board.uid}.json": render(board) for board in BOARDS}


def main(arguments: list[str]) -> int:
    """Write what changed and take away what no board makes; with --check, change nothing and return 1 where that is needed."""
    made = build()
    present = {path.name: path.read_text() for path in OUTPUT.glob("*.json")}
    stale = sorted(name for name in made.keys() | present.keys() if made.get(name) != present.get(name))
    if stale:
        print("stale:" if "--check" in arguments else "written:", *stale)
    if "--check" in arguments:
        return 1 if stale else 0
    OUTPUT.mkdir(exist_ok=True)
    for name in stale:
        if name in made:
            (OUTPUT / name).write_text(made[name])
        else:
            (OUTPUT / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
