"""Decodes images in processes that can be killed, so that no image costs more than its own row.

An image has a deadline in CPU seconds and a bound on memory (`MediaLimits`). A process that ends is
replaced; the image is tried once more unless its deadline ended it, since a machine short of memory
kills whom it likes.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Final

import structlog
from PIL import Image

from cluster.config import MediaLimits
from cluster.errors import ImageMissing, ImageTooLarge, ImageTooSlow, ImageUndecodable
from cluster.images.decode import check_bytes
from cluster.images.messages import receive, receive_json, send
from sppruner.models import JpegScale

logger = structlog.get_logger(__name__)

_ERRORS: Final = {error.code: error for error in (ImageMissing, ImageTooLarge, ImageUndecodable)}
_ATTEMPTS: Final = 2


class DecodingUnavailable(Exception):
    """No process could decode, which says nothing about the image."""


class Decoders:
    """Processes that decode images; each is started when it is first needed."""

    def __init__(self, processes: int, *, name: str) -> None:
        """processes: images decoded at the same time. name: of the threads that wait for them."""
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix=name)
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all = [_Process() for _ in range(processes)]
        for process in self._all:
            self._idle.put(process)
        # Also where nobody closes them: a dropped replica leaves no processes.
        self._close = weakref.finalize(self, _close, self._threads, self._all)

    def start(self) -> None:
        """Starts all processes, without waiting for them."""
        for process in self._all:
            process.start()

    async def decode(
        self, images: Sequence[bytes | None], limits: MediaLimits, jpeg_scale: JpegScale | None
    ) -> tuple[Image.Image, ...]:
        """The images of one row, as `decode_image` gives them. Raises what it raises, and
        ImageTooSlow, ImageUndecodable for an image that ends the process twice, and
        DecodingUnavailable where no process could be had."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, self._decode_row, images, limits, jpeg_scale
        )

    def close(self) -> None:
        """Ends the processes at once; images that no process has yet are dropped."""
        self._close()

    def _decode_row(
        self, images: Sequence[bytes | None], limits: MediaLimits, jpeg_scale: JpegScale | None
    ) -> tuple[Image.Image, ...]:
        process = self._idle.get()
        try:
            return tuple(process.decode(data, limits, jpeg_scale) for data in images)
        finally:
            self._idle.put(process)


def _close(threads: ThreadPoolExecutor, processes: list[_Process]) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    threads.shutdown(wait=True)
    for process in processes:
        process.close()


class _Ended(Exception):
    """The process has ended, or hung and was killed. deadline: whether the image's own did it."""

    def __init__(self, how: str, *, deadline: bool = False) -> None:
        super().__init__(how)
        self.deadline = deadline


class _Process:
    """One decoding process and the socket to it. One thread at a time decodes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of what `close` and a decoding thread both change
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._closed = False

    def start(self) -> socket.socket:
        """Starts the process, unless it runs; the socket to it. Raises _Ended once it is closed."""
        with self._lock:
            if self._closed:
                raise DecodingUnavailable("the replica is closing")
            if self._running is not None and self._running[0].poll() is None:
                return self._running[1]
            self._stop()
            ours, theirs = socket.socketpair()
            # A program of its own, neither forked from a process with threads and a device nor with
            # the main module of a Ray worker: it imports Pillow and no torch.
            path = os.pathsep.join(sys.path)
            with theirs:
                child = subprocess.Popen(
                    [sys.executable, "-P", "-m", "cluster.images.worker", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
                )
            self._running = child, ours
            return ours

    def decode(
        self, data: bytes | None, limits: MediaLimits, jpeg_scale: JpegScale | None
    ) -> Image.Image:
        """See `Decoders.decode`; of one image."""
        data = check_bytes(data, limits)
        how = ""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._exchange(data, limits, jpeg_scale)
            except _Ended as ended:
                how = str(ended)
                logger.warning("decoding_process_ended", how=how, attempt=attempt)
                if ended.deadline:
                    raise ImageTooSlow(how) from ended
        raise ImageUndecodable(how)

    def kill(self) -> None:
        """Ends the process, for good. A thread that waits for it gets DecodingUnavailable."""
        with self._lock:
            self._closed = True
            if self._running is not None:
                self._running[0].kill()

    def close(self) -> None:
        """After `kill`, once no thread waits: frees what it held."""
        with self._lock:
            self._stop()

    def _exchange(
        self, data: bytes, limits: MediaLimits, jpeg_scale: JpegScale | None
    ) -> Image.Image:
        """Raises the row error of an image, and _Ended where the process did not answer."""
        channel = self.start()
        channel.settimeout(_patience(limits))
        answered = False
        try:
            send(channel, {"limits": asdict(limits), "scaled": jpeg_scale is not None})
            send(channel, data)
            while "ask" in (answer := receive_json(channel)):
                assert jpeg_scale is not None
                send(channel, {"factor": jpeg_scale(*answer["ask"])})
            pixels = receive(channel, 3 * limits.max_pixels) if "size" in answer else None
            answered = True
        except (OSError, EOFError) as error:
            raise self._reason(error, limits) from error
        finally:
            if not answered:
                with self._lock:
                    self._stop()
        if pixels is None:
            raise _ERRORS[answer["error"]](answer["message"])
        return Image.frombytes("RGB", tuple(answer["size"]), pixels)

    def _reason(self, error: Exception, limits: MediaLimits) -> _Ended:
        assert self._running is not None
        if isinstance(error, TimeoutError):
            return _Ended(f"no answer of the decoding process within {_patience(limits):.0f} s")
        try:
            code = self._running[0].wait(timeout=5)
        except subprocess.TimeoutExpired:
            return _Ended(f"the decoding process answers nonsense: {error}")
        if code == -signal.SIGPROF:
            return _Ended(
                f"took more than {limits.max_decode_seconds:g} s of CPU time to decode "
                "(MediaLimits.max_decode_seconds)",
                deadline=True,
            )
        if code >= 0:
            # A crash ends a process by a signal: this one could not start, or has a fault of ours.
            raise DecodingUnavailable(
                f"the decoding process ended with exit code {code}"
            ) from error
        how = signal.Signals(-code).name
        return _Ended(f"the process that decoded it ended each time, the last time by {how}")

    def _stop(self) -> None:
        """Ends the process, and forgets it."""
        if self._running is not None:
            child, channel = self._running
            child.kill()
            child.wait()
            channel.close()
            self._running = None


def _patience(limits: MediaLimits) -> float:
    """Wall seconds after which a process hangs, rather than waits for its turn on a busy machine:
    what it does itself is bounded in CPU seconds."""
    return 60 + 6 * limits.max_decode_seconds
