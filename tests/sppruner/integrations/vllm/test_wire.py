"""What is asked of an image survives its way; placeholder sequences are shortened run by run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sppruner.integrations.vllm.wire import ImageRequest, Run, shorten
from sppruner.spec import DENSE, Budget, PruneSpec, shares

IMAGE = 9

numbers = st.integers(0, 10**6)
specs = st.sampled_from(
    [
        DENSE,
        PruneSpec(method="sppruner", budget=Budget(ratio=0.222), options={"kappa": 0.5}),
        PruneSpec(method="topk", budget=Budget(tokens=7), positions="renumber"),
    ]
)
runs = st.lists(st.builds(Run, start=numbers, kept=numbers, tokens=numbers), max_size=4)


@given(specs, st.lists(numbers, max_size=5), st.text(max_size=8), runs)
def test_a_request_is_the_same_behind_its_tensor(
    spec: PruneSpec, words: list[int], key: str, of: list[Run]
) -> None:
    request = ImageRequest(spec=spec, words=tuple(words), key=key, runs=tuple(of))
    assert ImageRequest.from_tensor(request.to_tensor()) == request


@given(st.lists(st.sampled_from([IMAGE, 1, 2]), max_size=40), st.integers(0, 40))
def test_only_placeholders_are_dropped_and_runs_say_where(sequence: list[int], due: int) -> None:
    short, found = shorten(sequence, IMAGE, lambda lengths: shares(due, lengths))
    others = [token for token in sequence if token != IMAGE]
    assert [token for token in short if token != IMAGE] == others
    assert short.count(IMAGE) == sum(run.kept for run in found) == min(due, sequence.count(IMAGE))
    assert sum(run.tokens for run in found) == sequence.count(IMAGE)
    for run in found:
        assert short[run.start : run.start + run.kept] == [IMAGE] * run.kept
    # Put back, the sequence is the one before.
    whole, copied = [], 0
    for run in found:
        whole += short[copied : run.start] + [IMAGE] * run.tokens
        copied = run.start + run.kept
    assert whole + short[copied:] == sequence
