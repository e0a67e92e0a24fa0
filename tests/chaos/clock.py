"""The wall clock of every process that is started in an environment: libfaketime, preloaded, shows
the machine's time less or more some seconds. Monotonic clocks and the times of files stay as they
are, as on a machine whose date is set.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

_LIBRARY: Final = "vendor/libfaketime/src/libfaketime.so.1"
_SHARED_MEMORY: Final = Path("/dev/shm")
_PROBE: Final = "import time; print(time.time())"
_PROBED_SECONDS: Final = 10**7


class WallClock:
    """A clock that `set` sets. Where the library does not work there is no `environment`."""

    environment: Mapping[str, str]
    """For the processes that have this clock; empty where it cannot be set."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._left = set(_SHARED_MEMORY.glob("*faketime*"))
        self.environment = self._environment()
        if self.environment and not self._is_obeyed():
            self.environment = {}
        self.set(0)

    def set(self, ahead: int) -> None:
        """Lets the processes think it is so many seconds later than it is; they see it within one
        second."""
        written = self._file.with_suffix(".new")
        written.write_text(f"{ahead:+}")
        written.replace(self._file)

    def close(self) -> None:
        """Removes what killed processes left of the library's shared memory."""
        for path in set(_SHARED_MEMORY.glob("*faketime*")) - self._left:
            path.unlink(missing_ok=True)

    def _environment(self) -> Mapping[str, str]:
        found = find_spec("libfaketime")
        if found is None or found.origin is None:
            return {}
        return {
            "LD_PRELOAD": str(Path(found.origin).parent / _LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def _is_obeyed(self) -> bool:
        self.set(_PROBED_SECONDS)
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
        )
        return probe.returncode == 0 and float(probe.stdout) - time.time() > _PROBED_SECONDS / 2
