"""The server process stays light."""

import subprocess
import sys


def test_api_and_text_import_no_torch():
    """Importing the whole API and text side brings in neither torch nor transformers, nor the engine's inside."""
    code = (
        "import sys, appliance.api.app, appliance.text.load; "
        "bad = {'torch', 'transformers', 'triton', 'numpy', 'sqlalchemy', 'appliance.engine.engine', 'appliance.kernels'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
