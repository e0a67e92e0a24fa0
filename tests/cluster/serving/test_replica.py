"""The model replica: batching, priorities, bounds, bad rows, cancellation and broken engines."""

from __future__ import annotations

import asyncio
import errno
import io
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from PIL import Image

from cluster.config import MediaLimits
from cluster.errors import Busy, EngineBroken, UsageError
from cluster.images import decode_image
from cluster.protocol import LabelRequest, Priority, call_rows, rows_waiting
from cluster.serving.deadline import Deadline
from cluster.serving.engine_settings import EngineSettings, default_slots
from cluster.serving.engine_thread import EngineThread
from cluster.serving.replica import VLMReplica
from cluster.serving.watchdog import Watchdog
from sppruner.engine.interface import Request, Result, SamplingParams
from sppruner.spec import Budget, PruneSpec
from tests.cluster.fake_engine import VISUAL_TOKENS, expected_text, image_hash, picture
from tests.cluster.images.pictures import slow_jpeg

T = TypeVar("T")

ENGINE = "tests.cluster.fake_engine:FakeEngine"


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "batches"


def settings(
    journal: Path, *, seconds: float = 0.0, rows: int = 4, reduced: int = 1
) -> EngineSettings:
    options: dict[str, str | float | int] = {
        "journal": str(journal),
        "seconds": seconds,
        "reduced": reduced,
    }
    return EngineSettings(model="fake", engine=ENGINE, slots=rows, options=options)


def call(number: int, prompt: str = "describe", **more: object) -> LabelRequest:
    values = {"images": (picture(number),), **more}
    return LabelRequest(id=f"r{number}", prompt=prompt, **values)  # type: ignore[arg-type]


def run(
    engine: EngineSettings, scenario: Callable[[VLMReplica], Awaitable[T]], *, within: float = 20
) -> T:
    async def body() -> T:
        replica = VLMReplica(engine)
        try:
            return await scenario(replica)
        finally:
            replica.close()

    return asyncio.run(asyncio.wait_for(body(), within))


async def start_decoding(replica: VLMReplica) -> None:
    """For scenarios that tell by the clock which row comes first."""
    for decoders in replica._decoders.values():
        for _ in range(2):
            await decoders.decode([picture(0)], MediaLimits(), None)


def batches(journal: Path) -> list[list[str]]:
    """The rows of each batch."""
    return [line.replace("*", "").split() for line in journal.read_text().splitlines()]


def test_results_are_in_the_order_of_the_requests(journal: Path) -> None:
    calls = [call(n) for n in range(10)]

    results = run(settings(journal), lambda r: r.label(calls, priority=Priority.BATCH))

    assert [result.text for result in results] == [expected_text(picture(n)) for n in range(10)]
    assert [len(batch) for batch in batches(journal)] == [4, 4, 2]


def test_one_batch_mixes_specs_and_each_row_keeps_its_own_budget(journal: Path) -> None:
    specs = [PruneSpec(method="m", budget=Budget(tokens=n)) for n in (5, 50)]
    calls = [call(n, spec=spec) for n, spec in enumerate(specs)]

    results = run(settings(journal), lambda r: r.label(calls, priority=Priority.BATCH))

    assert [result.visual_tokens_kept for result in results] == [5, 50]
    assert batches(journal) == [["r0", "r1"]]


def test_online_rows_run_before_batch_rows_that_were_queued_earlier(journal: Path) -> None:
    async def scenario(replica: VLMReplica) -> None:
        await start_decoding(replica)
        queued = asyncio.create_task(
            replica.label([call(n) for n in range(12)], priority=Priority.BATCH)
        )
        while not journal.exists():
            await asyncio.sleep(0.01)
        await replica.label([call(99)], priority=Priority.ONLINE)
        await queued

    run(settings(journal, seconds=0.2), scenario)

    # The first batch was running already; the online row is the next batch.
    assert batches(journal)[1] == ["r99"]
    assert [len(batch) for batch in batches(journal)] == [4, 1, 4, 4]


