"""Commands that a signal stops once everything is cleaned up."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def cleaned_up_when_stopped() -> Iterator[None]:
    """Within it an interrupt or a polite kill raises SystemExit with 128 and the signal's number; outside the main
    thread signals stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _stop(number: int, frame: FrameType | None) -> None:
    # The impatient press Ctrl-C again: that must not stop the cleaning up.
    for other in _STOPS:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)
