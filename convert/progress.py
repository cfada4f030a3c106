"""Progress bars on standard error, which may go away while the work goes on (`dit-convert … 2>&1 | head`)."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm


class _Lasting:
    """A stream whose failed writes are lost. tqdm keeps its lock when one fails, and every thread then waits for it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def progress_bar(iterable: Any = None, **options) -> tqdm:
    """`tqdm(iterable, **options)` on standard error, whatever becomes of that."""
    return tqdm(iterable, file=_Lasting(sys.stderr), **options)