def test_other_sampling_params_form_separate_batches(journal: Path) -> None:
    calls = [call(0), call(2, generation=SamplingParams(max_new_tokens=5)), call(3)]
    run(settings(journal), lambda r: r.label(calls, priority=Priority.BATCH))
    assert sorted(batches(journal)) == [["r0", "r3"], ["r2"]]


def test_a_full_replica_refuses_batch_calls_and_accepts_online_ones(journal: Path) -> None:
    async def scenario(replica: VLMReplica) -> Result:
        held = asyncio.create_task(
            replica.label([call(n) for n in range(16)], priority=Priority.BATCH)
        )
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await replica.label([call(50)], priority=Priority.BATCH)
        (online,) = await replica.label([call(51)], priority=Priority.ONLINE)
        await held
        # The held rows are done, so the refused call is accepted.
        await replica.label([call(50)], priority=Priority.BATCH)
        return online

    assert run(settings(journal, seconds=0.1), scenario).error_code is None


def test_a_call_larger_than_the_limit_runs_on_an_idle_replica(journal: Path) -> None:
    calls = [call(n) for n in range(20)]
    results = run(settings(journal), lambda r: r.label(calls, priority=Priority.BATCH))
    assert len(results) == 20


@pytest.mark.parametrize(
    ("images", "code"),
    [
        ((b"<html>not an image</html>",), "image_undecodable"),
        ((None,), "image_missing"),
        ((b"x" * 2000,), "image_too_large"),
    ],
)
def test_a_bad_image_is_an_error_result_and_affects_no_other_row(
    journal: Path, images: tuple[bytes | None, ...], code: str
) -> None:
    limits = MediaLimits(max_bytes=1000)
    calls = [call(0), call(1, images=images, media=limits), call(2)]

    results = run(settings(journal), lambda r: r.label(calls, priority=Priority.BATCH))

    assert [result.error_code for result in results] == [None, code, None]
    assert results[1].error_stage == "decode"
    assert results[2].text == expected_text(picture(2))


def test_an_image_of_endless_scans_costs_its_own_row_and_no_online_request_waits_for_it(
    journal: Path,
) -> None:
    limits = MediaLimits(max_decode_seconds=1.0)
    slow = call(1, images=(slow_jpeg(20_000),), media=limits)

    async def scenario(replica: VLMReplica) -> None:
        calls = [call(0), slow, slow, call(2)]
        batch = asyncio.ensure_future(replica.label(calls, priority=Priority.BATCH))
        (online,) = await replica.label([call(3)], priority=Priority.ONLINE)
        assert online.text == expected_text(picture(3))
        assert not batch.done()
        first, cut, also_cut, last = await batch
        assert (first.text, last.text) == (expected_text(picture(0)), expected_text(picture(2)))
        for result in (cut, also_cut):
            assert (result.error_code, result.error_stage) == ("image_too_slow", "decode")
            assert "took more than 1 s of CPU time" in str(result.error_message)

    run(settings(journal), scenario, within=100)


def test_a_replica_decodes_no_further_ahead_than_its_slots_and_the_bound(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.serving.decoded_pictures.MOST_BYTES", 1)
    most = 0

    async def scenario(replica: VLMReplica) -> None:
        nonlocal most
        await start_decoding(replica)
        calls = [[call(n), call(n + 1)] for n in range(0, 16, 2)]
        labelled = [asyncio.ensure_future(replica.label(c, priority=Priority.BATCH)) for c in calls]
        while not all(one.done() for one in labelled):
            most = max(most, replica._pictures.rows)
            await asyncio.sleep(0.001)
        texts = [result.text for one in labelled for result in one.result()]
        assert texts == [expected_text(picture(n)) for n in range(16)]
        assert (replica._pictures.rows, replica._pictures.bytes) == (0, 0)

    run(settings(journal, seconds=0.05), scenario)

    assert 4 <= most <= 6  # four slots, and the calls of two rows that were being decoded


def test_batch_and_online_jpegs_are_decoded_at_the_engines_jpeg_scale(
    journal: Path,
) -> None:
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "JPEG")
    data = buffer.getvalue()

    async def scenario(replica: VLMReplica) -> list[str | None]:
        requests = [call(0, images=(data,))]
        batch, online = [
            (await replica.label(requests, priority=priority))[0].text for priority in Priority
        ]
        *_, streamed = [piece async for piece in replica.stream(requests[0])]
        assert isinstance(streamed, Result)
        return [batch, online, streamed.text]

    scaled = decode_image(data, MediaLimits(), lambda width, height: 4)
    assert scaled.size == (64, 64)
    text = f"{image_hash(scaled)} kept {VISUAL_TOKENS}"
    assert run(settings(journal, reduced=4), scenario) == [text, text, text]
    assert text not in run(settings(journal), scenario)


