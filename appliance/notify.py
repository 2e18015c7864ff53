"""What systemd is told over NOTIFY_SOCKET (sd_notify(3)): ready, status, alive, stopping. Without the variable every call does nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Sends datagrams to the service manager. Never blocks and never raises for a socket that is gone: serving comes first. Any thread."""

    def __init__(self, environment: Mapping[str, str] = os.environ, *, pid: int | None = None) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._socket: socket.socket | None = None
        self.watchdog_seconds = _watchdog_seconds(environment, os.getpid() if pid is None else pid) if self._address is not None else None
        """Period within which the manager expects `watchdog`; None where it does not watch. Call it at half of this."""

    @property
    def active(self) -> bool:
        """Whether a service manager listens."""
        return self._address is not None

    def ready(self, status: str = "") -> bool:
        """The service serves: Type=notify units count as started from here on."""
        return self._send(f"READY=1\nSTATUS={_line(status)}" if status else "READY=1")

    def status(self, text: str) -> bool:
        """One line for `systemctl status`: the progress of a load, the number of open requests."""
        return self._send(f"STATUS={_line(text)}")

    def watchdog(self) -> bool:
        """Alive. Without it for WatchdogSec the manager ends the service with SIGABRT."""
        return self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> bool:
        """Start-up or stop needs `seconds` more from now on (a model of many gigabytes, a drain)."""
        return self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def stopping(self, status: str = "") -> bool:
        """The drain has begun."""
        return self._send(f"STOPPING=1\nSTATUS={_line(status)}" if status else "STOPPING=1")

    def close(self) -> None:
        """Let the socket go."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> bool:
        """Whether the datagram went out."""
        if self._address is None:
            return False
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            self._socket.sendto(message.encode("utf-8", "replace"), self._address)
        except OSError:
            return False
        return True


def _address(value: str) -> str | None:
    """The address to send to: a path, or an abstract name (written with a leading @). Other kinds (vsock) are not for services on this host."""
    if value.startswith("/"):
        return value
    if value.startswith("@") and len(value) > 1:
        return "\0" + value[1:]
    return None


def _watchdog_seconds(environment: Mapping[str, str], pid: int) -> float | None:
    """WATCHDOG_USEC, if it is meant for this process (WATCHDOG_PID)."""
    meant_for = environment.get("WATCHDOG_PID", "")
    if meant_for and meant_for != str(pid):
        return None
    value = environment.get("WATCHDOG_USEC", "")
    return int(value) / 1e6 if value.isascii() and value.isdigit() and int(value) > 0 else None


def _line(text: str) -> str:
    """`text` on one line: a line break would begin another assignment."""
    return " ".join(text.split())
