"""An image that takes too long, too much memory or its process with it costs its own row only."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from PIL import Image

from cluster.config import MediaLimits
from cluster.errors import ImageMissing, ImageTooLarge, ImageUndecodable, RowError
from cluster.images import decode_image
from cluster.images.decoders import Decoders, DecodingUnavailable
from tests.cluster.images.pictures import encoded, encoded_as, picture, slow_jpeg

T = TypeVar("T")

LIMITS = MediaLimits()
SOON = MediaLimits(max_decode_seconds=0.5)


def run(scenario: Callable[[Decoders], Awaitable[T]], processes: int = 1) -> T:
    async def body() -> T:
        decoders = Decoders(processes, name="test")
        try:
            return await scenario(decoders)
        finally:
            decoders.close()

    found = asyncio.run(asyncio.wait_for(body(), 120))
    assert not children()
    return found


def children(of: int | None = None) -> list[int]:
    """Process ids of the decoding processes of a process: this one unless told otherwise."""
    # Not the kernel's list of children, which misses some while others end.
    parent = of or os.getpid()
    ids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [n for n in ids if b"cluster.images.worker" in command(n) and parent_of(n) == parent]


def parent_of(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])


def wait_for_children(count: int, of: int | None = None) -> set[int]:
    """A process that was started a moment ago has no command line yet."""
    deadline = time.monotonic() + 10
    while len(found := set(children(of))) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(found) == count
    return found


def command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


async def outcome(decoders: Decoders, data: bytes | None, limits: MediaLimits = LIMITS) -> str:
    """What became of an image: its size, or the error's code and message."""
    try:
        (image,) = await decoders.decode([data], limits, None)
    except RowError as error:
        return f"{error.code}: {error}"
    return f"{image.width} x {image.height}"


@pytest.mark.parametrize("name", ["jpeg", "png", "heic"])
def test_a_process_gives_the_image_that_decode_image_gives(name: str) -> None:
    data = encoded_as(name)  # type: ignore[arg-type]
    for scale in (None, lambda width, height: 2):
        (image,) = run(lambda d, scale=scale: d.decode([data], LIMITS, scale))  # type: ignore[misc]
        expected = decode_image(data, LIMITS, scale)
        assert (image.size, image.tobytes()) == (expected.size, expected.tobytes())


def test_a_process_gives_the_errors_that_decode_image_gives() -> None:
    few = MediaLimits(max_bytes=100, max_pixels=100)
    cases: list[tuple[bytes | None, type[RowError]]] = [
        (None, ImageMissing),
        (b"", ImageUndecodable),
        (b"<html>", ImageUndecodable),
        (bytes(200), ImageTooLarge),
        (encoded(Image.new("1", (20, 20)), "PNG"), ImageTooLarge),
    ]

    async def scenario(decoders: Decoders) -> None:
        for data, kind in cases:
            with pytest.raises(kind) as found:
                await decoders.decode([data], few, None)
            with pytest.raises(kind) as expected:
                decode_image(data, few)
            assert str(found.value) == str(expected.value)

    run(scenario)


def test_an_image_of_endless_scans_is_cut_at_its_deadline_and_the_others_are_decoded() -> None:
    async def scenario(decoders: Decoders) -> list[str]:
        images = [encoded_as("jpeg"), slow_jpeg(3000), encoded_as("png"), encoded_as("gif")]
        return await asyncio.gather(*(outcome(decoders, data, SOON) for data in images))

    first, slow, *others = run(scenario)
    assert slow.startswith("image_too_slow: took more than 0.5 s of CPU time")
    assert [first, *others] == ["40 x 20"] * 3


def test_the_deadline_is_each_images_own() -> None:
    """Together these take longer than the deadline of one."""
    data = slow_jpeg(20)

    async def scenario(decoders: Decoders) -> set[str]:
        return {await outcome(decoders, data, SOON) for _ in range(30)}

    assert run(scenario) == {"1000 x 1000"}


