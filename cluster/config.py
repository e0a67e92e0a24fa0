"""The settings of one run: validated once, then frozen. Part of them is the run's identity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from cluster.errors import UsageError
from sppruner.engine import SamplingParams
from sppruner.engine.interface import DTYPES
from sppruner.spec import PruneSpec

Kind: TypeAlias = Literal["caption", "vqa"]

# Bumped when committed rows change shape or meaning: an old output is then another run's.
SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """What one image may cost before it is refused, batch and online alike."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_pixels < 1:
            raise UsageError("media limits must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything a run is told. `identity` is what may not change between resumes.

    control_share: share of rows that also run dense, the base of every measured saving; they run
    in whole batches, and the run's first unit always has one.
    auto: the run measures first whether pruning pays, and labels densely where it does not.
    dtype: the model's, or auto: bfloat16 on a GPU, float32 on a CPU.
    slots: rows a replica answers side by side at most; None for what its device suits.
    max_error_share: the run stops once more than this share of at least `error_share_after`
    rows failed. unit_rows / unit_bytes bound the unit of work: one commit.
    """

    kind: Kind
    input: str
    output: str
    model: str
    prompt: str
    spec: PruneSpec
    dtype: str = "auto"
    generation: SamplingParams = field(default_factory=SamplingParams)
    limit: int | None = None
    unit_rows: int = 256
    unit_bytes: int = 64 * 2**20
    control_share: float = 0.05
    auto: bool = False
    media: MediaLimits = field(default_factory=MediaLimits)
    # Below: how the run is carried out. Free to change between resumes.
    replicas: int = 1
    slots: int | None = None
    max_error_share: float = 0.2
    error_share_after: int = 500
    max_attempts: int = 3

    def __post_init__(self) -> None:
        checks: list[tuple[bool, str]] = [
            (self.kind in ("caption", "vqa"), f"kind {self.kind!r}: use caption or vqa"),
            (self.dtype in DTYPES, f"--dtype {self.dtype!r}: use one of {', '.join(DTYPES)}"),
            (self.limit is None or self.limit > 0, f"--limit {self.limit}: give at least 1"),
            (self.replicas >= 1, f"--replicas {self.replicas}: give at least 1"),
            (0 <= self.control_share <= 1, f"control_share {self.control_share} outside [0, 1]"),
            (
                0 <= self.max_error_share <= 1,
                f"max_error_share {self.max_error_share} not in [0, 1]",
            ),
            (1 <= self.unit_rows <= 512, f"unit_rows {self.unit_rows} outside 1..512"),
            (
                not (self.auto and self.spec.method == "none"),
                "--auto chooses between a method and none: name a --method",
            ),
            (self.max_attempts >= 1, f"max_attempts {self.max_attempts}: give at least 1"),
        ]
        for ok, message in checks:
            if not ok:
                raise UsageError(message)
        if self.input.rstrip("/") == self.output.rstrip("/"):
            raise UsageError(
                f"input and output are both {self.input}: give the output its own prefix"
            )

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is written. Model revision, image backend and the corpus
        listing are added by the plan, which has looked at them."""
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
            "control_share": self.control_share,
            "media": {"max_bytes": self.media.max_bytes, "max_pixels": self.media.max_pixels},
            # JPEGs decoded at reduced scale (`sppruner.models.jpeg_scaling`) have other pixels than
            # in full: a run from before that existed cannot be resumed.
            "reduced_jpegs": True,
        }
        # Named where they are asked for alone: runs that were begun before they existed go on.
        if self.generation.stop:
            settings["generation"]["stop"] = list(self.generation.stop)
        if self.auto:
            settings["auto"] = True
        if self.dtype != "auto":
            settings["dtype"] = self.dtype
        return settings
