"""Calibration of an endpoint with auto: the decision depends on image size and load."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Collection, Sequence

import httpx
import pytest
from PIL import Image

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.speedup import MeasuredRatio
from cluster.errors import UsageError
from cluster.protocol import LabelRequest, Priority
from cluster.serving.http.app import ApiSettings, create_app
from cluster.serving.online_calibration import Cell, OnlineBreakEven, calibrate_online
from sppruner.engine.interface import Result
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.cluster.edge import (
    RecordingReplica,
    complete,
    data_uri,
    image_part,
    send_request,
    text_part,
    user_message,
)

SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.25))


def square(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "gray").save(buffer, "PNG")
    return buffer.getvalue()


class TimedReplicas:
    """Replicas that take one second for a pruned row, and for a dense row one second per thousand
    pixels of its image, divided by the rows of the call. Calls in `failing` fail."""

    def __init__(self, failing: Collection[int] = ()) -> None:
        self.calls: list[list[LabelRequest]] = []
        self._failing = failing

    def stream(self, request: LabelRequest) -> AsyncGenerator[str | Result]:
        raise AssertionError("calibration never streams")

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        assert priority is Priority.ONLINE
        number = len(self.calls)
        self.calls.append(list(requests))
        if number in self._failing:
            return [Result(id=r.id, text=None, error_code="inference_failed") for r in requests]
        results = []
        for request in requests:
            with Image.open(io.BytesIO(request.images[0] or b"")) as image:
                dense = image.width * image.height / 1000 / len(requests)
            seconds = dense if request.spec.is_dense else 1 + number / 1e6
            if number % 12 < 2:
                seconds = 1e6 if request.spec.is_dense else 1.0  # the first block must not count
            results.append(Result(id=request.id, text="", seconds=seconds))
        return results


def calibrated(sides: Sequence[int] = (20, 100, 200), most: int = 8) -> OnlineBreakEven:
    return asyncio.run(calibrate_online(TimedReplicas(), SPEC, full_load=most, sides=sides))


def test_every_image_size_is_timed_at_load_one_and_at_full_load() -> None:
    replicas = TimedReplicas()
    found = asyncio.run(calibrate_online(replicas, SPEC, full_load=8, sides=(20, 100)))
    assert [(c.pixels, c.load) for c in found.cells] == [(400, 1), (400, 8), (10**4, 1), (10**4, 8)]
    assert [len(call) for call in replicas.calls] == ([1] * 12 + [8] * 12) * 2
    assert all(len({request.spec for request in call}) == 1 for call in replicas.calls)
    dense_first = [call[0].spec.is_dense for call in replicas.calls[::2]]
    assert dense_first == [True, False] * 12, "each way first, in turns"
    images = [request.images for call in replicas.calls for request in call]
    assert len(set(images)) == len(images), "no image is in a cache"
    ratios = [c.decision.measured.ratio for c in found.cells if c.decision.measured is not None]
    assert ratios == pytest.approx([0.4, 0.05, 10, 1.25], rel=1e-3)
    assert [c.decision.pays for c in found.cells] == [False, False, True, True]


def test_a_size_that_cannot_be_answered_both_ways_is_dense() -> None:
    """On a full memory, say: its decision rests on nothing, and others stay."""
    failing = range(6)  # each ends its block
    found = asyncio.run(calibrate_online(TimedReplicas(failing), SPEC, full_load=8, sides=(100,)))
    alone, full = found.cells
    assert (alone.decision.measured, alone.decision.pays) == (None, False)
    assert full.decision.measured is not None


@pytest.mark.parametrize(
    ("side", "load", "pays"),
    [
        (20, 1, False),
        (90, 1, False),  # between a size where it pays and one where it does not
        (100, 1, True),
        (150, 4, True),
        (400, 30, True),
    ],
)
def test_pruning_must_pay_at_the_sizes_and_loads_around(side: int, load: float, pays: bool) -> None:
    assert calibrated().spec(SPEC, [square(side)], load) == (SPEC if pays else DENSE)


def test_images_smaller_than_any_that_was_timed_are_answered_densely() -> None:
    decisions = OnlineBreakEven(cells=(cell(100, 1, 2.0), cell(100, 8, 2.0)))
    assert decisions.spec(SPEC, [square(99)], 1) == DENSE
    assert decisions.spec(SPEC, [square(100)], 1) == SPEC


def test_between_two_loads_pruning_must_pay_at_both() -> None:
    decisions = OnlineBreakEven(cells=(cell(100, 1, 0.9), cell(100, 8, 2.0)))
    chosen = [decisions.spec(SPEC, [square(100)], load).is_dense for load in (1, 2, 7.9, 8, 9)]
    assert chosen == [True, True, True, False, False]


def test_pixels_of_a_requests_images_are_summed() -> None:
    assert calibrated().spec(SPEC, [square(20)], 1) == DENSE
    assert calibrated().spec(SPEC, [square(20)] * 30, 1) == SPEC


@pytest.mark.parametrize("images", [[], [None], [b"no image"]])
def test_requests_without_a_readable_image_keep_their_spec(images: list[bytes | None]) -> None:
    assert calibrated().spec(SPEC, images, 1) == SPEC


def cell(side: int, load: int, ratio: float) -> Cell:
    found = MeasuredRatio(ratio=ratio, low=ratio, high=ratio, rows=5, blocks=5)
    return Cell(pixels=side * side, load=load, decision=BreakEven(measured=found))


DECISIONS = OnlineBreakEven(cells=(cell(20, 1, 0.5), cell(200, 1, 2.0)))
SETTINGS = ApiSettings(default_spec=SPEC, auto=True)


def message_with_image(side: int) -> dict[str, object]:
    return user_message(text_part("describe"), image_part(data_uri(square(side))))


def test_the_endpoint_prunes_large_images_and_not_small_ones() -> None:
    replicas = RecordingReplica()
    for side in (20, 200):
        complete(replicas, SETTINGS, DECISIONS, messages=[message_with_image(side)])
    assert [request.spec for request in replicas.requests] == [DENSE, SPEC]


def test_the_load_is_the_number_of_requests_in_flight() -> None:
    replicas = RecordingReplica()
    decisions = OnlineBreakEven(cells=(cell(20, 1, 0.5), cell(20, 2, 2.0)))

    async def send_one_two_one() -> None:
        app = create_app(replicas, SETTINGS, model="fake", break_even=decisions)
        body = {"model": "fake", "messages": [message_with_image(20)]}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for number in (1, 2, 1):
                posts = [client.post("/v1/chat/completions", json=body) for _ in range(number)]
                responses = await asyncio.gather(*posts)
                assert all(response.status_code == 200 for response in responses)

    asyncio.run(send_one_two_one())
    assert [request.spec for request in replicas.requests] == [DENSE, DENSE, SPEC, DENSE]


def test_a_requests_own_prune_field_overrides_the_decision() -> None:
    replicas = RecordingReplica()
    complete(
        replicas,
        SETTINGS,
        DECISIONS,
        messages=[message_with_image(20)],
        prune={"method": "grid", "retain": 0.5},
    )
    assert [request.spec.method for request in replicas.requests] == ["grid"]


def test_the_models_route_shows_the_measured_cells() -> None:
    (card,) = send_request("GET", "/v1/models", break_even=DECISIONS).json()["data"]
    assert [(one["pixels"], one["load"], one["pays"]) for one in card["break_even"]] == [
        (400, 1, False),
        (40_000, 1, True),
    ]
    (card,) = send_request("GET", "/v1/models").json()["data"]
    assert "break_even" not in card


def test_auto_without_a_pruning_method_is_refused() -> None:
    with pytest.raises(UsageError, match="name a method"):
        ApiSettings(auto=True)
