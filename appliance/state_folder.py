"""The state folder: one server owns it at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from appliance.errors import ConfigError, ConfigProblem


class StateFolder:
    """A folder with its sub-folders, locked until `close`. The kernel drops the lock with the process, so a crash leaves nothing to clean."""

    def __init__(self, path: Path) -> None:
        """Create and lock `path`. Raises ConfigError where it cannot be written or another server holds it."""
        self.path = path
        try:
            for folder in (path, self.models, self.cache, self.spool):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _problem(path, f"a folder that can be written ({error})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise _problem(path, f"a folder of its own: the server with pid {owner} uses this one") from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    @property
    def models(self) -> Path:
        """Fetched models."""
        return self.path / "models"

    @property
    def cache(self) -> Path:
        """Compiled kernels and tuning results; may be deleted at any time."""
        return self.path / "cache"

    @property
    def spool(self) -> Path:
        """SQL rows that wait for the database."""
        return self.path / "spool"

    def close(self) -> None:
        """Give the folder back."""
        os.close(self._lock)


def _problem(path: Path, allowed: str) -> ConfigError:
    return ConfigError([ConfigProblem("state_dir", str(path), allowed, "settings")])
