"""Packing, features and labels equal their straightforward versions, and resume is exact."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from jobs.training.contrast import CaptionContrast
from jobs.training.families import LLAVA
from jobs.training.language import sample_keep
from jobs.training.loop import Draws, LearningRateSchedule, load_checkpoint, run_steps
from jobs.training.packing import compute_answer_logits, pack_scenes, sample_random_keep
from jobs.training.scene_cache import (
    BARE,
    GROUNDS,
    SIGNS,
    SceneCache,
    build_cache,
    build_scene_table,
)
from jobs.training.space import ANCHOR, CHANNELS, THING, PatchTruth, TokenSpace
from jobs.training.stages import TrainingContext
from jobs.training.vision import DenseLoss, VisionEncoder, normalise_images
from sppruner.tiny.layout import COLORS, SHAPES, SIZES
from sppruner.tiny.model import DIGITS, SPECIAL_TOKENS, WORDS, build_processor
from sppruner.tiny.scenes import encode_scene, sample_scene

CPU = torch.device("cpu")
SCENES = np.arange(3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SceneCache:
    return build_cache(tmp_path_factory.mktemp("scenes"), 12)


@pytest.fixture(scope="module")
def context(cache: SceneCache, tmp_path_factory: pytest.TempPathFactory) -> TrainingContext:
    return TrainingContext(folder=tmp_path_factory.mktemp("work"), cache=cache, device=CPU)


def test_cached_images_equal_the_output_of_the_processor(cache: SceneCache) -> None:
    quality = random.Random("jpeg:5").randint(85, 97)
    image = Image.open(io.BytesIO(encode_scene(sample_scene(5), quality=quality)))
    inputs = build_processor()(images=[image], text=["<image>"], return_tensors="pt")
    torch.testing.assert_close(normalise_images(cache, np.array([5]), CPU), inputs["pixel_values"])


def test_a_finished_cache_is_reused(tmp_path: Path) -> None:
    build_cache(tmp_path, 3)
    stamp = (tmp_path / "images.npy").stat().st_mtime_ns
    assert len(build_cache(tmp_path, 3)) == 3
    assert (tmp_path / "images.npy").stat().st_mtime_ns == stamp
    assert len(build_cache(tmp_path, 4)) == 4


def test_labels_agree_with_the_scene(cache: SceneCache) -> None:
    for seed in range(len(cache)):
        scene = sample_scene(seed)
        assert cache.anchors[seed].sum() == len(scene.objects)
        for index, item in enumerate(scene.objects):
            true = {word for word, on in zip(WORDS, cache.words[seed, index], strict=True) if on}
            assert {item.color, item.shape, item.size} < true
            center = int(item.y * 12) * 12 + int(item.x * 12)
            assert cache.owners[seed, center] == index
            assert cache.cores[seed, center]
        for index, sign in enumerate(scene.signs, start=SIGNS):
            true = {word for word, on in zip(WORDS, cache.words[seed, index], strict=True) if on}
            assert {sign.color, sign.digit, "sign"} < true
        grounds = set(cache.owners[seed][cache.owners[seed] >= GROUNDS].tolist())
        assert grounds <= {GROUNDS + i for i in range(len(scene.grounds))}


def test_only_the_core_of_an_entity_shows_its_kind(cache: SceneCache) -> None:
    truth = PatchTruth(cache, SCENES, CPU)
    marks, cores = truth.marks_BNC.bool(), truth.cores_BN
    kinds = [WORDS.index(word) for word in (*SHAPES, *SIZES, *DIGITS)]
    assert not marks[~cores][:, kinds].any()
    assert marks[cores][:, kinds].any(1).all()
    assert not marks[~cores][:, ANCHOR].any()
    assert (marks[..., THING] == truth.things_BN).all()
    # A patch of an object outside its core shows the object's colour only.
    rim = truth.things_BN & ~cores & ~truth.signs_BN
    colors = [WORDS.index(word) for word in COLORS]
    assert (marks[rim][:, colors].sum(1) == 1).all()


def test_distractors_show_their_colour_and_nothing_else(cache: SceneCache) -> None:
    truth = PatchTruth(cache, SCENES, CPU)
    stained = torch.from_numpy(cache.stains[SCENES] != BARE) & ~truth.things_BN
    assert stained.any()
    colors = [WORDS.index(word) for word in COLORS]
    marks = truth.marks_BNC.bool()
    assert marks[stained][:, colors].any(1).all()
    assert not marks[~truth.things_BN & ~stained][:, colors].any()
    assert not marks[stained][:, THING].any()


def test_oracle_tokens_can_be_read_back(context: TrainingContext) -> None:
    _, space = context.build()
    truth = PatchTruth(context.cache, SCENES, CPU)
    marks, places = space.read(space.oracle(truth))
    torch.testing.assert_close(marks, truth.marks_BNC, atol=1e-5, rtol=0)
    torch.testing.assert_close(places, truth.places_BNP, atol=1e-5, rtol=0)
    loss, numbers = DenseLoss(space)(space.oracle(truth), truth, 5.0)
    assert numbers["mse"] < 1e-10
    assert loss < 0.3


def test_word_directions_are_orthonormal(context: TrainingContext) -> None:
    model, space = context.build()
    gram = space.marks_CD @ space.marks_CD.T
    torch.testing.assert_close(gram, torch.eye(CHANNELS), atol=1e-5, rtol=0)
    embedding = model.get_input_embeddings().weight
    torch.testing.assert_close(embedding, space.embedding_VD)
    assert not embedding.requires_grad
    assert embedding is model.lm_head.weight
    assert isinstance(space, TokenSpace)


@torch.no_grad()
def test_training_forward_equals_the_models_own_features(context: TrainingContext) -> None:
    model, _ = context.build()
    images = normalise_images(context.cache, SCENES, CPU)
    own = model.get_image_features(pixel_values=images, return_dict=True).pooler_output
    torch.testing.assert_close(VisionEncoder(model)(images)[0], torch.stack(list(own)))


@torch.no_grad()
def test_a_packed_question_has_the_logits_of_a_single_question(context: TrainingContext) -> None:
    model, _ = context.build()
    images = normalise_images(context.cache, SCENES, CPU)
    text = pack_scenes(context.cache, SCENES, np.random.default_rng(0), 1.0, CPU)
    packed = compute_answer_logits(LLAVA, model, VisionEncoder(model)(images)[0], text)
    prefix = [SPECIAL_TOKENS.index("<s>"), SPECIAL_TOKENS.index("<user>")]
    prefix += [SPECIAL_TOKENS.index("<image>")] * 144
    question = 0
    for scene in SCENES:
        for first, length, answer, _ in context.cache.spans[
            context.cache.starts[scene] : context.cache.starts[scene + 1]
        ]:
            tokens = context.cache.tokens[first : first + length].tolist()
            ids = torch.tensor([prefix + tokens])
            single = model(input_ids=ids, pixel_values=images[scene : scene + 1]).logits
            torch.testing.assert_close(
                packed[text.questions_A == question],
                single[0, -1 - answer : -1],
                atol=2e-4,
                rtol=1e-4,
            )
            question += 1


@torch.no_grad()
def test_keeping_all_tokens_changes_nothing_and_positions_stay(context: TrainingContext) -> None:
    model, space = context.build()
    text = pack_scenes(context.cache, SCENES, np.random.default_rng(0), 0.0, CPU)
    tokens = space.oracle(PatchTruth(context.cache, SCENES, CPU))
    everything = sample_random_keep(len(SCENES), 144, torch.Generator())
    torch.testing.assert_close(
        compute_answer_logits(LLAVA, model, tokens, text, everything),
        compute_answer_logits(LLAVA, model, tokens, text),
    )


def test_dropout_is_uniform_and_sorted() -> None:
    generator = torch.Generator().manual_seed(0)
    keeps = [sample_keep(4, generator) for _ in range(400)]
    dropped = [keep for keep in keeps if keep is not None]
    assert 150 < len(dropped) < 250
    sizes = [keep.shape[1] for keep in dropped]
    assert min(sizes) >= 8
    assert max(sizes) <= 143
    assert all(bool((keep.diff(dim=1) > 0).all()) for keep in dropped)


def test_changed_captions_are_other_scenes(cache: SceneCache) -> None:
    torch.manual_seed(0)
    contrast = CaptionContrast()
    loss = contrast(torch.randn(3, 128), cache, SCENES, np.random.default_rng(0))
    assert 0 < loss.item() < 50


def test_held_out_table_matches_the_cache_layout() -> None:
    table = build_scene_table(7, 2, 92)
    assert len(table) == 2
    assert table.starts[-1] == len(table.spans)


def test_schedule_warms_up_holds_and_decays() -> None:
    schedule = LearningRateSchedule(steps=100, peak=1.0, warmup=10, hold=0.5, floor=0.05)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(30) == schedule.rate(49) == 1.0
    assert schedule.rate(99) < 0.06


def test_ranks_share_an_epoch_without_overlap() -> None:
    seen = [
        scene
        for step in range(5)
        for rank in range(2)
        for scene in Draws(stage=1, step=step, rank=rank).scenes(40, 4, 2)
    ]
    assert sorted(seen) == list(range(40))


def _run(steps: int, checkpoint: Path) -> nn.Module:
    """A toy stage with data drawn per step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = torch.randn(8, 4, generator=Draws(stage=9, step=step).torch())
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean(), {}

    def stop(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        if step == steps:
            raise KeyboardInterrupt
        return loss_at(step)

    schedule = LearningRateSchedule(steps=30, peak=0.05, warmup=3)
    run_steps("toy", model, schedule, stop, checkpoint, save_seconds=-1.0)
    return model


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = _run(31, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        _run(17, tmp_path / "cut.pt")
    assert load_checkpoint(tmp_path / "cut.pt", CPU)["step"] == 17
    resumed = _run(31, tmp_path / "cut.pt")
    torch.testing.assert_close(resumed.weight, whole.weight, rtol=0, atol=0)
    again = _run(31, tmp_path / "cut.pt")
    torch.testing.assert_close(again.weight, whole.weight, rtol=0, atol=0)
