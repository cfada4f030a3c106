"""Warnings as people see them: for commands, a line each on stderr."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Shows every warning as one line that begins with `warning:`."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _show
        yield


def _show(message: Warning | str, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)
