"""The flags of `appliance top`. Standard library only: `appliance --help` imports it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

KEY_VARIABLE = "APPLIANCE_SERVER__API_KEY"  # the one that the server itself reads


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every flag."""
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", metavar="URL", help="the appliance, near or far (%(default)s)")
    parser.add_argument("--interval", type=_interval, default=2.0, metavar="S", help="seconds between two looks, 0.2-3600 (%(default)s)")
    parser.add_argument("--once", action="store_true", help="look twice, an interval apart, print once; exit status 1 if the server does not answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object a look instead of the screen")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--key-file", type=Path, metavar="FILE", help="file whose first line is the API key (or name:key)")
    key.add_argument("--api-key-env", default=KEY_VARIABLE, metavar="NAME", help="environment variable that holds the API key (%(default)s)")


def api_key(arguments: argparse.Namespace) -> str | None:
    """The key to send, if any. Raises OSError for a file that cannot be read."""
    if arguments.key_file is None:
        return os.environ.get(arguments.api_key_env) or None
    lines = [line.strip() for line in arguments.key_file.read_text(encoding="utf-8").splitlines()]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return first.rpartition(":")[2].strip() or None  # as in server.api_keys_file, which may be this file


def _interval(text: str) -> float:
    number = float(text)
    if not 0.2 <= number <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.2 to 3600")
    return number
