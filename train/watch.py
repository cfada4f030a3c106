"""What a run says of itself: a progress bar, a line of JSON at every interval, TensorBoard when asked."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from convert.progress import progress_bar
from dit_jax.config import UserError
from infer.chips import PEAK_FLOPS

SMOOTHING = 0.95


class Phases:
    """Seconds spent in each phase of a loop since it was last asked, how many steps ended since then and their FLOPs.

    The clock starts behind the first step, which waits for what is restored and compiled.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.steps, self.flops = 0, 0.0
        self.since: float | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def step(self, flops: float = 0.0) -> None:
        """A step of so many FLOPs has ended."""
        if self.since is None:
            self.seconds, self.since = {}, time.perf_counter()
        else:
            self.steps += 1
            self.flops += flops

    def taken(self) -> dict[str, float]:
        """Seconds a step, in all (`seconds_per_step`) and by phase (`seconds_of_data`), the FLOP/s that they make where
        FLOPs are known, with the share of the devices' peak (`mfu`) where that is; and starts anew. Nothing where no
        step was timed."""
        if self.since is None or not self.steps:
            return {}
        now, steps = time.perf_counter(), self.steps
        told = {"seconds_per_step": (now - self.since) / steps}
        told |= {f"seconds_of_{name}": seconds / steps for name, seconds in self.seconds.items()}
        if self.flops:
            told["flops_per_second"] = self.flops / (now - self.since)
            if peak := PEAK_FLOPS.get(jax.devices()[0].device_kind):
                told["mfu"] = told["flops_per_second"] / (peak * jax.device_count())
        self.seconds, self.steps, self.flops, self.since = {}, 0, 0.0, now
        return told


class Journal:
    """Writes what happens in a run of `steps` to `out`/metrics.jsonl, TensorBoard and the terminal.

    Of several processes the first alone writes.
    """

    def __init__(self, out: Path, steps: int, *, tensorboard: bool = False):
        self.writes = jax.process_index() == 0
        self.log = open(out / "metrics.jsonl", "a") if self.writes else None  # noqa: SIM115
        self.board = _board(out) if tensorboard and self.writes else None
        self.loss = math.nan
        self.bar = progress_bar(
            total=steps, desc=out.name, dynamic_ncols=True, mininterval=5.0, disable=not self.writes
        )

    def advance(self, taken: int) -> None:
        """Moves the bar."""
        self.bar.update(taken - self.bar.n)

    def smooth(self, loss: float) -> float:
        """The loss, averaged over some steps, for the bar and the log."""
        self.loss = loss if math.isnan(self.loss) else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        self.bar.set_postfix(loss=f"{self.loss:.4g}", refresh=False)
        return self.loss

    def write(self, taken: int, values: Mapping[str, float | list[float]]) -> None:
        """A line: the step, the time and these values to six digits, a list where there is one for every block.

        NaN, the mean of no rows, is left out.
        """
        if not values or self.log is None:
            return
        rounded = {name: _rounded(value) for name, value in values.items() if not _is_nan(value)}
        self.log.write(json.dumps({"step": taken, "time": round(time.time(), 1)} | rounded) + "\n")
        self.log.flush()
        if self.board is not None:
            for name, value in rounded.items():
                for each, one in _named(name, value):
                    self.board.add_scalar(each, one, taken)

    def close(self) -> None:
        """Ends the bar and the files."""
        self.bar.close()
        for file in (self.log, self.board):
            if file is not None:
                file.close()


def _is_nan(value: float | list[float]) -> bool:
    return not isinstance(value, list) and math.isnan(value)


def _rounded(value: float | list[float]) -> float | list[float]:
    return [float(f"{each:.6g}") for each in value] if isinstance(value, list) else float(f"{value:.6g}")


def _named(name: str, value: float | list[float]) -> list[tuple[str, float]]:
    if not isinstance(value, list):
        return [(name, value)]
    return [(f"{name}/block_{block:02}", each) for block, each in enumerate(value)]


def _board(out: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "tensorboard=True needs the package tensorboardX, which is not installed: `pip install tensorboardX`, or "
            "leave the option out and read metrics.jsonl"
        ) from None
    return SummaryWriter(str(out / "tensorboard"))
