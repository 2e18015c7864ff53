"""`appliance version`: versions for bug reports."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import metadata

from appliance import __version__

_PARTS = ("torch", "triton", "transformers", "tokenizers", "aiohttp", "uvloop", "msgspec", "pydantic", "sqlalchemy", "alembic")


def run(_: argparse.Namespace) -> int:
    """Print one `name version` a line. Reads package metadata only, so that it is quick and works where torch cannot be imported."""
    print(f"appliance {__version__}")
    print(f"python {platform.python_version()} ({sys.executable})")
    print(f"platform {platform.platform()}")
    for name in _PARTS:
        try:
            print(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            print(name, "not installed")
    return 0
