"""The acceptance tests use the end-to-end tests' harness, the oracle's references, the live queries and the private PostgreSQL."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
sys.path.insert(0, str(Path(__file__).parents[1] / "oracle"))
sys.path.insert(0, str(Path(__file__).parents[1] / "operations"))
sys.path.insert(0, str(Path(__file__).parents[1] / "store"))

from server_fixtures import client, dummy_model, embedded_server, shared_state, state_folder

__all__ = ["client", "dummy_model", "embedded_server", "shared_state", "state_folder"]
