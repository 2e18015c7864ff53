"""sd_notify over real datagram sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket as systemd listens on, and its name as NOTIFY_SOCKET would carry it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@appliance-test-{os.getpid()}-{id(request)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(name if name.startswith("/") else "\0" + name[1:])
        listening.settimeout(5)
        yield listening, name


def test_the_life_of_a_service(manager: tuple[socket.socket, str]) -> None:
    """Each call is one datagram in the manager's words."""
    listening, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    assert notifier.active
    sent = [
        (notifier.status("loading 40 %"), b"STATUS=loading 40 %"),
        (notifier.ready("serving on port 8000"), b"READY=1\nSTATUS=serving on port 8000"),
        (notifier.watchdog(), b"WATCHDOG=1"),
        (notifier.extend_timeout(1.5), b"EXTEND_TIMEOUT_USEC=1500000"),
        (notifier.stopping(), b"STOPPING=1"),
    ]
    for went_out, expected in sent:
        assert went_out
        assert listening.recv(4096) == expected
    notifier.close()


def test_a_line_break_in_a_status_is_no_second_assignment(manager: tuple[socket.socket, str]) -> None:
    """Text from elsewhere cannot say MAINPID=1."""
    listening, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.status("loading\nMAINPID=1")
    notifier.close()
    assert listening.recv(4096) == b"STATUS=loading MAINPID=1"


@pytest.mark.parametrize("name", ["", "relative/path", "@", "vsock:2:1234"])
def test_without_a_manager_nothing_happens(name: str) -> None:
    """A program started by hand, or a socket of another kind."""
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000"})
    assert not notifier.active
    assert notifier.watchdog_seconds is None
    assert not notifier.ready()


def test_a_manager_that_is_gone_harms_nobody(tmp_path: Path) -> None:
    """No exception, only a no."""
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    assert not notifier.watchdog()
    notifier.close()


def test_a_full_socket_does_not_block(tmp_path: Path) -> None:
    """A manager that does not read costs a datagram, not a stalled server."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        answers = [notifier.watchdog() for _ in range(10_000)]
        notifier.close()
    assert answers[0]
    assert not answers[-1]


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "41"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_period_is_ours_only(variables: dict[str, str], seconds: float | None) -> None:
    """A variable inherited from another service's process is not for us."""
    assert Notifier({"NOTIFY_SOCKET": "/run/x"} | variables, pid=41).watchdog_seconds == seconds
