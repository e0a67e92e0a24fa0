"""Benchmark files on the user's disk as datasets: VQAv2, GQA, POPE, TextVQA, LLaVA and COCO.

A format says where its questions, answers and images stand; files are the benchmarks' own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from sppruner.errors import EvaluationError
from sppruner.evaluation.dataset import Dataset, Item
from sppruner.evaluation.metrics import Captioning, ExactMatch, Metric, SoftAccuracy, YesNo

SHORT_ANSWER = "Answer the question using a single word or phrase."
_CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."

Decode: TypeAlias = Callable[[Path], Image.Image]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One question of a file. image: its file's name within the folder of images."""

    id: str
    image: str
    question: str
    answers: tuple[str, ...]
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """read: entries of a parsed file, given the parsed annotations where `annotated`. marks: what
    to find in a file of this format. instruction: what follows each question."""

    marks: str
    read: Callable[[Any, Any], Iterator[Entry]]
    metric: Callable[[Sequence[Item]], Metric]
    instruction: str = ""
    max_new_tokens: int = 16
    annotated: bool = False


def _vqav2(document: Any, annotations: Any) -> Iterator[Entry]:
    given = {entry["question_id"]: entry for entry in annotations["annotations"]}
    subset = document["data_subtype"]
    for asked in document["questions"]:
        annotation = given[asked["question_id"]]
        yield Entry(
            id=str(asked["question_id"]),
            image=f"COCO_{subset}_{asked['image_id']:012d}.jpg",
            question=asked["question"],
            answers=tuple(answer["answer"] for answer in annotation["answers"]),
            kind=annotation["answer_type"],
        )


def _gqa(document: Any, annotations: Any) -> Iterator[Entry]:
    for name, asked in document.items():
        yield Entry(
            id=name,
            image=f"{asked['imageId']}.jpg",
            question=asked["question"],
            answers=(asked["answer"],),
            kind=asked.get("types", {}).get("structural", "question"),
        )


def _pope(document: Any, annotations: Any) -> Iterator[Entry]:
    for asked in document:
        yield Entry(
            id=str(asked["question_id"]),
            image=asked["image"],
            question=asked["text"],
            answers=(asked["label"].lower(),),
            kind=asked.get("category", "existence"),
        )


def _textvqa(document: Any, annotations: Any) -> Iterator[Entry]:
    for asked in document["data"]:
        yield Entry(
            id=str(asked["question_id"]),
            image=f"{asked['image_id']}.jpg",
            question=asked["question"],
            answers=tuple(asked["answers"]),
            kind="text",
        )


def _llava(document: Any, annotations: Any) -> Iterator[Entry]:
    for asked in document:
        human, reply = asked["conversations"][:2]
        yield Entry(
            id=str(asked["id"]),
            image=asked["image"],
            question=human["value"].replace("<image>", "").strip(),
            answers=(reply["value"],),
            kind="question",
        )


def _coco_captions(document: Any, annotations: Any) -> Iterator[Entry]:
    written: dict[Any, list[str]] = {}
    for entry in document["annotations"]:
        written.setdefault(entry["image_id"], []).append(entry["caption"])
    for image in document["images"]:
        if image["id"] in written:
            yield Entry(
                id=str(image["id"]),
                image=image["file_name"],
                question=_CAPTION_PROMPT,
                answers=tuple(written[image["id"]]),
                kind="caption",
            )


