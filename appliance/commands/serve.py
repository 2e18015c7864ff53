"""`appliance serve`: fetch the model, then hand over to the composition root under uvloop."""

from __future__ import annotations

import argparse
import sys

from appliance.commands._progress import fetch_progress
from appliance.commands._settings import load_settings
from appliance.model_files import resolve_model


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop; the server's exit status. Raises ConfigError or ModelError before anything is started."""
    loaded = load_settings(arguments)
    with fetch_progress() as progress:
        resolve_model(loaded.settings.model.path, loaded.settings.state_dir, progress)
    import uvloop

    from appliance.app import serve
    from appliance.store.database import MigrationFailed

    try:
        return uvloop.run(serve(loaded.settings))
    except MigrationFailed as error:
        print(f"appliance: {error}", file=sys.stderr)
        return 1
