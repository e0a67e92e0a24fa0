"""The row boundary: an exception that one request provokes fails that request only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

_I = TypeVar("_I")
_O = TypeVar("_O")


def run_isolating_failures(
    run: Callable[[Sequence[_I]], list[_O]],
    items: Sequence[_I],
    fail: Callable[[_I, Exception], _O],
) -> list[_O]:
    """`run(items)`. Where that raises, runs each half, down to single items; `fail` makes the
    output of a single item that raises.

    A bad item is the only one to fail, and most of its neighbours still run together. Raises
    torch.AcceleratorError: a faulted device answers nothing more, so no item is to blame.
    """
    try:
        return run(items)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        if len(items) == 1:
            return [fail(items[0], error)]
    half = len(items) // 2
    return [
        *run_isolating_failures(run, items[:half], fail),
        *run_isolating_failures(run, items[half:], fail),
    ]
