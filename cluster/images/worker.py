"""The program of a decoding process: `python -m cluster.images.worker SOCKET`.

Answers one image after another until the replica closes the socket. What the operating system
allows it is set for each image: CPU seconds, at whose end the system kills it, and memory.
"""

from __future__ import annotations

import resource
import signal
import socket
import sys

from cluster.config import MediaLimits
from cluster.errors import ImageUndecodable, RowError
from cluster.images.decode import OUT_OF_MEMORY, decode_image
from cluster.images.messages import receive, receive_json, send


def main() -> None:
    """Serves the socket of this file descriptor."""
    # Ctrl-C reaches every process of a terminal; the replica decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel = socket.socket(fileno=int(sys.argv[1]))
    try:
        while True:
            _answer(channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # The replica has ended, or needs this process no more.


def _answer(channel: socket.socket) -> None:
    request = receive_json(channel)
    limits = MediaLimits(**request["limits"])
    data = bytes(receive(channel, limits.max_bytes))

    def ask(width: int, height: int) -> int:
        send(channel, {"ask": [width, height]})
        return int(receive_json(channel)["factor"])

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limits.decode_memory, most))
    # Counts the CPU seconds of all threads, whoever waits for them; SIGPROF ends the process.
    signal.setitimer(signal.ITIMER_PROF, limits.max_decode_seconds)
    try:
        image = decode_image(data, limits, ask if request["scaled"] else None)
        pixels = image.tobytes()
    except (RowError, MemoryError) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if not isinstance(error, RowError):
            error = ImageUndecodable(OUT_OF_MEMORY)
        send(channel, {"error": error.code, "message": str(error)})
        return
    signal.setitimer(signal.ITIMER_PROF, 0)
    send(channel, {"size": image.size})
    send(channel, pixels)


if __name__ == "__main__":
    main()
