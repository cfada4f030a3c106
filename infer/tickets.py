"""Samples on their way through the engine: what is asked for, what is told of it, and how it ends.

Shapes: F frames, H W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_jax.config import UserError
from infer.request import OF_SAMPLES, Job


class QueueFullError(Exception):
    """As many samples wait as may; `retry_after` is when some of them should be through, in seconds."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} samples are waiting, which is as many as may; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class CancelledError(Exception):
    """The sample was cancelled."""


class StoppedError(Exception):
    """The engine stopped before the sample's turn came."""


OUTCOMES: dict[type, str] = {
    type(None): "completed",
    CancelledError: "cancelled",
    StoppedError: "stopped",
    UserError: "refused",
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Steps that a sample has behind it; `preview` uint8 [H, W, 3] is what it may become, where that was asked for."""

    done: int
    steps: int
    preview: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a request gets: frames uint8 [F, H, W, 3], what made them, seconds by stage, what deserves a word."""

    frames: np.ndarray
    metadata: dict[str, Any]
    fps: int
    seconds: dict[str, float]
    batch: int
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True, eq=False)
class Ticket:
    """A sample on its way. `result` holds a `Sample`, or UserError, CancelledError, StoppedError or a failure.

    told      is called from the engine's thread after every segment
    previews  whether progress shows pictures
    alone     keeps others out of its batch
    encoded   whether its text was encoded while it waited
    """

    model: str
    job: Job
    told: Callable[[Progress], None] = lambda progress: None
    previews: bool = False
    alone: bool = False
    encoded: bool = False
    result: Future[Sample] = field(default_factory=Future)
    asked: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What samples of one batch have in common."""
        given = tuple(getattr(self.job, name) is None for name in OF_SAMPLES)
        return self.model, self.job.shared(), given

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.result.done()

    def cancel(self) -> bool:
        """Gives it up; whether it was not over yet."""
        return self.end(CancelledError("cancelled"))

    def end(self, outcome: Sample | Exception) -> bool:
        """Sets the result, if there is none yet."""
        try:
            if isinstance(outcome, Exception):
                self.result.set_exception(outcome)
            else:
                self.result.set_result(outcome)
        except InvalidStateError:
            return False
        return True
