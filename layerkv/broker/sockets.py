"""What both ends of a connection do alike: connect, and look who is there."""

from __future__ import annotations

import os
import select
import socket
import struct
from pathlib import Path

from layerkv.errors import BrokerError
from layerkv.runtime import runtime_dir

_CREDENTIALS = struct.Struct("3i")  # pid, user, group


def default_path() -> Path:
    """Where a user's broker is, unless somebody says otherwise."""
    return runtime_dir() / "broker.sock"


def connect(path: Path) -> socket.socket:
    """A connection to the broker at that path, which never blocks.

    Raises:
        OSError: nobody listens there, or too many wait already.
        BrokerError: another user's process listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        connection.connect(str(path))
        _, user = peer(connection)
        if user != os.getuid():
            raise BrokerError(f"user {user} runs it, and this process is user {os.getuid()}'s")
    except BaseException:
        connection.close()
        raise
    return connection


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as they were when it connected or began to listen; process 0 where it cannot
    be seen from here."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(packed)
    return pid, user


def has_hung_up(connection: socket.socket) -> bool:
    """Whether the other end is closed, though not all that it said may have been read."""
    ends = select.poll()
    ends.register(connection, 0)
    return any(event & select.POLLHUP for _, event in ends.poll(0))
