"""The settings of one run: validated once, then frozen. Some of them are the run's identity."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, TypeAlias, get_args

from cluster.encoding import is_utf8, shown
from cluster.errors import UsageError
from sppruner.engine import SamplingParams
from sppruner.engine.answer_format import AnswerFormat
from sppruner.engine.interface import DTYPES
from sppruner.errors import SpecError
from sppruner.spec import OptionValue, PruneSpec

Kind: TypeAlias = Literal["caption", "vqa"]
ImageFormat: TypeAlias = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "heic"]
IMAGE_FORMATS: Final[tuple[ImageFormat, ...]] = get_args(ImageFormat)
"""Every image format that can be read; HEIC needs the extra `heic`."""
CorpusFormat: TypeAlias = Literal["parquet", "webdataset"]

SCHEMA_VERSION = 5
"""Raised when committed rows change shape or meaning: an older output is then another run's."""

MAX_ERROR_SHARE = 0.2
"""Share of failed rows that stops an attempt unless a run says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """Bounds of one image, batch and online alike."""

    max_bytes: int = 32 * 2**20
    """Compressed bytes."""
    max_pixels: int = 64_000_000
    """Width times height."""
    formats: tuple[ImageFormat, ...] = IMAGE_FORMATS
    """What is read; an image of another format is undecodable."""
    max_decode_seconds: float = 10.0
    """CPU seconds that decoding may take; a photograph of 12 megapixels takes about 0.1."""

    @property
    def decode_memory(self) -> int:
        """Bytes of memory for the process that decodes: its own, the compressed image in a few
        copies, and pixels as the decoder, the conversion to RGB and the answer hold them."""
        return 512 * 2**20 + 4 * self.max_bytes + 32 * self.max_pixels

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", tuple(self.formats))
        if self.max_bytes < 1 or self.max_pixels < 1 or not self.max_decode_seconds > 0:
            raise UsageError("media limits must be positive")
        unknown = [name for name in self.formats if name not in IMAGE_FORMATS]
        if unknown or not self.formats:
            raise UsageError(
                f"image formats {self.formats!r}: use some of {', '.join(IMAGE_FORMATS)}"
            )

    def identity(self) -> dict[str, Any]:
        """The limits as part of a run's identity, and as arguments of this class. Those that were
        added later are included only when set, so that older runs keep their id."""
        settings: dict[str, Any] = {"max_bytes": self.max_bytes, "max_pixels": self.max_pixels}
        if set(self.formats) != set(IMAGE_FORMATS):
            settings["formats"] = sorted(self.formats)
        if self.max_decode_seconds != 10.0:
            settings["max_decode_seconds"] = self.max_decode_seconds
        return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that describes a run. `identity` is what may not change between resumes."""

    kind: Kind
    """caption, or vqa: rows ask their own question and are scored against references."""
    input: str
    """URI of the corpus: Parquet files or WebDataset tars under it, or one of them."""
    output: str
    """URI of the output prefix: empty, or of the run to resume."""
    model: str
    """Folder or Hub name."""
    prompt: str
    """What every caption row is asked; for VQA rows, the template around {question}."""
    spec: PruneSpec
    """Method and budget of pruning."""
    engine: str | None = None
    """Factory of another engine, "module:callable"; see `EngineSettings.engine`."""
    engine_options: Mapping[str, OptionValue] = field(default_factory=dict)
    """More arguments of the engine's factory, such as vLLM's tensor_parallel_size."""
    dtype: str = "auto"
    """Of the model's weights; auto is bfloat16 on a GPU and float32 on a CPU."""
    generation: SamplingParams = field(default_factory=SamplingParams)
    """How tokens are sampled, and how many at most."""
    limit: int | None = None
    """Rows to label, from the first; None for all."""
    unit_rows: int = 256
    """Longest unit, which is one commit, in rows: 1 to 512."""
    unit_bytes: int = 64 * 2**20
    """Largest unit in bytes as read; a single row may exceed it."""
    auto: bool = False
    """Measure first whether pruning pays, and label densely where it does not."""
    media: MediaLimits = field(default_factory=MediaLimits)
    """Bounds of one image."""
    image_column: str | None = None
    """Column that holds the images; None: found by name and content."""
    key_column: str | None = None
    """Column that holds the rows' keys; None: found by name."""
    question_column: str | None = None
    """Column that holds the questions of a VQA corpus; None: found by name."""
    format: CorpusFormat | None = None
    """Which files of the input are the corpus; None: the only kind there is, or the tars of a
    folder that img2dataset wrote."""
    dotted_keys: bool = False
    """WebDataset: a sample's key ends at the last dot of the file name, not at the first."""
    # Below: how the run is carried out. These may change between resumes.
    replicas: int = 1
    """Model replicas to start, where none serve this model."""
    slots: int | None = None
    """Rows that a replica answers at once; None: as many as suit its device."""
    max_error_share: float = MAX_ERROR_SHARE
    """An attempt stops once a larger share of its rows, or of its latest rows, failed; in [0, 1].
    1 never stops it."""
    error_share_after: int = 500
    """Rows after which `max_error_share` counts."""
    control_blocks: int | None = None
    """Control blocks to measure, which are answered densely too: the base of every measured saving.
    None: as many as the precision of `ControlPlan` takes, within its cost."""
    max_attempts: int = 3
    """Replica deaths before a call is quarantined."""

    def __post_init__(self) -> None:
        for name in ("input", "output", "model"):
            object.__setattr__(self, name, os.fspath(getattr(self, name)))
        checks: list[tuple[bool, str]] = [
            (self.kind in ("caption", "vqa"), f"kind {self.kind!r}: use caption or vqa"),
            (bool(self.input.strip()), "--input is empty: give s3://bucket/prefix or a path"),
            (bool(self.output.strip()), "--output is empty: give s3://bucket/prefix or a path"),
            (bool(self.model.strip()), "--model is empty: give a folder or Hub name"),
            (bool(self.prompt.strip()), "--prompt is empty: give what every row is asked"),
            (self.dtype in DTYPES, f"--dtype {self.dtype!r}: use one of {', '.join(DTYPES)}"),
            (
                self.format in (None, *get_args(CorpusFormat)),
                f"--format {self.format!r}: use {' or '.join(get_args(CorpusFormat))}",
            ),
            (self.limit is None or self.limit > 0, f"--limit {self.limit}: give at least 1"),
            (self.replicas >= 1, f"--replicas {self.replicas}: give at least 1"),
            (self.slots is None or self.slots >= 1, f"slots {self.slots}: give at least 1"),
            (
                self.control_blocks is None or self.control_blocks >= 0,
                f"--control-blocks {self.control_blocks}: give 0 for none, or more",
            ),
            (
                0 <= self.max_error_share <= 1,
                f"--max-error-share {self.max_error_share}: give a share from 0 to 1",
            ),
            (1 <= self.unit_rows <= 512, f"unit_rows {self.unit_rows} outside 1..512"),
            (
                not (self.auto and self.spec.method == "none"),
                "--auto chooses between a method and none: name a --method",
            ),
            (self.max_attempts >= 1, f"max_attempts {self.max_attempts}: give at least 1"),
        ]
        for part in fields(self):
            text = getattr(self, part.name)
            valid = not isinstance(text, str) or is_utf8(text)
            checks.append((valid, f"{part.name} {shown(str(text))}: it is not UTF-8"))
        for ok, message in checks:
            if not ok:
                raise UsageError(message)
        if self.input.rstrip("/") == self.output.rstrip("/"):
            raise UsageError(
                f"input and output are both {self.input}: give the output its own prefix"
            )

    @property
    def is_guarded(self) -> bool:
        """Whether failed rows can stop an attempt."""
        return self.max_error_share < 1

    @classmethod
    def of_identity(
        cls, settings: Mapping[str, Any], *, output: str, **execution: Any
    ) -> RunConfig:
        """The inverse of `identity`, for the run in an output; planning finds out whether the
        identity is the same. execution: settings that may change between resumes. Raises UsageError
        for settings that no run of this version can have."""
        names = {part.name for part in fields(cls)}
        values = {name: value for name, value in settings.items() if name in names}
        try:
            generation = dict(settings["generation"])
            generation["stop"] = tuple(generation.get("stop", ()))
            if "format" in generation:
                generation["format"] = AnswerFormat(**generation["format"])
            values |= {
                "spec": PruneSpec.from_dict(settings["spec"]),
                "generation": SamplingParams(**generation),
                "media": MediaLimits(**settings["media"]),
            }
            return cls(**values, output=output, **execution)
        except (KeyError, TypeError, ValueError, SpecError) as error:
            raise UsageError(
                f"{output}: its settings are of another version of this command ({error!r})"
            ) from error

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is written. Planning adds model revision, image backend
        and corpus listing, which it looks up."""
        settings: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "input": self.input,
            "limit": self.limit,
            "model": self.model,
            "prompt": self.prompt,
            "spec": self.spec.to_dict(),
            "generation": {
                "max_new_tokens": self.generation.max_new_tokens,
                "temperature": self.generation.temperature,
                "top_p": self.generation.top_p,
                "seed": self.generation.seed,
            },
            "unit_rows": self.unit_rows,
            "unit_bytes": self.unit_bytes,
            "media": self.media.identity(),
            # JPEGs decoded at reduced scale (`sppruner.models.jpeg_scaling`) have other pixels than
            # in full: a run from before that existed cannot be resumed.
            "reduced_jpegs": True,
        }
        # Included only when set, so that older runs keep their id.
        if self.generation.stop:
            settings["generation"]["stop"] = list(self.generation.stop)
        if self.generation.format is not None:
            settings["generation"]["format"] = self.generation.format.to_dict()
        if self.auto:
            settings["auto"] = True
        if self.engine is not None:
            settings["engine"] = self.engine
        if self.engine_options:
            settings["engine_options"] = dict(sorted(self.engine_options.items()))
        if self.dtype != "auto":
            settings["dtype"] = self.dtype
        for name in ("image_column", "key_column", "question_column"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        if self.format is not None:
            settings["format"] = self.format
        if self.dotted_keys:
            settings["dotted_keys"] = True
        return settings
