"""Benchmark files on disk as datasets: VQAv2, GQA, POPE, TextVQA, LLaVA and COCO captions.

Each format defines where its questions, answers and image names are. The files are the benchmarks'
own, unchanged.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from sppruner.errors import EvaluationError
from sppruner.evaluation.dataset import Dataset, Item
from sppruner.evaluation.metrics import Captioning, ExactMatch, Metric, SoftAccuracy, YesNo

logger = logging.getLogger(__name__)

SHORT_ANSWER = "Answer the question using a single word or phrase."
_CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."

Decode: TypeAlias = Callable[[Path], Image.Image]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkEntry:
    """One question of a benchmark file."""

    id: str
    """The benchmark's own question id."""
    image: str
    """The image's file name within the folder of images."""
    question: str
    """The question, without an instruction."""
    answers: tuple[str, ...]
    """The right answer, or the answer of each annotator."""
    kind: str
    """The benchmark's question type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkFormat:
    """How one benchmark's file is read and scored."""

    description: str
    """What a file of this format contains; part of the error message for any other file."""
    read: Callable[[Any, Any], Iterator[BenchmarkEntry | None]]
    """Yields the entries of a parsed file, given the parsed annotations (None without a file); None
    for an entry without an image, which is left out. Raises EvaluationError for an entry that
    cannot be asked."""
    metric: Callable[[Sequence[Item]], Metric]
    """Builds the metric for the items."""
    instruction: str = ""
    """Appended to each question on a line of its own; empty for none."""
    max_new_tokens: int = 16
    """The longest answer that is generated, in tokens."""
    needs_annotations: bool = False
    """Whether the answers are in a separate file."""


def _vqav2(document: Any, annotations: Any) -> Iterator[BenchmarkEntry]:
    by_id = {entry["question_id"]: entry for entry in annotations["annotations"]}
    subset = document["data_subtype"]
    for question in document["questions"]:
        annotation = by_id[question["question_id"]]
        yield BenchmarkEntry(
            id=str(question["question_id"]),
            image=f"COCO_{subset}_{question['image_id']:012d}.jpg",
            question=question["question"],
            answers=tuple(answer["answer"] for answer in annotation["answers"]),
            kind=annotation["answer_type"],
        )


def _gqa(document: Any, annotations: Any) -> Iterator[BenchmarkEntry]:
    for name, question in document.items():
        yield BenchmarkEntry(
            id=name,
            image=f"{question['imageId']}.jpg",
            question=question["question"],
            answers=(question["answer"],),
            kind=question.get("types", {}).get("structural", "question"),
        )


def _pope(document: Any, annotations: Any) -> Iterator[BenchmarkEntry]:
    for question in document:
        yield BenchmarkEntry(
            id=str(question["question_id"]),
            image=question["image"],
            question=question["text"],
            answers=(question["label"].lower(),),
            kind=question.get("category", "existence"),
        )


def _textvqa(document: Any, annotations: Any) -> Iterator[BenchmarkEntry]:
    for question in document["data"]:
        yield BenchmarkEntry(
            id=str(question["question_id"]),
            image=f"{question['image_id']}.jpg",
            question=question["question"],
            answers=tuple(question["answers"]),
            kind="text",
        )


def _llava(document: Any, annotations: Any) -> Iterator[BenchmarkEntry | None]:
    for question in document:
        image = _only_image(question)
        if image is None:
            yield None
            continue
        human, reply = question["conversations"][:2]
        yield BenchmarkEntry(
            id=str(question["id"]),
            image=image,
            question=human["value"].replace("<image>", "").strip(),
            answers=(reply["value"],),
            kind="question",
        )


def _only_image(question: Any) -> str | None:
    """The image that an entry names, alone or in a list; None where it names none."""
    named = question.get("image")
    images = [image for image in (named if isinstance(named, list) else [named]) if image]
    if len(images) > 1:
        raise EvaluationError(
            f"entry {question['id']!r} has {len(images)} images, where one is asked about; "
            "leave it out"
        )
    if images and not isinstance(images[0], str):
        raise TypeError(f"the image of entry {question['id']!r} is no file name")
    return images[0] if images else None


def _coco_captions(document: Any, annotations: Any) -> Iterator[BenchmarkEntry]:
    captions: dict[Any, list[str]] = {}
    for entry in document["annotations"]:
        captions.setdefault(entry["image_id"], []).append(entry["caption"])
    for image in document["images"]:
        if image["id"] in captions:
            yield BenchmarkEntry(
                id=str(image["id"]),
                image=image["file_name"],
                question=_CAPTION_PROMPT,
                answers=tuple(captions[image["id"]]),
                kind="caption",
            )


