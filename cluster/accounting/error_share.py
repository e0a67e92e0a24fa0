"""When too many rows fail: the rule that stops an attempt before it writes error rows only.

It sees the committed units of one attempt, in the order of their commits. What earlier attempts
committed does not count: a mended run goes on.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

from cluster.accounting.ledger import UnitLedger

_WINDOW_ROWS: Final = 1000
_WINDOW_SHARE: Final = 0.01


class ErrorShare:
    """The share of failed rows, in the whole attempt and among its latest rows.

    Trouble that begins late would need as many rows again to show in the whole: 1.25 million error
    rows after 5 million good ones at 20 %. The latest rows show it at once. They are at least a
    hundredth of the run's, so that one bad file of a large corpus does not stop it.
    """

    def __init__(self, *, most: float, after: int, run_rows: int) -> None:
        """most: the largest share allowed, in [0, 1]. after: rows before which nothing is said.
        run_rows: planned rows of the run."""
        self._most = most
        self._after = max(1, after)
        self._window_rows = max(_WINDOW_ROWS, after, int(run_rows * _WINDOW_SHARE))
        self._latest: deque[UnitLedger] = deque()
        self._latest_rows = 0
        self._latest_failed: Counter[str] = Counter()
        self._rows = 0
        self._failed: Counter[str] = Counter()
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the attempt should stop; None for no reason. A reason stays: units that were under
        way when it arose must not talk it away."""
        return self._reason

    def add(self, unit: UnitLedger) -> None:
        """Counts a unit that was committed just now."""
        self._rows += unit.rows
        self._failed.update(unit.failed)
        self._latest.append(unit)
        self._latest_rows += unit.rows
        self._latest_failed.update(unit.failed)
        # The fewest units, from the latest back, that hold so many rows.
        while self._latest_rows - self._latest[0].rows >= self._window_rows:
            oldest = self._latest.popleft()
            self._latest_rows -= oldest.rows
            self._latest_failed.subtract(oldest.failed)
        if self._reason is None and self._rows >= self._after:
            self._reason = self._judge("rows", self._rows, self._failed) or self._judge(
                "latest rows", self._latest_rows, self._latest_failed
            )

    def _judge(self, which: str, rows: int, failed: Counter[str]) -> str | None:
        count = failed.total()
        if count <= self._most * rows:
            return None
        codes = ", ".join(f"{code} {n}" for code, n in failed.most_common() if n)
        return (
            f"{count} of the {rows} {which} of this attempt failed ({codes}), more than the "
            f"{self._most:.0%} that --max-error-share allows. Committed units stay: mend the cause "
            "and give the same command again, or one with a higher --max-error-share; "
            "jobs/retry_errors.py asks the rows that failed again"
        )
