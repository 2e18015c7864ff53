"""What commands with settings share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from appliance.configuration import Loaded, Override, load


def load_settings(arguments: argparse.Namespace) -> Loaded:
    """The settings of a parsed command line. Raises ConfigError, which the program turns into exit status 2."""
    overrides = [Override(*given) for given in arguments.overrides or ()]
    return load(overrides, os.environ, Path(arguments.config) if arguments.config else None)
