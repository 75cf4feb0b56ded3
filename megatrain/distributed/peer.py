"""A connection with another rank: it carries short lines, and ends with that rank, its node or its network."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

_SILENT_SECONDS = 20  # without an answer from the other kernel: its node or the network has failed
_PROBE_SECONDS = 5
_KILLED = "killed, or crashed (the log may say why)"


class Peer:
    """The other end. ``rank``, ``host``: -1 and "" until it has said hello. ``how_it_ended``: None while it is up."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.rank, self.host = -1, ""
        self.how_it_ended: str | None = None
        self._received = b""
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        limits = {
            "TCP_KEEPIDLE": _PROBE_SECONDS,
            "TCP_KEEPALIVE": _PROBE_SECONDS,  # macOS's name for it
            "TCP_KEEPINTVL": _PROBE_SECONDS,
            "TCP_KEEPCNT": _SILENT_SECONDS // _PROBE_SECONDS - 1,
            "TCP_USER_TIMEOUT": 1000 * _SILENT_SECONDS,
        }
        for name, value in limits.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, *words: str) -> None:
        """Send a line; to one that has gone, nothing."""
        with contextlib.suppress(OSError):
            self.connection.send(" ".join(words).encode() + b"\n")

    def receive(self) -> Iterator[tuple[str, str]]:
        """The lines that are there, each as its first word and the rest. Sets ``how_it_ended`` at their end."""
        received = b""
        try:
            received = self.connection.recv(1 << 16)
            self.how_it_ended = None if received else _KILLED
        except BlockingIOError:
            return
        except ConnectionResetError:
            self.how_it_ended = _KILLED
        except OSError as error:
            self.how_it_ended = f"no answer any more ({error.strerror}): the node or its network has failed"
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            yield word, rest
