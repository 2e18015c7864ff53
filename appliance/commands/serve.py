"""`appliance serve`: fetch the model, then hand over to the composition root under uvloop."""

from __future__ import annotations

import argparse
import sys

from appliance.engine.child import ENGINE_COMMAND, Spawned, spawn


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop; the server's exit status. Raises ConfigError or ModelError before anything is served.

    The engine's process starts first: it imports torch, the longest part of the way to the first token, while this one imports the server and
    reads the settings. It is ended if those turn out to be wrong.
    """
    spawned = spawn(ENGINE_COMMAND)
    try:
        return _serve(arguments, spawned)
    finally:
        spawned.discard()


def _serve(arguments: argparse.Namespace, spawned: Spawned) -> int:
    from appliance.commands._progress import fetch_progress
    from appliance.commands._settings import load_settings
    from appliance.model_files import resolve_model

    loaded = load_settings(arguments)
    with fetch_progress() as progress:
        resolve_model(loaded.settings.model.path, loaded.settings.state_dir, progress)
    import uvloop

    from appliance.app import serve
    from appliance.store.database import MigrationFailed

    try:
        return uvloop.run(serve(loaded.settings, spawned))
    except MigrationFailed as error:
        print(f"appliance: {error}", file=sys.stderr)
        return 1
