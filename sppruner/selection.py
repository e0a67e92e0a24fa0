"""From encoded images to what stays of each: schedules, selections, kept features.

The method sees planes and counts, never the model. What one image keeps does not depend on the
other images of its batch.

Shapes: N tokens of an image's run, P tokens of a plane, K kept tokens, D width of the language
model, V width of the vision encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sppruner.adapters import EncodedImage, Kept
from sppruner.selectors import Selector
from sppruner.spec import Budget, PruneSpec, shares
from sppruner.stages import TokenSchedule
from sppruner.types import Selection


def token_schedules(
    images: Sequence[EncodedImage],
    specs: Sequence[PruneSpec],
    selectors: Sequence[Selector | None],
    layers: int,
) -> list[TokenSchedule]:
    """How many tokens of each image enter the decoder, and how many stay at each of its stages.

    specs, selectors: one per prompt. layers: number of decoder layers.
    """
    by_row: dict[int, list[EncodedImage]] = {}
    for image in images:
        by_row.setdefault(image.row, []).append(image)
    schedules = []
    for row, members in by_row.items():
        selector = selectors[row]
        if selector is None:
            sizes = [image.count for image in members]
            schedules += [TokenSchedule(before=n, counted=n) for n in sizes]
            continue
        counts = budget_counts(members, specs[row].budget, selector)
        for image, k in zip(members, counts, strict=True):
            schedules.append(selector.schedule(image.count, k, layers))
    return schedules


def budget_counts(images: Sequence[EncodedImage], budget: Budget, selector: Selector) -> list[int]:
    """How many tokens of each image of one prompt the budget keeps."""
    counts = budget.per_image([image.count for image in images])
    if not budget.spread:
        return counts
    return [
        budget.reweighted(k, image.count, selector.information(image.planes))
        for image, k in zip(images, counts, strict=True)
    ]


def select(
    images: Sequence[EncodedImage],
    schedules: Sequence[TokenSchedule],
    selectors: Sequence[Selector | None],
) -> list[list[Selection]]:
    """One selection per plane of each image. Planes of one method go through it together; an
    image's tokens are divided among its planes by size."""
    counts = []
    for image, schedule in zip(images, schedules, strict=True):
        sizes = [plane.count for plane in image.planes]
        counts.append(shares(min(schedule.before, sum(sizes)), sizes))
    groups: dict[Selector | None, list[tuple[int, int]]] = {}
    for i, image in enumerate(images):
        for p in range(len(image.planes)):
            groups.setdefault(selectors[image.row], []).append((i, p))
    chosen: dict[tuple[int, int], Selection] = {}
    for selector, members in groups.items():
        planes = [images[i].planes[p] for i, p in members]
        if selector is None:
            device = planes[0].features_ND.device
            picked = [Selection(index_K=torch.arange(g.count, device=device)) for g in planes]
        else:
            picked = selector.select(planes, [counts[i][p] for i, p in members])
        chosen.update(zip(members, picked, strict=True))
    return [[chosen[i, p] for p in range(len(im.planes))] for i, im in enumerate(images)]


def selection_flops(
    image: EncodedImage, chosen: Sequence[Selection], selector: Selector | None
) -> int:
    """Modelled FLOPs of selecting from an image; a plane kept or dropped whole costs nothing."""
    if selector is None:
        return 0
    width = image.run_ND.shape[1]
    return sum(
        selector.flops(plane.count, choice.count, width)
        for plane, choice in zip(image.planes, chosen, strict=True)
        if 0 < choice.count < plane.count
    )


def keep(
    image: EncodedImage,
    count: int,
    chosen: Sequence[Selection],
    project: Callable[[Tensor], Tensor],
) -> Kept:
    """What stays of an image's run. Tokens outside all planes, such as row ends, stay in order only
    as far as the budget exceeds what the planes keep.

    count: tokens that stay. project: maps encoder states to features.
    """
    features_ND = image.run_ND.clone()
    mask_N = torch.zeros(image.count, dtype=torch.bool, device=features_ND.device)
    free_N = ~mask_N
    for places_P, choice in zip(image.places, chosen, strict=True):
        at_K = places_P[choice.index_K]
        mask_N[at_K], free_N[places_P] = True, False
        replaced_KD = choice.replace_KD
        if choice.replace_KV is not None:
            replaced_KD = project(choice.replace_KV.to(features_ND.dtype))
        if replaced_KD is not None:
            features_ND[at_K] = replaced_KD.to(features_ND.dtype)
    left = count - sum(choice.count for choice in chosen)
    mask_N[free_N.nonzero().squeeze(1)[: max(0, left)]] = True
    index_K = mask_N.nonzero().squeeze(1)
    return Kept(index_K=index_K, features_KD=features_ND[index_K])


def kept_mask(image: EncodedImage, kept: Kept) -> Tensor:
    """[N] bool over the image's run: True where a token is kept."""
    mask_N = torch.zeros(image.count, dtype=torch.bool, device=kept.index_K.device)
    mask_N[kept.index_K] = True
    return mask_N
