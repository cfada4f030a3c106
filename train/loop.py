"""The loop round a training step: exact resume, metrics, checkpoints, a stop on SIGTERM and on NaN."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dit_jax.config import UserError
from train.checkpoints import Checkpoints, Kept
from train.step import StepFunction, TrainState
from train.watch import Journal, Phases


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has.

    out          its folder
    steps, seed  how long it is, and what its random numbers begin with
    log_every, save_every  intervals in steps
    keep         newest checkpoints that stay, and `keep_best` ones by the score `best` (`-name`: the lower the better),
                 of which there is one whenever samples are scored
    stopped_code exit code of a run that SIGTERM stopped before its last step: what starts again what fails wants
                 another than 0, and 1 to 3 mean other things
    mesh         devices by axis, `data=2,fsdp=4`; empty: all of them on fsdp
    tensorboard  whether to write event files besides metrics.jsonl
    """

    # What changes nothing of what is learnt.
    FREE: ClassVar[frozenset[str]] = frozenset(
        {"out", "log_every", "save_every", "keep", "keep_best", "best", "stopped_code", "mesh", "tensorboard"}
    )

    out: str = "runs/untitled"
    steps: int = 1000
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    keep: int = 2
    keep_best: int = 0
    best: str = ""
    stopped_code: int = 0
    mesh: str = ""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if bool(self.keep_best) != bool(self.best):
            raise UserError(
                f"keep_best is {self.keep_best} and best is {self.best!r}: expected how many checkpoints and the score "
                "that they are chosen by, or neither"
            )
        if self.keep < 1:
            raise UserError(f"keep is {self.keep}: expected 1 or more, or a run has no checkpoint to go on from")
        if self.stopped_code not in (0, *range(4, 256)):
            raise UserError(f"stopped_code is {self.stopped_code}: expected 0, or 4 to 255")


