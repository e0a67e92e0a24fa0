"""The model folder works like any LLaVA checkpoint: tokenizer, template, processor, loading."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from sppruner.tiny.model import VISUAL_TOKENS, build_model, build_processor, build_tokenizer, save
from sppruner.tiny.questions import CAPTION_PROMPT, caption, questions
from sppruner.tiny.scenes import render, sample_scene

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights."""
    path = tmp_path_factory.mktemp("random-model")
    processor = build_processor()
    save(build_model(processor.tokenizer), processor, path)
    return path


def test_questions_and_answers_tokenize_to_whole_words() -> None:
    texts = {CAPTION_PROMPT}
    for seed in range(800):
        scene = sample_scene(seed)
        texts.add(caption(scene))
        for question in questions(scene):
            texts |= {question.text, question.answer}
    for text in texts:
        pieces = TOKENIZER.tokenize(text)
        assert not [piece for piece in pieces if piece == "<unk>" or piece.startswith("##")], text
        assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


@given(
    st.text(alphabet=string.printable, max_size=300).filter(
        lambda text: str(TOKENIZER.unk_token) not in text  # the one word that is its own id
    )
)
def test_ascii_is_never_unknown(text: str) -> None:
    assert TOKENIZER.unk_token_id not in TOKENIZER(text)["input_ids"]


def test_one_image_becomes_exactly_its_visual_tokens() -> None:
    processor = build_processor()
    prompt = _prompt(processor, [{"type": "image"}, {"type": "text", "text": "is there a cross?"}])
    inputs = processor(images=[render(sample_scene(0))], text=[prompt], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    image = TOKENIZER.convert_tokens_to_ids("<image>")
    assert ids.count(image) == VISUAL_TOKENS == 144
    assert ids[:2] == TOKENIZER.convert_tokens_to_ids(["<s>", "<user>"])
    assert ids[2:146] == [image] * VISUAL_TOKENS
    assert ids[-1] == TOKENIZER.convert_tokens_to_ids("<assistant>")
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)


def _prompt(processor: LlavaProcessor, content: object) -> str:
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))


def test_template_puts_images_first_and_accepts_plain_strings() -> None:
    processor = build_processor()
    text = {"type": "text", "text": "hello"}
    image = {"type": "image"}
    assert _prompt(processor, [text, image]) == "<s><user><image>hello<assistant>"
    assert _prompt(processor, [image, text, image]) == "<s><user><image><image>hello<assistant>"
    assert _prompt(processor, "hello") == "<s><user>hello<assistant>"
    assert _prompt(processor, [text]) == "<s><user>hello<assistant>"


def test_template_accepts_a_system_message_and_earlier_turns() -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ]
    rendered = build_processor().apply_chat_template(turns, add_generation_prompt=True)
    assert rendered == "<s>be brief<user><image>a<assistant>b</s><user>c<assistant>"


def test_saved_folder_loads_and_generates(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    assert isinstance(processor, LlavaProcessor)
    assert model.dtype == torch.bfloat16
    assert processor.tokenizer.padding_side == "left"
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    assert (folder / "model.safetensors").stat().st_size < 15e6
    prompts = [
        _prompt(processor, [{"type": "image"}, {"type": "text", "text": text}])
        for text in ("how many circles are there?", "describe the image.")
    ]
    images = [render(sample_scene(seed)) for seed in range(2)]
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs.to(dtype=model.dtype), max_new_tokens=3, min_new_tokens=3)
    assert output.shape == (2, inputs["input_ids"].shape[1] + 3)


def test_saving_is_reproducible(folder: Path, tmp_path: Path) -> None:
    processor = build_processor()
    save(build_model(processor.tokenizer), processor, tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
