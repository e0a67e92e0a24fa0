"""The prompt of a row, from the run's template and the row's own prompt or question.

Guarantee: a pure function of its arguments, so a row that is read again has the prompt that it was
labelled with.
"""

from __future__ import annotations

from typing import Final

from cluster.config import Kind

_QUESTION: Final = "{question}"


def build_prompt(kind: Kind, template: str, row_prompt: str | None) -> str | None:
    """The prompt of one row; None for a VQA row without a question.

    template: the run's prompt. row_prompt: the row's prompt or question, or None. A caption uses
    the row's prompt if the reader gave one, else the template. A question replaces `{question}` in
    the template, or is the whole prompt if the template has no `{question}`.
    """
    if kind == "caption":
        return row_prompt or template
    if row_prompt is None or not row_prompt.strip():
        return None
    return template.replace(_QUESTION, row_prompt) if _QUESTION in template else row_prompt
