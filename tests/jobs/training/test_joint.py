"""A continuation of the joint training uses its own checkpoint and new batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.training import joint, packing
from jobs.training.families import LLAVA
from jobs.training.history import History
from jobs.training.joint import load_joint_model, locate_joint_checkpoint, train_joint
from jobs.training.loop import load_checkpoint, save_checkpoint
from jobs.training.ranks import Ranks
from jobs.training.scene_cache import SceneCache, build_cache
from jobs.training.stages import TrainingContext

CPU = torch.device("cpu")
STEPS = 2  # the fewest steps of a continuation
SINGLE_RANK = Ranks(0, 1, None)
BEFORE = History(language=1, vision=1, sharpen=1, joint=5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SceneCache:
    return build_cache(tmp_path_factory.mktemp("scenes"), 60)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder from which joint training can continue."""
    folder = tmp_path_factory.mktemp("finished")
    LLAVA.save(LLAVA.build(LLAVA.tokenizer()), folder)
    BEFORE.write(folder)
    return folder


def build_context(folder: Path, cache: SceneCache, start: Path) -> TrainingContext:
    return TrainingContext(
        folder=folder,
        cache=cache,
        device=CPU,
        start=start,
        scale=0.0,
        compiled=False,
        save_seconds=-1.0,
    )


def test_each_continuation_in_a_shared_work_folder_trains(
    tmp_path: Path, cache: SceneCache, finished: Path
) -> None:
    """It does not use the finished checkpoint of the run or the continuation before it."""
    work, second = tmp_path / "work", tmp_path / "second"
    work.mkdir()
    untouched = {"model": {}, "optimizers": [], "step": 2000}
    save_checkpoint(locate_joint_checkpoint(work, None), untouched)

    train_joint(build_context(work, cache, finished), SINGLE_RANK)
    once = load_joint_model(LLAVA, locate_joint_checkpoint(work, finished))
    LLAVA.save(once, second)
    BEFORE.continued(STEPS).write(second)
    train_joint(build_context(work, cache, second), SINGLE_RANK)
    twice = load_joint_model(LLAVA, locate_joint_checkpoint(work, second))

    assert load_checkpoint(locate_joint_checkpoint(work, None), CPU) == untouched
    initial, once_more, last = (
        model.model.multi_modal_projector.linear_1.weight.bfloat16()
        for model in (LLAVA.build(LLAVA.tokenizer()), once, twice)
    )
    assert not torch.equal(initial, once_more)
    assert not torch.equal(once_more, last)
    for start in (finished, second):
        assert load_checkpoint(locate_joint_checkpoint(work, start), CPU)["step"] == STEPS


def test_an_interrupted_continuation_resumes_from_its_own_checkpoint(
    tmp_path: Path, cache: SceneCache, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = build_context(tmp_path, cache, finished)
    loss, steps = packing.compute_lm_loss, 0

    def until(last: int) -> Callable[..., Tensor]:
        def loss_or_stop(*given: Any) -> Tensor:
            nonlocal steps
            if steps == last:
                raise KeyboardInterrupt
            steps += 1
            return loss(*given)

        return loss_or_stop

    monkeypatch.setattr(joint, "compute_lm_loss", until(1))
    with pytest.raises(KeyboardInterrupt):
        train_joint(context, SINGLE_RANK)
    assert load_checkpoint(locate_joint_checkpoint(tmp_path, finished), CPU)["step"] == 1
    monkeypatch.setattr(joint, "compute_lm_loss", until(STEPS))
    train_joint(context, SINGLE_RANK)
    assert steps == STEPS
    assert load_checkpoint(locate_joint_checkpoint(tmp_path, finished), CPU)["step"] == STEPS


def record_draws(
    context: TrainingContext, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[list[int], list[int], list[list[int]] | None]]:
    """Scenes, answer tokens and kept visual tokens of every step of a continuation."""
    scenes, answers, kept = [], [], []
    pack_scenes, forward = packing.pack_scenes, packing.compute_answer_logits

    def recording_pack(cache: SceneCache, drawn_scenes: Any, *rest: Any) -> Any:
        scenes.append(drawn_scenes.tolist())
        return pack_scenes(cache, drawn_scenes, *rest)

    def recording_forward(family: Any, model: Any, tokens: Any, text: Any, keep: Any) -> Tensor:
        answers.append(text.labels_A.tolist())
        kept.append(None if keep is None else keep.tolist())
        return forward(family, model, tokens, text, keep)

    def run_each_step(
        name: str, trained: Any, schedule: Any, loss_at: Callable[[int], Any], *rest: Any, **_: Any
    ) -> None:
        for step in range(schedule.steps):
            loss_at(step)

    with monkeypatch.context() as patch:
        patch.setattr(joint, "pack_scenes", recording_pack)
        patch.setattr(joint, "compute_answer_logits", recording_forward)
        patch.setattr(joint, "run_steps", run_each_step)
        train_joint(context, ranks)
    assert len(scenes) == STEPS
    return list(zip(scenes, answers, kept, strict=True))


def test_a_continuation_draws_the_batches_after_the_trained_ones(
    tmp_path: Path, cache: SceneCache, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = build_context(tmp_path, cache, finished)

    def after(history: History, ranks: Ranks = SINGLE_RANK) -> Any:
        history.write(finished)
        try:
            return record_draws(context, ranks, monkeypatch)
        finally:
            BEFORE.write(finished)

    initial = History(language=1, vision=1, sharpen=1, joint=4)
    fourth_and_fifth = after(initial)
    fifth_and_sixth = after(initial.continued(1))
    assert fourth_and_fifth[1] == fifth_and_sixth[0]
    assert fourth_and_fifth[0] != fifth_and_sixth[0]
    assert after(BEFORE) == fifth_and_sixth

    assert any(kept is not None for _, _, kept in fifth_and_sixth)
    ranks = [after(BEFORE, Ranks(rank, 2, None)) for rank in range(2)]
    for step, (whole, _, kept) in enumerate(fifth_and_sixth):
        assert [scene for rank in ranks for scene in rank[step][0]] == whole
        for rank in ranks:
            keep = rank[step][2]
            assert (keep is None) == (kept is None)
            assert keep is None or len(keep[0]) == len(kept[0])
