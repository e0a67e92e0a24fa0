"""Benchmark files are read unchanged; the error for a wrong one names the file and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sppruner.errors import EvaluationError
from sppruner.evaluation.dataset import Dataset
from sppruner.evaluation.formats import FORMATS, SHORT_ANSWER, detect_format, read_dataset

TEN = ["red"] * 4 + ["dark red"] * 6

# format → (document, image names, annotations)
FILES: dict[str, tuple[Any, list[str], Any]] = {
    "vqav2": (
        {
            "data_subtype": "val2014",
            "questions": [{"image_id": 42, "question": "What colour?", "question_id": 420}],
        },
        ["COCO_val2014_000000000042.jpg"],
        {
            "annotations": [
                {
                    "question_id": 420,
                    "answer_type": "other",
                    "answers": [{"answer": answer} for answer in TEN],
                }
            ]
        },
    ),
    "gqa": (
        {
            "201": {
                "question": "Is it red?",
                "imageId": "n16",
                "answer": "yes",
                "types": {"structural": "verify"},
            }
        },
        ["n16.jpg"],
        None,
    ),
    "pope": (
        [{"question_id": 1, "image": "x.jpg", "text": "Is there a dog?", "label": "no"}],
        ["x.jpg"],
        None,
    ),
    "textvqa": (
        {
            "data": [
                {"question_id": 3, "image_id": "00f", "question": "What colour?", "answers": TEN}
            ]
        },
        ["00f.jpg"],
        None,
    ),
    "llava": (
        [
            {
                "id": "a1",
                "image": "sub/y.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": "A dog."},
                ],
            }
        ],
        ["sub/y.png"],
        None,
    ),
    "coco-captions": (
        {
            "images": [{"id": 7, "file_name": "c.jpg"}, {"id": 8, "file_name": "uncaptioned.jpg"}],
            "annotations": [
                {"image_id": 7, "caption": "a dog"},
                {"image_id": 7, "caption": "one dog"},
            ],
        },
        ["c.jpg"],
        None,
    ),
}


def decode(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def write(folder: Path, name: str) -> dict[str, Any]:
    """The files of a format, and the arguments that read them."""
    document, images, annotations = FILES[name]
    file = folder / f"{name}.json"
    file.write_text(json.dumps(document))
    for image in images:
        (folder / image).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(folder / image)
    arguments: dict[str, Any] = {"file": file, "images": folder, "decode": decode}
    if annotations is not None:
        arguments["annotations"] = folder / "annotations.json"
        arguments["annotations"].write_text(json.dumps(annotations))
    return arguments


def read(folder: Path, name: str, **more: Any) -> Dataset:
    return read_dataset(**{**write(folder, name), **more})


@pytest.mark.parametrize("name", [name for name in FILES if name != "coco-captions"])
def test_a_right_answer_scores_one_and_a_wrong_one_zero(name: str, tmp_path: Path) -> None:
    dataset = read(tmp_path, name)
    (item,) = dataset.items
    assert dataset.metric.score(item.answers[-1], item.answers) == 1.0
    assert dataset.metric.score("yes" if name == "pope" else "zebra", item.answers) == 0.0
    assert item.image().size == (4, 4)


def test_captions_are_scored_against_all_captions_of_the_image(tmp_path: Path) -> None:
    dataset = read(tmp_path, "coco-captions")
    (item,) = dataset.items
    assert item.answers == ("a dog", "one dog")
    assert dataset.max_new_tokens == 64
    assert dataset.metric.summary(["a dog"], [item.answers]).keys() == {"bleu4"}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_detected_by_its_keys(name: str) -> None:
    assert detect_format(FILES[name][0]) == name


def test_every_format_is_tested() -> None:
    assert set(FILES) == set(FORMATS)


def test_pope_is_read_from_lines(tmp_path: Path) -> None:
    arguments = write(tmp_path, "pope")
    lines = [json.dumps(FILES["pope"][0][0])] * 3
    arguments["file"].write_text("\n".join(lines) + "\n")
    dataset = read_dataset(**arguments)
    assert len(dataset.items) == 3
    assert dataset.metric.score("No, it is not.", dataset.items[0].answers) == 1.0


@pytest.mark.parametrize("name", ["pope", "llava"])
def test_a_file_of_one_line_is_read_as_lines(tmp_path: Path, name: str) -> None:
    arguments = write(tmp_path, name)
    arguments["file"].write_text(json.dumps(FILES[name][0][0]) + "\n")
    assert len(read_dataset(**arguments).items) == 1
    assert len(read_dataset(**arguments, format=name).items) == 1


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    """JSON's strings may hold other characters at which Python ends lines."""
    text = "Is there\u2028a\u2029dog\x85?"
    lines = [json.dumps({**FILES["pope"][0][0], "text": text}, ensure_ascii=False)] * 2
    arguments = write(tmp_path, "pope")
    arguments["file"].write_bytes("\r\n".join(lines).encode())
    prompts = [item.prompt for item in read_dataset(**arguments, instruction="").items]
    assert prompts == [text, text]


