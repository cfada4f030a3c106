"""The loop round a training step: progress, metrics, checkpoints, exact resume, a stop on SIGTERM and on NaN."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from convert.progress import progress_bar
from dit_jax.config import UserError
from train.step import TrainState


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has: where it writes, how long it is, how often it logs and saves, and its mesh."""

    out: str = "runs/untitled"
    steps: int = 1000
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    keep: int = 2
    data: int = 1
    fsdp: int = 1


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
    step: Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]],
    batch_at: Callable[[int], Any],
    hooks: tuple[Hook, ...] = (),
) -> Outcome:
    """Trains until `config.steps`, going on from the newest checkpoint under `config.out` if there is one.

    `batch_at(i)` is the host batch of step i and depends on nothing else, so that the data position is a number. A
    checkpoint holds the state, that position and the random key: a resumed run repeats the uninterrupted one bit for
    bit.
    Raises TrainingDivergedError naming the step whose loss or gradient is not finite; the newest checkpoint is from
    before it. Raises UserError for an interval that is not positive.
    """
    for interval in (config.log_every, config.save_every, *(hook.every for hook in hooks)):
        if interval < 1:
            raise UserError(f"an interval is {interval} steps, expected 1 or more: see the options ending in _every")
    out = Path(config.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    with _manager(out, config) as saved, _terminated() as stop, open(out / "metrics.jsonl", "a") as log:
        state, first, key = _resume(saved, state, jax.random.key(config.seed))
        run = _Run(config, saved, log)
        for position, batch in _prefetched(batch_at, first, config.steps):
            state, metrics = step(state, batch, key)
            run.note(position, metrics)
            taken = position + 1
            if taken == config.steps or taken % config.save_every == 0:
                run.check()
                run.save(state, taken, key)
            for hook in hooks:
                if taken == config.steps or taken % hook.every == 0:
                    run.check()
                    run.write(taken, hook.run(state, taken) or {})
            if stop.set and taken < config.steps:
                run.check()
                run.save(state, taken, key)
                run.bar.close()
                return Outcome(state, taken, True)
        run.bar.close()
    return Outcome(state, config.steps, False)


def newest_step(out: str | Path) -> int | None:
    """Steps taken in the newest checkpoint of a run, or None."""
    folder = Path(out).resolve() / "checkpoints"
    steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def load_ema(out: str | Path) -> dict[str, np.ndarray]:
    """The running mean of the weights, by dotted path, in the newest checkpoint of a run."""
    step = newest_step(out)
    if step is None:
        raise UserError(f"{out} holds no checkpoint; expected one under {out}/checkpoints, train first.")
    folder = Path(out).resolve() / "checkpoints" / str(step) / "default"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
        restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return {name: np.asarray(leaf) for name, leaf in reader.restore(folder, restore_args=restore)["ema"].items()}


class _Run:
    """Bookkeeping of one run: metrics are read one step late, so that the device never waits for the host."""

    def __init__(self, config: RunConfig, saved: ocp.CheckpointManager, log):
        self.config, self.saved, self.log = config, saved, log
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.loss = math.nan
        self.clock = time.perf_counter()
        self.bar = progress_bar(total=config.steps, desc=Path(config.out).name, dynamic_ncols=True, mininterval=5.0)

    def note(self, position: int, metrics: dict[str, jax.Array]) -> None:
        self.check()
        self.pending = (position, metrics)
        self.bar.update(position + 1 - self.bar.n)

    def check(self) -> None:
        """Waits for the step before, stops if it diverged, and logs it if it is its turn."""
        if self.pending is None:
            return
        position, metrics = self.pending
        self.pending = None
        loss = float(metrics["loss"])
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(value := float(metrics[name])):
                self.bar.close()
                before = f"go on from the checkpoint before it in {self.config.out}"
                raise TrainingDivergedError(
                    f"The {name} at step {position} is {value}, expected a finite number; "
                    f"{before} with a lower learning rate or another seed."
                )
        self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        self.bar.set_postfix(loss=f"{self.loss:.4g}", refresh=False)
        if (position + 1) % self.config.log_every == 0:
            now = time.perf_counter()
            values = {name: float(value) for name, value in metrics.items()}
            seconds = (now - self.clock) / self.config.log_every
            self.clock = now
            self.write(position + 1, {**values, "smooth_loss": self.loss, "seconds_per_step": seconds})

    def write(self, taken: int, values: dict[str, float]) -> None:
        if values:
            line = {"step": taken, "time": round(time.time(), 1)} | {k: float(f"{v:.6g}") for k, v in values.items()}
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()

    def save(self, state: TrainState, taken: int, key: jax.Array) -> None:
        if taken not in self.saved.all_steps():
            tree = {**_as_tree(state), "position": np.asarray(taken), "key": _key_data(key)}
            self.saved.save(taken, args=ocp.args.StandardSave(tree))


def _as_tree(state: TrainState) -> dict[str, Any]:
    # Optimiser states are nested named tuples; in the checkpoint they are one flat dict by path.
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    optimiser = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return {"step": state.step, "params": state.params, "ema": state.ema, "optimiser": optimiser}


def _resume(saved: ocp.CheckpointManager, state: TrainState, key: jax.Array) -> tuple[TrainState, int, jax.Array]:
    newest = saved.latest_step()
    if newest is None:
        return state, 0, key

    def abstract(leaf):
        # A restored scalar must be where the step expects it, so every leaf says its own sharding.
        sharding = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    wanted = {**jax.tree.map(abstract, _as_tree(state)), "position": np.zeros((), int), "key": _key_data(key)}
    tree = saved.restore(newest, args=ocp.args.StandardRestore(wanted))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    optimiser = [tree["optimiser"][jax.tree_util.keystr(path)] for path in paths]
    opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), optimiser)
    restored = TrainState(tree["step"], tree["params"], opt_state, tree["ema"])
    return restored, int(tree["position"]), jax.random.wrap_key_data(jnp.asarray(tree["key"]))


def _key_data(key: jax.Array) -> np.ndarray:
    # On the host: an array on a device could only be restored onto a device of the same name.
    return np.asarray(jax.random.key_data(key))


def _manager(out: Path, config: RunConfig):
    options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True, enable_async_checkpointing=True)
    return ocp.CheckpointManager(out / "checkpoints", options=options)


def _prefetched(batch_at: Callable[[int], Any], first: int, last: int) -> Iterator[tuple[int, Any]]:
    """(position, batch) with the next batch made while the current one is used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(batch_at, first) if first < last else None
        for position in range(first, last):
            assert following is not None
            batch = following.result()
            following = pool.submit(batch_at, position + 1) if position + 1 < last else None
            yield position, batch


class _Stop:
    set = False


@contextmanager
def _terminated() -> Iterator[_Stop]:
    """Notes SIGTERM instead of dying from it; outside the main thread signals stay as they are."""
    stop = _Stop()

    def note(*_):
        stop.set = True

    try:
        before = signal.signal(signal.SIGTERM, note)
    except ValueError:
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
