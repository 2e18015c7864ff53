"""Makes the readers of dashboards, the end-to-end harness and the private PostgreSQL importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
sys.path.insert(0, str(Path(__file__).parents[1] / "store"))

from server_fixtures import client, dummy_model, embedded_server, shared_state, state_folder

__all__ = ["client", "dummy_model", "embedded_server", "shared_state", "state_folder"]
