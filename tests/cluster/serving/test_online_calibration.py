"""An endpoint that may choose prunes where it measured that it pays, by size of image and load."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Sequence

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
from tests.cluster.edge import Recorded, ask, data_uri, image_part, send, text_part, user

SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.25))


def square(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "gray").save(buffer, "PNG")
    return buffer.getvalue()


class Timed:
    """Replicas on which a pruned row takes a second and a dense one as long as its image has
    thousands of pixels, divided by the rows beside it."""

    def __init__(self) -> None:
        self.calls: list[list[LabelRequest]] = []

    def stream(self, call: LabelRequest) -> AsyncGenerator[str | Result]:
        raise AssertionError("nothing streams here")

    async def label(self, calls: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        assert priority is Priority.ONLINE
        self.calls.append(list(calls))
        answers = []
        for call in calls:
            with Image.open(io.BytesIO(call.images[0] or b"")) as image:
                dense = image.width * image.height / 1000 / len(calls)
            pruned = 1 + len(self.calls) / 1e6
            first = len(self.calls) % 6 == 1
            seconds = 1e6 if first else dense  # the first call of a cell says nothing
            answers.append(Result(id=call.id, text="", seconds=pruned, control_seconds=seconds))
        return answers


def measured(sides: Sequence[int] = (20, 100, 200), most: int = 8) -> OnlineBreakEven:
    return asyncio.run(calibrate_online(Timed(), SPEC, full_load=most, sides=sides))


def test_every_size_is_timed_alone_and_with_a_full_replica_both_ways() -> None:
    replicas = Timed()
    found = asyncio.run(calibrate_online(replicas, SPEC, full_load=8, sides=(20, 100)))
    assert [(c.pixels, c.load) for c in found.cells] == [(400, 1), (400, 8), (10**4, 1), (10**4, 8)]
    assert [len(calls) for calls in replicas.calls] == [1] * 6 + [8] * 6 + [1] * 6 + [8] * 6
    asked = [call for calls in replicas.calls for call in calls]
    assert all(call.control and call.spec == SPEC for call in asked)
    assert len({call.images for call in asked[:54]}) == 54 - 6, "drawn anew for every call"
    ratios = [c.decision.measured.ratio for c in found.cells if c.decision.measured is not None]
    assert ratios == pytest.approx([0.4, 0.05, 10, 1.25], rel=1e-3)
    assert [c.decision.pays for c in found.cells] == [False, False, True, True]


@pytest.mark.parametrize(
    ("side", "load", "pays"),
    [(20, 1, False), (10, 1, False), (30, 1, False), (90, 1, True), (400, 30, True)],
)
def test_a_request_is_answered_like_the_nearest_that_was_timed(
    side: int, load: float, pays: bool
) -> None:
    assert measured().spec(SPEC, [square(side)], load) == (SPEC if pays else DENSE)


def test_images_of_one_request_count_together() -> None:
    assert measured().spec(SPEC, [square(20)], 1) == DENSE
    assert measured().spec(SPEC, [square(20)] * 30, 1) == SPEC


@pytest.mark.parametrize("images", [[], [None], [b"no image"]])
def test_what_has_no_size_is_left_to_the_replica(images: list[bytes | None]) -> None:
    assert measured().spec(SPEC, images, 1) == SPEC


def cell(side: int, load: int, ratio: float) -> Cell:
    found = MeasuredRatio(ratio=ratio, low=ratio, high=ratio, rows=5, batches=5)
    return Cell(pixels=side * side, load=load, decision=BreakEven(measured=found))


CHOICE = OnlineBreakEven(cells=(cell(20, 1, 0.5), cell(200, 1, 2.0)))
SETTINGS = ApiSettings(default_spec=SPEC, auto=True)


def about(side: int) -> dict[str, object]:
    return user(text_part("describe"), image_part(data_uri(square(side))))


def test_the_endpoint_prunes_large_images_and_not_small_ones() -> None:
    replicas = Recorded()
    for side in (20, 200):
        ask(replicas, SETTINGS, CHOICE, messages=[about(side)])
    assert [call.spec for call in replicas.calls] == [DENSE, SPEC]


def test_requests_that_are_being_answered_are_the_load() -> None:
    replicas = Recorded()
    choice = OnlineBreakEven(cells=(cell(20, 1, 0.5), cell(20, 2, 2.0)))

    async def both() -> None:
        app = create_app(replicas, SETTINGS, model="fake", break_even=choice)
        body = {"model": "fake", "messages": [about(20)]}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            for number in (1, 2, 1):
                asked = [client.post("/v1/chat/completions", json=body) for _ in range(number)]
                assert all(answer.status_code == 200 for answer in await asyncio.gather(*asked))

    asyncio.run(both())
    assert [call.spec for call in replicas.calls] == [DENSE, DENSE, SPEC, DENSE]


def test_what_a_request_asks_for_itself_is_done() -> None:
    replicas = Recorded()
    ask(replicas, SETTINGS, CHOICE, messages=[about(20)], prune={"method": "grid", "retain": 0.5})
    assert [call.spec.method for call in replicas.calls] == ["grid"]


def test_what_was_measured_can_be_read() -> None:
    (card,) = send("GET", "/v1/models", break_even=CHOICE).json()["data"]
    assert [(one["pixels"], one["load"], one["pays"]) for one in card["break_even"]] == [
        (400, 1, False),
        (40_000, 1, True),
    ]
    (card,) = send("GET", "/v1/models").json()["data"]
    assert "break_even" not in card


def test_there_must_be_something_to_choose() -> None:
    with pytest.raises(UsageError, match="name a method"):
        ApiSettings(auto=True)
