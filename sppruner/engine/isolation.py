"""The row boundary: whatever a request provokes stays with that request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

_I = TypeVar("_I")
_O = TypeVar("_O")


def isolated(
    run: Callable[[Sequence[_I]], list[_O]],
    items: Sequence[_I],
    fail: Callable[[_I, Exception], _O],
) -> list[_O]:
    """`run(items)`; where that raises, its halves, down to single items, which `fail` answers for.

    A bad item is the only one to fail, and most neighbours still run together. Raises
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
    return isolated(run, items[:half], fail) + isolated(run, items[half:], fail)
