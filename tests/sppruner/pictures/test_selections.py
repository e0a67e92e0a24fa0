"""Selections read off a report's mask are those the pruner made."""

from __future__ import annotations

import pytest

from sppruner.errors import InputError
from sppruner.pictures.selections import selections_from_report
from sppruner.pruner import Pruner
from sppruner.spec import Budget, PruneSpec
from tests.sppruner.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_selections_from_a_report_equal_the_pruner_s(family: str, ratio: float) -> None:
    """For two images of several planes, with row-end tokens in families that have them."""
    pruner = Pruner(FAMILIES[family].build())
    spec = PruneSpec(method="grid", budget=Budget(ratio=ratio))
    prepared = pruner.prepare(FAMILIES[family].batch([2]), spec)
    (report,) = prepared.reports
    restored = selections_from_report(prepared, report.kept_tokens)
    for (plane, choice), (other, expected) in zip(restored, prepared.selections, strict=True):
        assert plane is other
        assert choice.index_K.tolist() == expected.index_K.tolist()


def test_a_report_of_another_image_is_refused() -> None:
    family = FAMILIES["llava"]
    spec = PruneSpec(method="grid", budget=Budget(ratio=0.3))
    one, two = (Pruner(family.build()).prepare(family.batch([images]), spec) for images in (1, 2))
    with pytest.raises(InputError, match=r"2 bytes of kept tokens do not match 32 visual tokens"):
        selections_from_report(two, one.reports[0].kept_tokens)
