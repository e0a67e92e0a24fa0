"""The prompt of a row: the run's template and what the row itself says."""

from __future__ import annotations

from typing import Final

from cluster.config import Kind

_QUESTION: Final = "{question}"


def build_prompt(kind: Kind, template: str, own: str | None) -> str | None:
    """The prompt of one row, or None for a VQA row without a question.

    template: the run's prompt. own: the row's prompt or question, or None. A caption uses the
    row's own prompt, else the template. A question replaces `{question}` in the template, or is
    the prompt itself where the template has no such place.
    """
    if kind == "caption":
        return own or template
    if own is None or not own.strip():
        return None
    return template.replace(_QUESTION, own) if _QUESTION in template else own
