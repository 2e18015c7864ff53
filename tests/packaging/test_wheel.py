"""What the built wheel and source archive hold, and that the installed wheel stands without the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("appliance", "kernels", "alembic", "dashboards")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--wheel", "--sdist", "--outdir", str(source / "dist")]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return source / "dist"


def _expected(folder: Path, prefix: str, patterns: tuple[str, ...]) -> set[str]:
    files = (path for pattern in patterns for path in folder.rglob(pattern) if path.is_file())
    return {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_module_and_data_file(archives: Path) -> None:
    """Code, migrations, dashboards, kernel sources and the console's pages are all in the wheel, under one top-level package."""
    (wheel,) = archives.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = _expected(ROOT / "appliance", "appliance", ("*.py", "py.typed"))
    expected |= _expected(ROOT / "appliance/console/static", "appliance/console/static", ("*",))
    expected |= _expected(ROOT / "kernels", "appliance/kernels", ("*.py", "*.cpp", "*.h"))
    expected |= _expected(ROOT / "alembic", "appliance/_alembic", ("*.py", "*.mako"))
    expected |= _expected(ROOT / "dashboards", "appliance/_dashboards", ("*.json", "*.yml", "*.py"))
    assert expected - names == set()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"appliance"}


def test_the_source_archive_builds_the_same(archives: Path) -> None:
    """Everything that the wheel is made of is in the source archive, at its place in the repository."""
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    patterns = {"appliance": ("*.py",), "kernels": ("*.py", "*.cpp"), "alembic": ("*.py", "*.mako"), "dashboards": ("*.json", "*.yml", "*.py")}
    for folder in FOLDERS:
        assert _expected(ROOT / folder, folder, patterns[folder]) - names == set()


def test_the_installed_wheel_stands_alone(archives: Path, tmp_path: Path) -> None:
    """Unpacked in an empty folder and run from another, it finds its own modules, migrations and dashboards, and upgrades a database."""
    (wheel,) = archives.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")  # noqa: S202 - built a moment ago from our own tree
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import appliance, appliance.kernels\n"
        "from appliance.cli import main\n"
        "from appliance.store.database import migrations_path\n"
        "assert appliance.__file__.startswith(sys.argv[1]) and str(migrations_path()).startswith(sys.argv[1]), migrations_path()\n"
        "assert appliance.kernels.__file__.startswith(sys.argv[1])\n"
        "sys.exit(main(['db', 'upgrade', '--state-dir', sys.argv[2]]) or main(['db', 'check', '--state-dir', sys.argv[2]]))\n"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-I", "-c", script, str(tmp_path / "site"), str(tmp_path / "state")]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "current" in done.stdout