def test_an_image_that_needs_too_much_memory_costs_only_itself() -> None:
    """The decoder of an animation holds two whole canvases before their size is known to anybody:
    here 1.1 GB, twice what decoding may take under these limits."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animation = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    animation[24:30] = (11_999).to_bytes(3, "little") * 2
    few = MediaLimits(max_pixels=1000, max_bytes=2**20)

    async def scenario(decoders: Decoders) -> list[str]:
        before = set(children())
        return [
            await outcome(decoders, bytes(animation), few),
            await outcome(decoders, encoded_as("png"), few),
            str(len(set(children()) - before)),
        ]

    huge, small, started = run(scenario)
    assert huge.startswith("image_undecodable")
    assert (small, started) == ("40 x 20", "1")
    with pytest.raises(ImageTooLarge):  # Without the bound on memory, only the pixels are counted.
        decode_image(bytes(animation), few)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_is_killed_once_costs_nothing_and_twice_its_image(
    stop: signal.Signals,
) -> None:
    data = slow_jpeg(1500)

    async def scenario(decoders: Decoders, times: int) -> list[str]:
        await outcome(decoders, encoded_as("png"))
        decoding = asyncio.ensure_future(outcome(decoders, data))
        killed = set[int]()
        while len(killed) < times:
            for process in set(children()) - killed:
                await asyncio.sleep(0.2)
                os.kill(process, stop)
                killed.add(process)
            await asyncio.sleep(0.01)
        return [await decoding, await outcome(decoders, encoded_as("png"))]

    assert run(lambda d: scenario(d, 1)) == ["1000 x 1000", "40 x 20"]
    lost, other = run(lambda d: scenario(d, 2))
    assert lost.startswith("image_undecodable: the process that decoded it ended each time")
    assert stop.name in lost
    assert other == "40 x 20"


def test_a_process_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.images.decoders._patience", lambda limits: 2.0)

    async def scenario(decoders: Decoders) -> str:
        await outcome(decoders, encoded_as("png"))
        (process,) = children()
        os.kill(process, signal.SIGSTOP)
        return await outcome(decoders, bytes(encoded(picture(400, 400), "BMP")))

    assert run(scenario) == "400 x 400"


def test_an_error_of_the_scale_function_is_not_an_image_error() -> None:
    def faulty(width: int, height: int) -> int:
        raise ZeroDivisionError

    async def scenario(decoders: Decoders) -> str:
        with pytest.raises(ZeroDivisionError):
            await decoders.decode([encoded_as("jpeg")], LIMITS, faulty)
        return await outcome(decoders, encoded_as("jpeg"))

    assert run(scenario) == "40 x 20"


def test_closing_ends_a_process_that_is_busy() -> None:
    async def scenario(decoders: Decoders) -> None:
        decoding = asyncio.ensure_future(outcome(decoders, slow_jpeg(2000)))
        while not children():
            await asyncio.sleep(0.01)
        started = time.monotonic()
        decoders.close()
        with pytest.raises(DecodingUnavailable, match="closing"):
            await decoding
        assert time.monotonic() - started < 5

    run(scenario)


def test_a_process_that_cannot_start_is_no_fault_of_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def scenario(decoders: Decoders) -> None:
        with pytest.raises(DecodingUnavailable, match="exit code 1"):
            await outcome(decoders, encoded_as("png"))

    run(scenario)


def test_processes_end_when_their_replica_is_killed() -> None:
    code = (
        "import time\nfrom cluster.images.decoders import Decoders\n"
        "decoders = Decoders(2, name='x')\ndecoders.start()\nprint(flush=True)\ntime.sleep(60)"
    )
    replica = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert replica.stdout is not None
    replica.stdout.readline()
    processes = wait_for_children(2, replica.pid)
    replica.kill()
    replica.wait()
    replica.stdout.close()
    deadline = time.monotonic() + 60
    while any(command(process) for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_decoding_process_loads_no_more_than_it_needs() -> None:
    code = (
        "import sys, cluster.images.worker\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'numpy', 'asyncio')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_decoders_that_nobody_closes_leave_no_process() -> None:
    decoders = Decoders(2, name="test")
    decoders.start()
    wait_for_children(2)
    del decoders
    gc.collect()
    assert not children()