@dataclass(frozen=True)
class Hook:
    """Something done every `every` steps and after the last: `run(state, steps_taken)` may return metrics to log."""

    every: int
    run: Callable[[TrainState, int], dict[str, float] | None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its state, the steps taken in all, and whether a signal stopped it before the last."""

    state: TrainState
    steps: int
    stopped: bool


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient is no longer a number."""


def train(
    config: RunConfig,
    state: TrainState,
    step: StepFunction,
    batch_at: Callable[[int], Any],
    hooks: tuple[Hook, ...] = (),
    flops: Callable[[Any], float] | None = None,
    facts: Mapping[str, float] | None = None,
    closing: Callable[[TrainState, int], dict[str, float]] | None = None,
) -> Outcome:
    """Trains until `config.steps`, going on from the newest checkpoint under `config.out` if there is one.

    `batch_at(i)` is the host batch of step i and depends on nothing else, so that the data position is a number. A
    resumed run repeats the uninterrupted one bit for bit. `flops` are those of a step on a batch, for the log, which
    begins with the `facts`, as step 0, and ends with what `closing(state, steps_taken)` finds when all is saved.
    Raises TrainingDivergedError naming the step, the terms that are not finite and the file that its batch is kept in;
    the state before that step is saved. Raises UserError for an interval that is not positive, and for a score `best`
    that nothing gives.
    """
    for interval in (config.log_every, config.save_every, *(hook.every for hook in hooks)):
        if interval < 1:
            raise UserError(f"an interval is {interval} steps, expected 1 or more: see the options ending in _every")
    out = Path(config.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    kept = Kept(last=config.keep, best=config.keep_best, score=config.best)
    about = {"recipe": type(config).__module__, "options": dataclasses.asdict(config)}
    with _Run(config, out, Checkpoints(out, kept, about), flops) as run, _terminated() as stop:
        state, first, key = run.saved.restore(state, jax.random.key(config.seed))
        if first:
            _warn_of_changes(config, run.saved.options(first), first)
        elif facts:
            run.journal.write(0, facts)
        for position, batch in run.timed(_prefetched(batch_at, first, config.steps)):
            state, metrics = step(state, batch, key)
            run.note(position, metrics, state, batch, key)
            taken = position + 1
            last = taken == config.steps
            scores: dict[str, float] = {}
            for hook in hooks:
                if last or taken % hook.every == 0:
                    scores |= run.hooked(hook, state, taken)
            ends = stop(taken - first) and not last
            if last or ends or taken % config.save_every == 0 or (config.best and scores):
                run.save(state, taken, key, scores)
            if config.best:
                _check_best(config.best, scores, last)
            if ends:
                return Outcome(state, taken, True)
            if last and closing is not None:
                run.journal.write(taken, closing(state, taken))
    return Outcome(state, config.steps, False)


def _check_best(best: str, scores: Mapping[str, float], last: bool) -> None:
    """UserError where there are scores and none is called so, or none at all in the end."""
    if best.removeprefix("-") not in scores and (scores or last):
        raise UserError(
            f"best is {best!r}, found {', '.join(scores) or 'no scores'}: expected one of the scores of the run; the "
            "checkpoint of this step is whole"
        )


def _warn_of_changes(config: RunConfig, before: Mapping[str, Any], first: int) -> None:
    """Says which options a run does not go on with as it began, of those that change what is learnt."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    names = [name for name in now if name not in config.FREE and before.get(name, now[name]) != now[name]]
    if names and jax.process_index() == 0:
        changes = ", ".join(f"{name}={now[name]} instead of {before[name]}" for name in names)
        warnings.warn(
            f"{config.out} goes on from step {first} with {changes}: this is not the run that began there; give "
            "another folder with --set out= for one from its first step",
            stacklevel=3,
        )


class _Run:
    """Bookkeeping of one run: metrics are read one step late, so that the device never waits for the host."""

    def __init__(self, config: RunConfig, out: Path, saved: Checkpoints, flops: Callable[[Any], float] | None):
        self.config, self.out, self.saved, self.flops = config, out, saved, flops
        self.journal = Journal(out, config.steps, tensorboard=config.tensorboard)
        self.phases = Phases()
        self.pending: tuple[int, dict[str, jax.Array], Any, jax.Array] | None = None

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.journal.close()
        finally:
            self._close_saved(error)

    def _close_saved(self, error: BaseException | None) -> None:
        if error is None:
            self.saved.close()
            return
        # The first error is the one to be told of.
        try:
            self.saved.close()
        except UserError as unwritten:
            error.add_note(str(unwritten))

    def timed(self, batches: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """The batches; waiting for one is the phase `data`."""
        while True:
            with self.phases("data"):
                following = next(batches, None)
            if following is None:
                return
            yield following

    def note(self, position: int, metrics, state: TrainState, batch: Any, key: jax.Array) -> None:
        """Remembers the step's metrics, and looks at those of the step before."""
        self.check(state)
        self.pending = (position, metrics, batch, key)
        self.journal.advance(position + 1)

    def check(self, state: TrainState) -> None:
        """Waits for the step before, stops if it diverged, and logs it if it is its turn."""
        if self.pending is None:
            return
        position, metrics, batch, key = self.pending
        self.pending = None
        with self.phases("compute"):
            values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        self.phases.step(self.flops(batch) if self.flops else 0.0)
        scalars = {name: value for name, value in values.items() if not isinstance(value, list)}
        broken = {name: value for name, value in scalars.items() if not math.isfinite(value)}
        if any(name.endswith(("loss", "gradient_norm")) for name in broken):
            raise self._diverged(position, broken, state, batch, key)
        main = "loss" if "loss" in values else next(name for name in values if name.endswith("_loss"))
        smooth = self.journal.smooth(values[main])
        if (position + 1) % self.config.log_every == 0:
            self.journal.write(position + 1, {**values, "smooth_loss": smooth, **self.phases.taken()})

    def hooked(self, hook: Hook, state: TrainState, taken: int) -> dict[str, float]:
        """Runs a hook, once the step before it is known to be sound; its scores."""
        self.check(state)
        with self.phases("hooks"):
            scores = hook.run(state, taken) or {}
        self.journal.write(taken, scores)
        return scores

    def save(self, state: TrainState, taken: int, key: jax.Array, scores: Mapping[str, float]) -> None:
        """Begins to write a checkpoint, once its last step is known to be sound."""
        self.check(state)
        with self.phases("checkpoint"):
            self.saved.save(state, taken, key, scores)

    def _diverged(self, position: int, broken: Mapping[str, float], state: TrainState, batch: Any, key: jax.Array):
        # That step left the weights as they were, and so did the one that has begun since.
        if position:
            self.saved.save(state, position, key, {})
        file = self.out / f"diverged-{position}-{jax.process_index()}.npz"
        arrays: dict[str, Any] = {name: np.asarray(array) for name, array in dict(batch).items()}
        np.savez(file, **arrays)
        terms = ", ".join(f"{name} is {value}" for name, value in broken.items())
        before = "the weights before it are saved" if position else "there was no step before it to save"
        return TrainingDivergedError(
            f"Training diverged at step {position}: {terms}, expected finite numbers; its batch is in {file}, and "
            f"{before}; go on in {self.config.out} with a lower learning rate, or mend the batch."
        )


def _prefetched(batch_at: Callable[[int], Any], first: int, last: int) -> Iterator[tuple[int, Any]]:
    """(position, batch) with the next batch made while the current one is used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(batch_at, first) if first < last else None
        for position in range(first, last):
            assert following is not None
            batch = following.result()
            following = pool.submit(batch_at, position + 1) if position + 1 < last else None
            yield position, batch


@contextmanager
def _terminated() -> Iterator[Callable[[int], bool]]:
    """Whether to stop, of the steps that this process has taken: SIGTERM is noted instead of died from. The processes
    of a run agree on the step (jax's own service catches the signal, from where they joined on, and counts from 0);
    outside the main thread signals stay as they are."""
    if jax.distributed.is_initialized():
        yield multihost_utils.reached_preemption_sync_point
        return
    noted: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    except ValueError:
        yield lambda taken: False
        return
    try:
        yield lambda taken: bool(noted)
    finally:
        signal.signal(signal.SIGTERM, before)
