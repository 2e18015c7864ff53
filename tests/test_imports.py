"""The import arrows of docs/design.md, held by parsing every file, and by asking a fresh interpreter what it loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {"errors", "clock", "events", "settings", "__init__"}
ENGINE_DOOR = {"engine.client", "engine.wire"}
# Unit -> units it may import (besides itself). A unit is a folder, or a file right under appliance/.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "clock": set(),
    "events": set(),
    "settings": set(),
    "kernels": set(),
    "state_folder": BASE,
    "logs": BASE | {"tracing"},
    "model_files": BASE,
    "settings_reference": BASE,
    "tracing": BASE | {"otel"},  # where it is switched on
    "otel": BASE | {"tracing"},
    "webhook_urls": BASE | {"settings_reference"},
    "configuration_checks": BASE | {"settings_reference", "webhook_urls"},
    "configuration": BASE | {"settings_reference", "configuration_checks", "webhook_urls"},
    "model": BASE | {"kernels"},
    "engine": BASE | {"kernels", "model"},
    "text": BASE,
    "metrics": BASE,
    "store": BASE,
    "bench": BASE,
    "scaling": BASE | {"metrics", "store", "webhook_urls"},
    "api": BASE | ENGINE_DOOR | {"text", "metrics", "logs", "tracing"},
    "console": BASE | {"store", "metrics"},
    "top": BASE,
    "report": BASE | {"metrics", "store"},
    "cli": BASE | {"commands", "bench", "top", "report"},
}
EVERYTHING = {"app", "commands"}


def _files() -> Iterator[tuple[str, Path]]:
    """Every module of ours: its dotted name under `appliance`, and its file."""
    for folder, prefix in ((ROOT / "appliance", ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            yield prefix + ".".join(path.relative_to(folder).with_suffix("").parts), path


def _imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports anywhere in it, dotted, without the leading `appliance.`; TYPE_CHECKING blocks included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their target"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "appliance" else [node.module or ""]
        else:
            continue
        for name in names:
            if name == "appliance":
                yield "__init__"
            elif name.startswith("appliance."):
                yield name.removeprefix("appliance.")


def _violations() -> Iterator[str]:
    for module, path in _files():
        unit = module.split(".")[0]
        if unit in EVERYTHING:
            continue
        allowed = ALLOWED.get(unit, BASE)  # a file right under appliance/ that is not named above is a leaf
        assert unit in ALLOWED or unit == module, f"{path}: a new folder needs its arrows here and in docs/design.md"
        for target in _imports(path):
            target_unit = target.split(".")[0]
            known = target_unit == unit or target_unit in allowed or ".".join(target.split(".")[:2]) in allowed
            attribute = target_unit.startswith("__")  # from appliance import __version__
            if not (known or attribute):
                yield f"{path.relative_to(ROOT)} imports appliance.{target}"


def test_imports_point_in_the_direction_of_the_design() -> None:
    """No file imports from a unit that its own may not know."""
    assert list(_violations()) == []


def test_a_forbidden_import_is_found() -> None:
    """The parser sees imports within functions and of names from the package itself."""
    source = ROOT / "appliance/commands/serve.py"
    assert "app" in set(_imports(source))


def test_kernels_package_imports_nothing() -> None:
    """kernels/__init__.py stays empty of imports: transformers may meet it under the name `kernels`."""
    tree = ast.parse((ROOT / "kernels/__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def _server_modules() -> list[str]:
    """Every module that the server process may load."""
    units = {"api", "text", "metrics", "store", "scaling", "bench", "console", "commands"}
    files = {"cli", "configuration", "model_files", "settings", "app", "logs", "state_folder"}
    names = [name for name, _ in _files() if name.split(".")[0] in units | files and not name.endswith("__main__")]
    return sorted(f"appliance.{name.removesuffix('.__init__')}" for name in [*names, "engine.client", "engine.wire"])


def test_the_server_process_loads_no_torch() -> None:
    """Importing everything of the server's side brings neither torch nor transformers, nor triton, into the process."""
    modules = _server_modules()
    assert len(modules) > 20
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print([name for name in ('torch', 'transformers', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "[]"


def test_the_engine_process_on_a_cpu_loads_no_triton() -> None:
    """Nor transformers: they take a second of the start and a hundred megabytes. The kernels of a CPU are loaded, a model's loader too."""
    script = (
        "import sys, appliance.engine.process, appliance.engine.loading, appliance.kernels.cpu_ops\n"
        "print([name for name in ('transformers', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["appliance.bench.main", "appliance.bench.worker", "appliance.bench.null_server"])
def test_the_load_generator_needs_msgspec_alone(module: str) -> None:
    """On a machine with nothing but msgspec the load generator imports: everything else is optional."""
    script = (
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('rich', 'matplotlib', 'uvloop', 'aiohttp', 'pydantic', 'numpy', 'torch'): raise ImportError(name)\n"
        f"sys.meta_path.insert(0, Nothing()); import {module}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