FORMATS: Mapping[str, Format] = {
    "vqav2": Format(
        marks="an object with 'questions' and 'data_subtype'",
        read=_vqav2,
        metric=lambda items: SoftAccuracy(),
        instruction=SHORT_ANSWER,
        annotated=True,
    ),
    "gqa": Format(
        marks="an object of questions by id, each with 'imageId'",
        read=_gqa,
        metric=lambda items: ExactMatch(),
        instruction=SHORT_ANSWER,
    ),
    "pope": Format(
        marks="lines of objects with 'text' and 'label'",
        read=_pope,
        metric=lambda items: YesNo(),
        instruction=SHORT_ANSWER,
    ),
    "textvqa": Format(
        marks="an object with 'data', each entry with 'image_id' and 'answers'",
        read=_textvqa,
        metric=lambda items: SoftAccuracy(),
        instruction=SHORT_ANSWER,
    ),
    "llava": Format(
        marks="a list of objects with 'conversations'",
        read=_llava,
        metric=lambda items: ExactMatch(),
    ),
    "coco-captions": Format(
        marks="an object with 'images' and 'annotations', each with a 'caption'",
        read=_coco_captions,
        metric=lambda items: Captioning({item.id: item.answers for item in items}),
        max_new_tokens=64,
    ),
}


def detect(document: Any) -> str | None:
    """The format of a parsed file, or None where its keys do not tell."""
    if isinstance(document, list) and document and isinstance(document[0], dict):
        if "conversations" in document[0]:
            return "llava"
        return "pope" if {"text", "label", "image"} <= set(document[0]) else None
    if not isinstance(document, dict) or not document:
        return None
    if {"questions", "data_subtype"} <= set(document):
        return "vqav2"
    if {"images", "annotations"} <= set(document):
        return "coco-captions"
    if isinstance(document.get("data"), list):
        return "textvqa"
    first = next(iter(document.values()))
    return "gqa" if isinstance(first, dict) and "imageId" in first else None


def read_dataset(
    file: Path,
    *,
    images: Path,
    decode: Decode,
    format: str | None = None,
    annotations: Path | None = None,
    instruction: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """The first `limit` questions of a benchmark's file, in its order.

    decode: from a file to an image. instruction: what follows each question; None is the format's
    own. Raises EvaluationError, which names the file and the next step, for a file that is missing
    or not of its format, and for missing images.
    """
    document = _parsed(file)
    name = format or detect(document)
    if name is None:
        raise EvaluationError(f"{file}: cannot tell its format; give --format {'|'.join(FORMATS)}")
    if name not in FORMATS:
        raise EvaluationError(f"no format {name!r}; there are {', '.join(FORMATS)}")
    of = FORMATS[name]
    if of.annotated and annotations is None:
        raise EvaluationError(f"{file}: the answers of {name} are a file apart; give --annotations")
    answers = None if annotations is None else _parsed(annotations)
    try:
        entries = list(of.read(document, answers))[:limit]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise EvaluationError(
            f"{file}: not {name}, which is {of.marks} ({type(error).__name__}: {error}); "
            "give the right --format"
        ) from error
    if not entries:
        raise EvaluationError(f"{file}: holds no question")
    _check_images(entries, images)
    after = of.instruction if instruction is None else instruction
    items = [_item(entry, images, decode, after) for entry in entries]
    return Dataset(
        name=f"{name} ({file.name})",
        items=items,
        metric=of.metric(items),
        max_new_tokens=of.max_new_tokens,
    )


def _item(entry: Entry, images: Path, decode: Decode, instruction: str) -> Item:
    return Item(
        id=entry.id,
        group=entry.image,
        kind=entry.kind,
        prompt=f"{entry.question}\n{instruction}" if instruction else entry.question,
        answers=entry.answers,
        image=functools.partial(decode, images / entry.image),
    )


def _parsed(file: Path) -> Any:
    """A JSON document, or a list of the lines of a JSONL one."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"{file}: cannot be read ({error}); give the path of a JSON"
        ) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as whole:
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise EvaluationError(
                f"{file}: neither JSON nor JSON lines (line {whole.lineno}: {whole.msg})"
            ) from whole


def _check_images(entries: Sequence[Entry], images: Path) -> None:
    if not images.is_dir():
        raise EvaluationError(f"{images}: not a folder; give the folder of images with --images")
    named = dict.fromkeys(entry.image for entry in entries)
    missing = [name for name in named if not (images / name).is_file()]
    if missing:
        raise EvaluationError(
            f"{images / missing[0]}: no such image, nor {len(missing) - 1} others of {len(named)}; "
            "give the folder that holds them with --images"
        )
