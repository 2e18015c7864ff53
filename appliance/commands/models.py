"""`appliance models`: what lies in the state folder, and fetching ahead of serving."""

from __future__ import annotations

import argparse
from pathlib import Path

from appliance.commands._progress import fetch_progress
from appliance.commands._settings import load_settings
from appliance.model_files import resolve_model, served_name


def run(arguments: argparse.Namespace) -> int:
    """`list` prints name, size and path of each model kept; `fetch` fetches the one that --model names and prints its path."""
    settings = load_settings(arguments).settings
    if arguments.action == "fetch":
        with fetch_progress() as progress:
            print(resolve_model(settings.model.path, settings.state_dir, progress))
        return 0
    models = list(_kept(settings.state_dir / "models"))
    if not models:
        print(f"no models in {settings.state_dir / 'models'}; `appliance models fetch` brings the embedded one")
    for path in models:
        print(f"{served_name(str(path)):40} {_bytes(path) / 1e6:10.1f} MB  {path}")
    return 0


def _kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf")) + sorted(folder.glob("hub/models--*/snapshots/*"))


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
