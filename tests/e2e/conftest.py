"""Makes the harness importable and its fixtures known."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from server_fixtures import client, dummy_model, embedded_server, shared_state, state_folder

__all__ = ["client", "dummy_model", "embedded_server", "shared_state", "state_folder"]
