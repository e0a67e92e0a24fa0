"""Every error the library raises, with the code and stage of the row error it becomes.

SpprunerError             prompt_invalid     prompt
├── SpecError             prompt_invalid     prompt   a budget, spec or option without a meaning
│   ├── UnknownMethod     prompt_invalid     prompt   no selector of that name
│   └── FormatError       prompt_invalid     prompt   an answer's form that no answer can have
├── UnsupportedModel      prompt_invalid     prompt   no adapter, or no interface in this version
├── MissingSignal         prompt_invalid     prompt   a signal that this family cannot give
├── InputError            prompt_invalid     prompt   wrong image count, too long, no image
│   └── ImageTooNarrow    image_too_large    decode   proportions that no processor should resize
├── EngineError           inference_failed   infer    an engine that cannot answer a blank image
├── EvaluationError       prompt_invalid     prompt   a dataset or output that cannot be evaluated
└── PruningHadNoEffect    pruning_no_effect  infer    the packed prompt is not what the budget asks

Any other exception that a request provokes has the code and stage of EngineError.
"""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

RowStage: TypeAlias = Literal["read", "decode", "prompt", "infer"]
"""Where a row failed: reading it, decoding its image, building its prompt, or running the model."""


RequestPart: TypeAlias = Literal["prompt", "spec", "format"]
"""What of a request an error is about: its texts and images, what is pruned, its answer's form."""


class SpprunerError(Exception):
    """Base of the library's errors."""

    code: ClassVar[str] = "prompt_invalid"
    """The error code of a row that ends in this error; stable, part of the output's contract."""

    stage: ClassVar[RowStage] = "prompt"
    """The stage of a row that ends in this error."""

    about: ClassVar[RequestPart] = "prompt"
    """The part of a request that is to be changed."""


class SpecError(SpprunerError, ValueError):
    """A budget, spec or option that cannot mean anything."""

    about: ClassVar[RequestPart] = "spec"


class FormatError(SpecError):
    """The form of an answer that no answer can have, or that the model's tokens cannot."""

    about: ClassVar[RequestPart] = "format"


class UnknownMethod(SpecError):
    """No selector of that name; the message lists those there are."""


class UnsupportedModel(SpprunerError):
    """No adapter for this model family, or a transformers version without the interface."""


class MissingSignal(SpprunerError):
    """The method needs a signal that this family cannot give."""

    about: ClassVar[RequestPart] = "spec"


class InputError(SpprunerError, ValueError):
    """A prompt the model cannot take."""


class ImageTooNarrow(InputError):
    """An image so narrow that the model's processor would refuse it or make gigabytes of it."""

    code: ClassVar[str] = "image_too_large"
    stage: ClassVar[RowStage] = "decode"


class EngineError(SpprunerError):
    """An engine that cannot answer even a blank image, or breaks its contract."""

    code: ClassVar[str] = "inference_failed"
    stage: ClassVar[RowStage] = "infer"


class EvaluationError(SpprunerError):
    """A dataset, image or output that an evaluation cannot work with; names it and what to do."""


class PruningHadNoEffect(SpprunerError):
    """The packed sequence does not hold the tokens the budget asked for."""

    code: ClassVar[str] = "pruning_no_effect"
    stage: ClassVar[RowStage] = "infer"