def test_an_engines_error_result_keeps_its_code_stage_and_message(journal: Path) -> None:
    (result,) = run(settings(journal), lambda r: r.label([call(0, "bad")], priority=Priority.BATCH))
    assert (result.error_code, result.error_stage) == ("prompt_invalid", "prompt")
    assert result.error_message == "too long"


def test_an_error_result_always_has_a_stage(journal: Path) -> None:
    """Committed error rows say where they failed, whoever wrote the engine."""
    (result,) = run(
        settings(journal), lambda r: r.label([call(0, "stageless")], priority=Priority.BATCH)
    )
    assert (result.error_code, result.error_stage) == ("odd", "infer")


def test_a_row_that_makes_the_engine_raise_is_isolated_by_bisection(journal: Path) -> None:
    calls = [call(n, "raise" if n == 2 else "describe") for n in range(4)]

    results = run(settings(journal), lambda r: r.label(calls, priority=Priority.BATCH))

    assert [result.error_code for result in results] == [None, None, "inference_failed", None]
    assert results[2].error_message == "RuntimeError: the model raised"


def test_a_cancelled_call_leaves_the_queue_and_frees_its_capacity(journal: Path) -> None:
    async def scenario(replica: VLMReplica) -> None:
        await start_decoding(replica)
        running = asyncio.create_task(replica.label([call(0)], priority=Priority.BATCH))
        while not journal.exists():
            await asyncio.sleep(0.01)
        cancelled = asyncio.create_task(replica.label([call(1), call(2)], priority=Priority.BATCH))
        await asyncio.sleep(0.1)
        assert (await replica.stats()).waiting_batch == 3
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        stats = await replica.stats()
        assert (stats.waiting_batch, stats.batch_rows_in_flight) == (1, 1)
        await running
        await replica.label([call(3)], priority=Priority.BATCH)

    run(settings(journal, seconds=0.4), scenario)

    assert batches(journal) == [["r0"], ["r3"]]


def test_an_engine_that_raises_on_every_row_makes_the_replica_unhealthy(journal: Path) -> None:
    async def scenario(replica: VLMReplica) -> None:
        for first in range(0, 12, 4):
            await replica.check_health()
            calls = [call(first + n, "break") for n in range(4)]
            await replica.label(calls, priority=Priority.BATCH)
        with pytest.raises(EngineBroken, match="nor can a blank one"):
            await replica.check_health()

    run(settings(journal), scenario)


def test_rows_that_all_fail_are_their_senders_fault_while_the_engine_answers_a_blank_one(
    journal: Path,
) -> None:
    async def scenario(replica: VLMReplica) -> None:
        for first in range(0, 40, 4):
            calls = [call(first + n, "raise") for n in range(4)]
            await replica.label(calls, priority=Priority.ONLINE)
            await replica.check_health()

    run(settings(journal), scenario)


