"""Makes the readers of dashboards and the end-to-end harness importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from server_fixtures import client, dummy_model, embedded_server, shared_state, state_folder

__all__ = ["client", "dummy_model", "embedded_server", "shared_state", "state_folder"]
