"""`appliance top`: a live view in the terminal. It lives in appliance.top."""

from __future__ import annotations

import argparse

from appliance.top.main import run_top


def run(arguments: argparse.Namespace) -> int:
    """Look until Ctrl-C; with --once, exit status 1 if the server does not answer."""
    return run_top(arguments)