def test_online_images_wait_while_the_replica_holds_enough_pixels(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.serving.replica._ONLINE_PIXELS", 16)  # one picture

    async def scenario(replica: VLMReplica) -> None:
        each = [replica.label([call(n)], priority=Priority.ONLINE) for n in range(3)]
        assert len(await asyncio.gather(*each)) == 3

    run(settings(journal, seconds=0.05), scenario)
    assert [len(batch) for batch in batches(journal)] == [1, 1, 1]


def test_a_device_fault_ends_the_process_and_fails_no_row(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr("cluster.serving.replica._end_process", ended.set)

    async def scenario(replica: VLMReplica) -> None:
        calls = [call(0), call(1, "fault")]
        waiting = asyncio.create_task(replica.label(calls, priority=Priority.BATCH))
        while not ended.is_set():
            await asyncio.sleep(0.01)
        assert not waiting.done()
        replica.close()
        with pytest.raises(EngineBroken):
            await replica.check_health()

    run(settings(journal), scenario)


def test_a_call_alone_starts_when_the_replica_is_idle_and_keeps_batch_calls_out(
    journal: Path,
) -> None:
    async def scenario(replica: VLMReplica) -> None:
        queued = asyncio.create_task(
            replica.label([call(n) for n in range(8)], priority=Priority.BATCH)
        )
        await asyncio.sleep(0.05)
        alone = replica.label_alone([call(50), call(51)])
        began = asyncio.ensure_future(anext(alone))
        await asyncio.sleep(0.05)
        assert not began.done()
        with pytest.raises(Busy):
            await replica.label([call(60)], priority=Priority.BATCH)
        with pytest.raises(Busy):
            await anext(replica.label_alone([call(61)]))
        online = asyncio.create_task(replica.label([call(70)], priority=Priority.ONLINE))
        assert await began is None
        assert queued.done()
        results = await anext(alone)
        assert [result.id for result in results or ()] == ["r50", "r51"]
        assert not online.done()
        await alone.aclose()
        await online

    run(settings(journal, seconds=0.2), scenario)
    assert batches(journal)[-2:] == [["r50", "r51"], ["r70"]]


def test_a_call_alone_waits_for_the_step_of_a_cancelled_call(journal: Path) -> None:
    """The engine may still be busy with rows whose caller has gone."""

    async def scenario(replica: VLMReplica) -> None:
        gone = asyncio.create_task(replica.label([call(0)], priority=Priority.BATCH))
        while not journal.exists():
            await asyncio.sleep(0.01)
        gone.cancel()
        alone = replica.label_alone([call(1)])
        started = time.monotonic()
        assert await anext(alone) is None
        assert time.monotonic() - started > 0.2
        await alone.aclose()
        await replica.label([call(2)], priority=Priority.BATCH)

    run(settings(journal, seconds=0.5), scenario)


def test_running_out_of_memory_is_an_error_of_the_row_that_may_be_asked_again(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(data: bytes, limits: MediaLimits) -> bytes:
        if data == b"large":
            raise MemoryError("no memory for a bitmap")
        return data

    monkeypatch.setattr("cluster.images.decoders.check_bytes", run_out)
    calls = [call(0), call(1, images=(b"large",)), call(2)]
    results = run(settings(journal), lambda r: r.label(calls, priority=Priority.BATCH))
    assert [result.error_code for result in results] == [None, "inference_failed", None]
    assert results[1].error_message == "MemoryError: no memory for a bitmap"


def test_an_engine_that_mixes_up_answers_ends_its_replica(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr("cluster.serving.replica._end_process", ended.set)

    async def answer(self: EngineThread, request: object) -> Result:
        return Result(id="another row", text="x")

    monkeypatch.setattr(EngineThread, "answer", answer)
    run(settings(journal), lambda r: r.label([call(0)], priority=Priority.BATCH))
    assert ended.is_set()


def test_an_engine_at_work_and_an_idle_one_beat_and_a_hung_one_does_not(journal: Path) -> None:
    class Listener(Watchdog):
        def __init__(self) -> None:
            self.beats: list[float] = []

        def beat(self, allowed_seconds: float) -> None:
            self.beats.append(allowed_seconds)

        def close(self) -> None:
            self.beats.append(0.0)

    async def scenario(thread: EngineThread) -> None:
        await asyncio.sleep(1.2)
        assert len(listener.beats) > 1
        hung = asyncio.create_task(thread.answer(Request(id="a", prompt="slow")))
        await asyncio.sleep(0.3)
        heard = len(listener.beats)
        await asyncio.sleep(1.2)
        assert len(listener.beats) == heard
        await hung
        await thread.answer(Request(id="b", prompt="x"))
        assert listener.beats[-1] >= 20 * 2.0  # the slowest step took two seconds

    listener = Listener()
    thread = EngineThread(
        settings(journal).build,
        lambda error: None,
        watchdog=listener,
        deadline=Deadline(first=600, least=1),
    )
    asyncio.run(asyncio.wait_for(scenario(thread), 20))
    thread.close()
    assert listener.beats[-1] == 0.0


def test_a_stream_ends_with_its_result_and_a_bad_image_gives_only_a_result(
    journal: Path,
) -> None:
    async def scenario(replica: VLMReplica) -> None:
        text, result = [piece async for piece in replica.stream(call(1))]
        assert text == expected_text(picture(1))
        assert isinstance(result, Result)
        assert result.text == text
        (missing,) = [piece async for piece in replica.stream(call(2, images=(None,)))]
        assert isinstance(missing, Result)
        assert missing.error_code == "image_missing"

    run(settings(journal), scenario)


def test_stats_count_engine_time_and_rows(journal: Path) -> None:
    async def scenario(replica: VLMReplica) -> None:
        await replica.label([call(n) for n in range(6)], priority=Priority.BATCH)
        stats = await replica.stats()
        assert stats.rows == 6
        assert 0.2 <= stats.busy_seconds <= stats.uptime_seconds
        assert (stats.model, stats.model_revision, stats.image_backend) == ("fake", "fake-1", "pil")
        assert stats.dtype == "float32"

    run(settings(journal, seconds=0.1), scenario)


def test_the_default_slots_depend_on_the_device() -> None:
    by_default, explicit = EngineSettings(model="m"), EngineSettings(model="m", slots=3)
    on_cpu, on_gpu = (by_default.sized(gpu=gpu).slots for gpu in (False, True))
    assert (on_cpu, on_gpu) == (default_slots(gpu=False), default_slots(gpu=True))
    assert default_slots(gpu=False) < default_slots(gpu=True)
    assert {explicit.sized(gpu=gpu).slots for gpu in (False, True)} == {3}


@pytest.mark.parametrize("slots", [4, 16, 64])
def test_a_replica_holds_what_one_labeller_sends_and_one_control_call_more(
    journal: Path, slots: int
) -> None:
    sizes = [call_rows(slots)] * ((slots + rows_waiting(slots)) // call_rows(slots))

    async def scenario(replica: VLMReplica) -> None:
        def send(rows: int) -> asyncio.Task[list[Result]]:
            calls = [call(number) for number in range(rows)]
            return asyncio.ensure_future(replica.label(calls, priority=Priority.BATCH))

        tasks = [send(rows) for rows in (*sizes, slots, 1)]
        *accepted, refused = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(refused, Busy)
        assert [len(results) for results in accepted] == [*sizes, slots]  # type: ignore[arg-type]

    run(settings(journal, rows=slots), scenario)


def test_invalid_engine_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="slots 0: give at least 1"):
        EngineSettings(model="m", slots=0)
    with pytest.raises(UsageError, match="dtype 'bf16': use one of auto, float32"):
        EngineSettings(model="m", dtype="bf16")
    with pytest.raises(UsageError, match="module:callable"):
        EngineSettings(model="m", engine="no.colon")


def test_a_replica_that_can_decode_nothing_ends_instead_of_failing_rows(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would answer at once, and so be given most of the rows."""
    ended = threading.Event()
    monkeypatch.setattr("cluster.serving.replica._end_process", ended.set)

    async def scenario(replica: VLMReplica) -> None:
        async def no_more_processes(*_: object) -> None:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

        monkeypatch.setattr(replica._decoders[Priority.BATCH], "decode", no_more_processes)
        await replica.label([call(0)], priority=Priority.BATCH)
        assert ended.is_set()

    run(settings(journal), scenario)
