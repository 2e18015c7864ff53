"""`appliance config`: the settings in effect and where each came from."""

from __future__ import annotations

import argparse

from appliance.api.keys import load_keys
from appliance.commands._settings import load_settings
from appliance.settings_reference import as_markdown, as_toml


def run(arguments: argparse.Namespace) -> int:
    """Print the tree as TOML, or with --markdown the reference of all settings; with --check only problems (as ConfigError)."""
    if arguments.markdown:
        print(as_markdown(), end="")
        return 0
    loaded = load_settings(arguments)
    load_keys(loaded.settings.server)  # what else `serve` would refuse
    if not arguments.check:
        print(as_toml(loaded.settings, loaded.sources), end="")
    return 0
