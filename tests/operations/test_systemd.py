"""The unit and its files: accepted by systemd, consistent with the settings, and open to a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.configuration import load
from appliance.settings import EngineSettings, ServerSettings

FOLDER = Path(__file__).resolve().parents[2] / "systemd"
UNIT = FOLDER / "appliance.service"


def directives() -> dict[str, list[str]]:
    """Every directive of the unit with its values, in order."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say. The program is not installed here, so another stands in for it."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "appliance.service"
    unit.write_text(
        UNIT.read_text().replace("/opt/appliance/bin/appliance", sys.executable).replace("/opt/appliance/share/doc/operations.md", str(UNIT))
    )
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    if "Failed to initialize manager" in done.stderr or "Failed to connect" in done.stderr:
        pytest.skip(f"systemd-analyze cannot verify here: {done.stderr.strip()}")
    ours = [line for line in done.stderr.splitlines() if "appliance" in line]
    assert ours == []
    assert done.returncode == 0


def test_verify_would_find_a_mistake(tmp_path: Path) -> None:
    """The check above is not blind."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "appliance.service"
    unit.write_text(
        UNIT.read_text().replace("/opt/appliance/bin/appliance", sys.executable).replace("KillMode=mixed", "KillMode=mixt\nNoSuchThing=1")
    )
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    if "Failed to initialize manager" in done.stderr or "Failed to connect" in done.stderr:
        pytest.skip(f"systemd-analyze cannot verify here: {done.stderr.strip()}")
    assert "NoSuchThing" in done.stderr


def test_the_time_limits_leave_room_for_the_server_s_own() -> None:
    """systemd must not shoot while the server drains or loads within its limits."""
    found = directives()
    engine_end_and_flush = 15.0
    assert float(found["TimeoutStopSec"][0]) > ServerSettings().drain_seconds + engine_end_and_flush  # type: ignore[call-arg]
    assert float(found["TimeoutStartSec"][0]) > EngineSettings().load_timeout_seconds  # type: ignore[call-arg]


def test_the_service_is_supervised_as_the_design_says() -> None:
    """Ready by notification, watched, drained by the server alone, restarted unless the settings are wrong."""
    found = directives()
    expected = {"Type": "notify", "NotifyAccess": "main", "KillMode": "mixed", "Restart": "on-failure", "OOMPolicy": "continue"}
    assert {name: found[name][0] for name in expected} == expected
    assert found["RestartPreventExitStatus"] == ["2"]
    assert int(found["WatchdogSec"][0]) > 0
    assert found["StateDirectory"] == ["appliance"]


@pytest.mark.parametrize(
    "forbidden", ["PrivateDevices", "MemoryDenyWriteExecute", "ProtectClock", "DevicePolicy", "DeviceAllow", "NoExecPaths", "ProcSubset"]
)
def test_nothing_hides_the_gpu_or_stops_the_compiler(forbidden: str) -> None:
    """Each of these breaks CUDA or Triton; the unit says why in a comment."""
    assert forbidden not in directives()
    assert f"{forbidden}=" in UNIT.read_text()


def test_the_credentials_are_those_that_the_settings_read(tmp_path: Path) -> None:
    """What the unit loads is found by the loader, under the same names."""
    contents = {"api-keys": "ops:sk-0123456789abcdef\n", "webhook-secret": "whsec_" + "b" * 43 + "=", "store-url": "sqlite+aiosqlite:////tmp/x.db"}
    assert set(directives()["LoadCredential"]) == set(contents)
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    loaded = load([], {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert loaded.settings.server.api_keys_file == tmp_path / "api-keys"
    assert loaded.settings.scaling.webhook_secret is not None
    assert loaded.settings.store.url is not None


def test_the_example_settings_are_valid() -> None:
    """The TOML file loads without a complaint, and the environment file names where it goes."""
    loaded = load([], {}, FOLDER / "appliance.toml")
    assert loaded.settings.scaling.mode == "advise"
    lines = [line for line in (FOLDER / "appliance.env").read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["APPLIANCE_CONFIG=/etc/appliance/appliance.toml"]
