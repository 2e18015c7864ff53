"""`appliance bench`: the load generator. It lives in appliance.bench, which also runs without the rest of the appliance."""

from __future__ import annotations

import argparse

from appliance.bench.main import run_bench


def run(arguments: argparse.Namespace) -> int:
    """Measure; exit status 0 if every request succeeded, else 1."""
    return run_bench(arguments)
