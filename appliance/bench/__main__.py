"""`python -m appliance.bench`: the load generator without the rest of the appliance (it needs msgspec alone)."""

from __future__ import annotations

import argparse
import sys

from appliance.bench.main import run_bench
from appliance.bench.options import add_options

parser = argparse.ArgumentParser(prog="python -m appliance.bench", description="Measure an OpenAI-compatible server.")
add_options(parser)
try:
    sys.exit(run_bench(parser.parse_args()))
except KeyboardInterrupt:
    sys.exit(130)
