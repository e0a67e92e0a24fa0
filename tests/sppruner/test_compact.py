"""Re-packing keeps order, pads on the left only and never pads with a placeholder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sppruner.compact import Compacted, compact, full_positions
from sppruner.spec import Positions

IMAGE, PAD = 5, 0


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and keep mask of a left-padded batch; a third of the ids are images."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    cells = st.lists(st.sampled_from([IMAGE, 6, 7]), min_size=length, max_size=length)
    ids_BS = torch.tensor([draw(cells) for _ in range(rows)])
    mask_BS = torch.tensor([[0] * (length - n) + [1] * n for n in lengths])
    drop = st.lists(st.booleans(), min_size=length, max_size=length)
    keep_BS = torch.tensor([draw(drop) for _ in range(rows)]) & mask_BS.bool()
    return ids_BS.masked_fill(mask_BS == 0, PAD), mask_BS, keep_BS


def run(batch: tuple[Tensor, Tensor, Tensor], policy: Positions, rows: int = 1) -> Compacted:
    ids_BS, mask_BS, keep_BS = batch
    text_1BS = full_positions(mask_BS)
    planes = [text_1BS + 10 * r for r in range(rows)]
    return compact(
        input_ids_BS=ids_BS,
        keep_BS=keep_BS,
        positions_RBS=torch.cat(planes),
        policy=policy,
        pad_id=PAD,
    )


@given(batches(), st.sampled_from(["keep", "renumber"]))
def test_rows_hold_the_kept_tokens_in_order_after_their_padding(
    batch: tuple[Tensor, Tensor, Tensor], policy: Positions
) -> None:
    ids_BS, _, keep_BS = batch
    short = run(batch, policy)
    assert short.input_ids_BL.shape[1] == int(keep_BS.sum(dim=1).max())
    for row, mask_L in enumerate(short.attention_mask_BL.tolist()):
        assert mask_L == sorted(mask_L), "padding must be on the left only"
        kept = [i for i, m in zip(short.input_ids_BL[row].tolist(), mask_L, strict=True) if m]
        assert kept == ids_BS[row][keep_BS[row]].tolist()


@given(batches(), st.sampled_from(["keep", "renumber"]))
def test_padding_holds_no_image_placeholder_and_no_position(
    batch: tuple[Tensor, Tensor, Tensor], policy: Positions
) -> None:
    short = run(batch, policy, rows=4)
    padding = short.attention_mask_BL == 0
    assert (short.input_ids_BL[padding] == PAD).all()
    assert (short.positions_RBL[:, padding] == 0).all()


@given(batches())
def test_kept_positions_are_the_originals_and_renumbered_ones_count_from_zero(
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    _, mask_BS, keep_BS = batch
    full_BS = full_positions(mask_BS)[0]
    for row in range(len(keep_BS)):
        kept = run(batch, "keep")
        valid = kept.attention_mask_BL[row].bool()
        assert kept.positions_RBL[0, row][valid].equal(full_BS[row][keep_BS[row]])
        renumbered = run(batch, "renumber").positions_RBL[0, row][valid]
        assert renumbered.equal(torch.arange(len(renumbered)))


@pytest.mark.parametrize("policy", ["keep", "renumber"])
@given(batch=batches())
def test_mrope_renumbers_the_text_row_and_only_the_text_row(
    policy: Positions, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, mask_BS, keep_BS = batch
    full_BS = full_positions(mask_BS)[0]
    short = run(batch, policy, rows=4)
    for row in range(len(keep_BS)):
        valid = short.attention_mask_BL[row].bool()
        assert short.positions_RBL[0, row][valid].equal(torch.arange(int(valid.sum())))
        for plane in (1, 2, 3):
            expected = full_BS[row][keep_BS[row]] + 10 * plane
            assert short.positions_RBL[plane, row][valid].equal(expected)


def test_inputs_are_not_modified() -> None:
    ids_BS = torch.tensor([[PAD, IMAGE, 6, IMAGE, 7]])
    mask_BS = torch.tensor([[0, 1, 1, 1, 1]])
    keep_BS = torch.tensor([[False, True, True, False, True]])
    batch = (ids_BS, mask_BS, keep_BS)
    before = [tensor.clone() for tensor in batch]
    run(batch, "renumber", rows=4)
    assert all(a.equal(b) for a, b in zip(batch, before, strict=True))
