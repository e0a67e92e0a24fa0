"""Which tokens a stage keeps, and how the images of a batch add up to a plan."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sppruner.stages import StagePlan, TokenSchedule
from sppruner.stages.plan import most_attended


def test_a_schedule_changes_at_its_stages() -> None:
    schedule = TokenSchedule(before=8, counted=4, stages=((1, 4), (3, 2)))
    assert [schedule.at(layer) for layer in range(5)] == [8, 4, 4, 2, 2]


def test_a_row_keeps_the_sum_of_its_images_and_a_dense_row_everything() -> None:
    visual_BL = torch.tensor([[True] * 8 + [False]] * 3)
    mask_BL = torch.ones(3, 9, dtype=torch.int64)
    pruned = TokenSchedule(before=4, counted=2, stages=((1, 3), (2, 1)))
    late = TokenSchedule(before=4, counted=2, stages=((2, 2),))
    dense = TokenSchedule(before=8, counted=8)
    plan = StagePlan.from_schedules(
        [0, 0, 1], [pruned, late, dense], attention_mask_BL=mask_BL, visual_BL=visual_BL
    )
    assert plan is not None
    assert plan.keep == {1: [7, 8, 0], 2: [3, 8, 0]}
    dense_plan = StagePlan.from_schedules(
        [0], [dense], attention_mask_BL=mask_BL, visual_BL=visual_BL
    )
    assert dense_plan is None, "nothing to do inside the decoder"


def test_rows_rank_by_the_scores_of_their_method_and_idle_rows_by_those_of_the_others() -> None:
    visual_BL = torch.tensor([[True] * 8 + [False]] * 3)
    mask_BL = torch.ones(3, 9, dtype=torch.int64)
    stage = TokenSchedule(before=8, counted=2, stages=((1, 4), (3, 2)), scoring="stage")
    before = TokenSchedule(before=8, counted=2, stages=((1, 2), (2, 1)))
    dense = TokenSchedule(before=8, counted=8)
    plan = StagePlan.from_schedules(
        [0, 1, 2], [stage, before, dense], attention_mask_BL=mask_BL, visual_BL=visual_BL
    )
    assert plan is not None
    assert plan.stage_scored == {1: [True, False, False], 2: [False] * 3, 3: [True] * 3}


def test_the_earlier_token_is_kept_on_a_tie() -> None:
    row_BL = torch.tensor([[9.0, 1.0, 2.0, 1.0, 1.0, 2.0]])
    visual_BL = torch.tensor([[False, True, True, True, True, True]])
    kept_BL = most_attended(row_BL, visual_BL, torch.tensor([3]))
    assert kept_BL.tolist() == [[False, True, True, False, False, True]]


@given(
    st.lists(
        st.tuples(st.lists(st.booleans(), min_size=12, max_size=12), st.integers(0, 15)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 100),
)
def test_exactly_the_count_of_the_most_attended_visual_tokens_is_kept(
    rows: list[tuple[list[bool], int]], seed: int
) -> None:
    visual_BL = torch.tensor([visual for visual, _ in rows])
    keep_B = torch.tensor([keep for _, keep in rows])
    generator = torch.Generator().manual_seed(seed)
    row_BL = torch.rand(visual_BL.shape, generator=generator)
    kept_BL = most_attended(row_BL, visual_BL, keep_B)
    assert not (kept_BL & ~visual_BL).any()
    assert torch.equal(kept_BL.sum(dim=1), keep_B.minimum(visual_BL.sum(dim=1)))
    for kept_L, visual_L, row_L in zip(kept_BL, visual_BL, row_BL, strict=True):
        dropped_L = visual_L & ~kept_L
        if kept_L.any() and dropped_L.any():
            assert row_L[kept_L].min() >= row_L[dropped_L].max()
