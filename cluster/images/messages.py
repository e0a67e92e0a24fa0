"""Messages between a replica and its decoding processes: JSON or raw bytes, with their length.

Nothing that is received is unpickled: who decodes untrusted bytes may itself be no longer trusted.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, Final

_LENGTH: Final = struct.Struct("!Q")


def send(channel: socket.socket, message: bytes | dict[str, Any]) -> None:
    """Sends one message. Raises OSError where the other side has ended, or on a timeout."""
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    channel.sendall(_LENGTH.pack(len(body)))
    channel.sendall(body)


def receive(channel: socket.socket, most: int) -> bytearray:
    """One message of at most `most` bytes. Raises EOFError where the other side has ended in
    between, and OSError for a longer message or on a timeout."""
    (length,) = _LENGTH.unpack(_read(channel, _LENGTH.size))
    if length > most:
        raise OSError(f"a message of {length:,} bytes, more than {most:,}")
    return _read(channel, length)


def receive_json(channel: socket.socket) -> dict[str, Any]:
    """One short message; see `receive`."""
    found = json.loads(receive(channel, 64 * 2**10))
    if not isinstance(found, dict):
        raise OSError("a message that is no object")
    return found


def _read(channel: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    rest = memoryview(buffer)
    while rest:
        count = channel.recv_into(rest)
        if not count:
            raise EOFError("the other side has ended")
        rest = rest[count:]
    return buffer