@pytest.mark.parametrize("lines", [False, True])
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, lines: bool) -> None:
    arguments = write(tmp_path, "pope")
    entry = json.dumps(FILES["pope"][0][0])
    content = f"{entry}\n{entry}" if lines else f"[{entry},{entry}]"
    arguments["file"].write_text(content, encoding="utf-8-sig")
    assert len(read_dataset(**arguments).items) == 2


def test_llava_entries_without_an_image_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = write(tmp_path, "llava")
    (entry,) = FILES["llava"][0]
    said = entry["conversations"]
    without = [
        {"id": "t1", "conversations": said},
        {"id": "t2", "conversations": [], "image": None},
        {"id": "t3", "conversations": said, "image": ""},
        {"id": "t4", "conversations": said, "image": []},
    ]
    one_of_a_list = {**entry, "id": "a2", "image": ["sub/y.png"]}
    arguments["file"].write_text(json.dumps([*without, entry, one_of_a_list]))
    items = read_dataset(**arguments, limit=2).items
    assert [(item.id, item.group) for item in items] == [("a1", "sub/y.png"), ("a2", "sub/y.png")]
    file = arguments["file"]
    assert caplog.messages == [f"{file}: 4 of 6 entries have no image and are left out"]
    arguments["file"].write_text(json.dumps(without))
    assert "llava.json: contains no question about an image" in refusal(**arguments)


def test_a_llava_entry_of_several_images_is_named_in_the_refusal(tmp_path: Path) -> None:
    arguments = write(tmp_path, "llava")
    (entry,) = FILES["llava"][0]
    arguments["file"].write_text(json.dumps([entry, {**entry, "id": 7, "image": ["y", "z"]}]))
    message = refusal(**arguments)
    assert "llava.json: entry 7 has 2 images, where one is asked about; leave it out" in message
    arguments["file"].write_text(json.dumps([entry, {**entry, "image": {"bytes": "…"}}]))
    assert "not llava, which is" in refusal(**arguments)


def test_prompts_end_with_the_instruction(tmp_path: Path) -> None:
    assert read(tmp_path, "gqa").items[0].prompt == f"Is it red?\n{SHORT_ANSWER}"
    assert read(tmp_path, "gqa", instruction="Be brief.").items[0].prompt.endswith("Be brief.")
    assert read(tmp_path, "gqa", instruction="").items[0].prompt == "Is it red?"
    assert read(tmp_path, "llava").items[0].prompt == "What is it?"


def test_questions_about_one_image_are_one_group(tmp_path: Path) -> None:
    arguments = write(tmp_path, "pope")
    question = FILES["pope"][0][0]
    arguments["file"].write_text(json.dumps([question, {**question, "question_id": 2}]))
    assert len({item.group for item in read_dataset(**arguments).items}) == 1
    assert len(read_dataset(**arguments, limit=1).items) == 1


def refusal(**arguments: Any) -> str:
    with pytest.raises(EvaluationError) as caught:
        read_dataset(**arguments)
    return str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "gone.json" in refusal(file=tmp_path / "gone.json", images=tmp_path, decode=decode)


def test_a_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text('{"a": 1\n "b"}')
    message = refusal(file=file, images=tmp_path, decode=decode)
    assert "broken.json" in message
    assert "line 2" in message


@pytest.mark.parametrize(("line", "fault"), [(1, "Expecting value"), (700, "Expecting ','")])
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: int, fault: str) -> None:
    file = tmp_path / "broken.jsonl"
    lines = [json.dumps(FILES["pope"][0][0])] * 900
    lines[line - 1] = "oops" if line == 1 else lines[0][:-1]
    file.write_text("\n".join(lines))
    message = refusal(file=file, images=tmp_path, decode=decode)
    assert f"broken.jsonl: neither JSON nor JSON lines (line {line}: {fault}" in message


def test_an_unknown_file_asks_for_its_format(tmp_path: Path) -> None:
    file = tmp_path / "odd.json"
    file.write_text('{"a": 1}')
    assert "give --format vqav2|gqa" in refusal(file=file, images=tmp_path, decode=decode)


def test_the_error_for_another_format_describes_the_expected_one(tmp_path: Path) -> None:
    arguments = write(tmp_path, "gqa")
    message = refusal(**arguments, format="textvqa")
    assert "gqa.json: not textvqa, which is an object with 'data'" in message


def test_a_missing_annotations_file_is_named(tmp_path: Path) -> None:
    arguments = write(tmp_path, "vqav2")
    del arguments["annotations"]
    assert "--annotations" in refusal(**arguments)


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    arguments = write(tmp_path, "gqa")
    (tmp_path / "n16.jpg").unlink()
    message = refusal(**arguments)
    assert "n16.jpg" in message
    assert "--images" in message
    assert "not a folder" in refusal(**{**arguments, "images": tmp_path / "nowhere"})
