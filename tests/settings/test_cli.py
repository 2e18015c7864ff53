"""The command line: parsing, exit statuses, speed, and that the papers name every command."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance import cli

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, without the settings of whoever runs the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("APPLIANCE_")} | (environ or {})
    return subprocess.run([sys.executable, "-m", "appliance.cli", *words], capture_output=True, text=True, timeout=60, env=clean, check=False)


def _parsers(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], argparse.ArgumentParser]:
    found = {path: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                found |= _parsers(child, (*path, name))
    return found


COMMANDS = _parsers(cli.build_parser())


def test_overrides_keep_order_and_flag() -> None:
    """Aliases, --set and dotted flags become overrides in the order they were typed, each with the flag's name."""
    arguments = cli.parse(["serve", "--port", "1", "--set", "fleet=a=b", "--engine.block_size", "32", "--log.level=debug", "--port=2"])
    assert arguments.overrides == [
        ("server.port", "1", "--port"),
        ("fleet", "a=b", "--set"),
        ("engine.block_size", "32", "--engine.block_size"),
        ("log.level", "debug", "--log.level"),
        ("server.port", "2", "--port"),
    ]


@pytest.mark.parametrize("words", [["serve", "--set", "novalue"], ["serve", "--engine.block_size"], ["nonsense"], [], ["serve", "--nope"], ["db"]])
def test_a_wrong_command_line_leaves_with_a_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Mistakes end the program with a status other than 0, not with a traceback."""
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("path", [path for path in COMMANDS if path], ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    """Each command has a description, and each of its flags a help text."""
    parser = COMMANDS[path]
    assert parser.description
    for action in parser._actions:
        assert action.help, action.option_strings


def test_the_readme_names_every_command() -> None:
    """The README's table of commands holds each command of the program."""
    readme = (ROOT / "README.md").read_text()
    for path in COMMANDS:
        if len(path) == 1:
            assert f"`appliance {path[0]}" in readme, path


def test_aliases_name_settings() -> None:
    """Each friendly flag stands for a setting that exists and is no secret."""
    from appliance.settings_reference import setting_fields

    for flag, (key, _, _) in cli.ALIASES.items():
        assert key in setting_fields(), flag
        assert not setting_fields()[key].secret, flag


def test_help_is_quick_and_imports_little() -> None:
    """--help neither imports torch, pydantic, rich nor aiohttp, nor takes longer than it takes Python to start several times over."""
    script = (
        "import sys, time; start = time.process_time(); from appliance import cli; cli.build_parser().format_help();\n"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'rich', 'aiohttp', 'sqlalchemy', 'msgspec') if m in sys.modules],"
        " time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    imported, seconds = done.stdout.rsplit(" ", 1)
    assert imported == "[]"
    assert float(seconds) < 1.0


def test_bad_settings_exit_with_two_and_start_nothing(tmp_path: Path) -> None:
    """`serve` with two mistakes names both on standard error, exits with 2, and makes no state folder."""
    state = tmp_path / "state"
    done = run("serve", "--port", "99999", "--device", "tpu", "--state-dir", str(state))
    assert done.returncode == 2
    assert "2 problems" in done.stderr
    assert "server.port = " in done.stderr
    assert "integer from 0 to 65535" in done.stderr
    assert "flag --device" in done.stderr
    assert not state.exists()


def test_config_check_reads_the_keys(tmp_path: Path) -> None:
    """What `serve` would refuse in the keys file is found before a restart."""
    keys = tmp_path / "keys"
    keys.write_text("a:sk-1\na:sk-2\n")
    done = run("config", "--check", "--set", f"server.api_keys_file={keys}")
    assert done.returncode == 2
    assert "server.api_keys_file" in done.stderr
    assert "sk-1" not in done.stderr


def test_config_prints_what_is_in_effect() -> None:
    """Values with their sources; --check prints nothing where all is well."""
    done = run("config", "--port", "81", environ={"APPLIANCE_FLEET": "blue"})
    assert done.returncode == 0, done.stderr
    assert "port = 81  # flag --port" in done.stdout
    assert 'fleet = "blue"  # environment APPLIANCE_FLEET' in done.stdout
    check = run("config", "--check")
    assert (check.returncode, check.stdout) == (0, "")
    assert run("config", "--check", "--port", "-1").returncode == 2


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """`serve --model /nowhere` says so and exits with 1."""
    done = run("serve", "--model", str(tmp_path / "nowhere"), "--state-dir", str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "no such file or folder" in done.stderr


def test_db_upgrade_and_check(tmp_path: Path) -> None:
    """check fails before the upgrade, succeeds after it, and makes no file by looking."""
    flags = ("--state-dir", str(tmp_path))
    assert run("db", "check", *flags).returncode == 1
    assert not list(tmp_path.iterdir())
    upgraded = run("db", "upgrade", *flags)
    assert upgraded.returncode == 0, upgraded.stderr
    assert run("db", "check", *flags).returncode == 0
    assert "is at" in run("db", "upgrade", *flags).stdout


def test_versions() -> None:
    """`version` names the appliance and what it stands on."""
    words = run("version").stdout.split()
    assert words[0] == "appliance"
    assert "torch" in words


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    """`appliance config | head -1` ends quietly."""
    command = f"{sys.executable} -m appliance.cli config | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
