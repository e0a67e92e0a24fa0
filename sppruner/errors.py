"""Every error the library raises.

SpprunerError
├── SpecError            a budget, spec or option that cannot mean anything
├── UnknownMethod        no selector of that name
├── UnsupportedModel     no adapter for the model, or a version without the needed interface
├── MissingSignal        the method needs a signal this family cannot give
├── InputError           a prompt the model cannot take: wrong image count, too long, no image
├── EngineError          an engine that cannot answer even a blank image
├── EvaluationError      a dataset, image or output an evaluation cannot work with
└── PruningHadNoEffect   the packed sequence does not hold the tokens the budget asked for
"""

from __future__ import annotations


class SpprunerError(Exception):
    """Base of the library's errors."""


class SpecError(SpprunerError, ValueError):
    """A budget, spec or option that cannot mean anything."""


class UnknownMethod(SpecError):
    """No selector of that name; the message lists those there are."""


class UnsupportedModel(SpprunerError):
    """No adapter for this model family, or a transformers version without the interface."""


class MissingSignal(SpprunerError):
    """The method needs a signal that this family cannot give."""


class InputError(SpprunerError, ValueError):
    """A prompt the model cannot take."""


class EngineError(SpprunerError):
    """An engine that cannot answer even a blank image."""


class EvaluationError(SpprunerError):
    """A dataset, image or output that an evaluation cannot work with; names it and what to do."""


class PruningHadNoEffect(SpprunerError):
    """The packed sequence does not hold the tokens the budget asked for."""