FORMATS: Mapping[str, BenchmarkFormat] = {
    "vqav2": BenchmarkFormat(
        description="an object with 'questions' and 'data_subtype'",
        read=_vqav2,
        metric=lambda items: SoftAccuracy(),
        instruction=SHORT_ANSWER,
        needs_annotations=True,
    ),
    "gqa": BenchmarkFormat(
        description="an object of questions by id, each with 'imageId'",
        read=_gqa,
        metric=lambda items: ExactMatch(),
        instruction=SHORT_ANSWER,
    ),
    "pope": BenchmarkFormat(
        description="lines of objects with 'text' and 'label'",
        read=_pope,
        metric=lambda items: YesNo(),
        instruction=SHORT_ANSWER,
    ),
    "textvqa": BenchmarkFormat(
        description="an object with 'data', each entry with 'image_id' and 'answers'",
        read=_textvqa,
        metric=lambda items: SoftAccuracy(),
        instruction=SHORT_ANSWER,
    ),
    "llava": BenchmarkFormat(
        description="a list of objects with 'conversations'",
        read=_llava,
        metric=lambda items: ExactMatch(),
    ),
    "coco-captions": BenchmarkFormat(
        description="an object with 'images' and 'annotations', each with a 'caption'",
        read=_coco_captions,
        metric=lambda items: Captioning({item.id: item.answers for item in items}),
        max_new_tokens=64,
    ),
}


def detect_format(document: Any) -> str | None:
    """The format of a parsed file, or None if its keys fit none."""
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

    decode: reads an image file. instruction: appended to each question; None for the format's own.
    Raises EvaluationError, which names the file and the next step, for a file that is missing or
    not of its format, and for missing images. Entries without an image are left out, with a
    warning that counts them.
    """
    document = _as_entries(_parsed(file))
    name = format or detect_format(document)
    if name is None:
        raise EvaluationError(f"{file}: unknown format; give --format {'|'.join(FORMATS)}")
    if name not in FORMATS:
        raise EvaluationError(f"no format {name!r}; known: {', '.join(FORMATS)}")
    chosen = FORMATS[name]
    if chosen.needs_annotations and annotations is None:
        raise EvaluationError(
            f"{file}: {name} keeps its answers in a second file; give --annotations"
        )
    answers = None if annotations is None else _parsed(annotations)
    try:
        found = list(chosen.read(document, answers))
    except EvaluationError as error:
        raise EvaluationError(f"{file}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise EvaluationError(
            f"{file}: not {name}, which is {chosen.description} ({type(error).__name__}: {error}); "
            "give the right --format"
        ) from error
    entries = [entry for entry in found if entry is not None]
    if len(entries) < len(found):
        logger.warning(
            "%s: %d of %d entries have no image and are left out",
            file,
            len(found) - len(entries),
            len(found),
        )
    entries = entries[:limit]
    if not entries:
        raise EvaluationError(f"{file}: contains no question about an image")
    _check_images(entries, images)
    suffix = chosen.instruction if instruction is None else instruction
    items = [_item(entry, images, decode, suffix) for entry in entries]
    return Dataset(
        name=f"{name} ({file.name})",
        items=items,
        metric=chosen.metric(items),
        max_new_tokens=chosen.max_new_tokens,
    )


def _item(entry: BenchmarkEntry, images: Path, decode: Decode, instruction: str) -> Item:
    return Item(
        id=entry.id,
        group=entry.image,
        kind=entry.kind,
        prompt=f"{entry.question}\n{instruction}" if instruction else entry.question,
        answers=entry.answers,
        image=functools.partial(decode, images / entry.image),
    )


def _as_entries(document: Any) -> Any:
    """A parsed file; a single entry, which is what a JSONL file of one line parses as, in a
    list."""
    is_entry = isinstance(document, dict) and detect_format([document]) is not None
    return [document] if is_entry else document


def _parsed(file: Path) -> Any:
    """A JSON document, or the list of a JSONL file's lines."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"{file}: cannot be read ({error}); give the path of a JSON file"
        ) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as whole:
        return _parsed_lines(file, text, whole)


def _parsed_lines(file: Path, text: str, whole: json.JSONDecodeError) -> list[Any]:
    """The lines of a JSONL file. whole: what is wrong with the text as one document."""
    parsed: list[Any] = []
    # Not splitlines, which also ends lines at characters that JSON's strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            # A file whose first line is none of JSONL is one document, with the fault that has.
            at, fault = (number, error) if parsed else (whole.lineno, whole)
            raise EvaluationError(
                f"{file}: neither JSON nor JSON lines (line {at}: {fault.msg})"
            ) from error
    return parsed


def _check_images(entries: Sequence[BenchmarkEntry], images: Path) -> None:
    if not images.is_dir():
        raise EvaluationError(f"{images}: not a folder; give the folder of images with --images")
    names = dict.fromkeys(entry.image for entry in entries)
    missing = [name for name in names if not (images / name).is_file()]
    if missing:
        raise EvaluationError(
            f"{images / missing[0]}: the first missing image of {len(missing)} among "
            f"{len(names)}; give the folder that contains them with --images"
        )
