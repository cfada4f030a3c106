"""Checkpoints of a run: written behind its back, whole or not at all, restored on any mesh.

A checkpoint holds the state of training, how many batches were read, the random key, and what made it (recipe, options,
version of the code).
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from convert.native import in_this_process_alone
from dit_jax.config import UserError
from train.step import TrainState

FOLDER, STATE, ABOUT = "checkpoints", "state", "about"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which checkpoints stay: the `last` ones, and the `best` ones by a score; those without it are none of the best.

    score  its name; `-name`: the lower the better
    """

    last: int = 2
    best: int = 0
    score: str = ""

    def policy(self) -> Any:
        """As Orbax takes it."""
        policies: list[Any] = [LatestN(self.last)]
        if self.best and self.score:
            lower = self.score.startswith("-")
            name = self.score.removeprefix("-")
            policies.append(
                BestN(
                    get_metric_fn=lambda scores: scores[name],
                    reverse=lower,
                    n=self.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return AnyPreservationPolicy(policies)


class _Manager(ocp.CheckpointManager):
    """Leaves it to the loop to ask jax's service whether to stop.

    The service goes by the number that it was asked for last, and Orbax asks for a checkpoint's: another count than the
    loop's where a run goes on, and late where a thread ends the save.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of the run in `out`; to be closed, which waits for what is still being written."""

    def __init__(self, out: str | Path, kept: Kept, about: Mapping[str, Any]):
        self.folder = Path(out).resolve() / FOLDER
        self.about = {**about, "code": code_version()}
        self.score = kept.score.removeprefix("-")
        options = ocp.CheckpointManagerOptions(
            create=True,
            enable_async_checkpointing=True,
            preservation_policy=kept.policy(),
            cleanup_tmp_directories=True,
        )
        handlers = {STATE: ocp.StandardCheckpointHandler(), ABOUT: ocp.JsonCheckpointHandler()}
        self.manager = _Manager(self.folder, options=options, item_handlers=handlers)

    def save(self, state: TrainState, taken: int, key: jax.Array, scores: Mapping[str, float]) -> None:
        """Begins to write the state after so many steps, unless it is there; UserError where the last could not be."""
        if taken in self.manager.all_steps():
            return
        tree = {**_as_tree(state), "position": np.asarray(taken), "key": _key_data(key)}
        args = ocp.args.Composite(
            **{STATE: ocp.args.StandardSave(tree), ABOUT: ocp.args.JsonSave({**self.about, "scores": dict(scores)})}
        )
        metrics = {self.score: scores[self.score]} if self.score in scores else None
        try:
            self.manager.save(taken, args=args, metrics=metrics)
        except Exception as error:
            raise self._unwritten(error) from error

    def restore(self, state: TrainState, key: jax.Array) -> tuple[TrainState, int, jax.Array]:
        """(state, batches read, key) of the newest checkpoint, placed as `state` is, whose arrays are deleted to make
        room for it; what was given if there is none.

        UserError where it was made by another recipe or of another expert, or by a run of other weights.
        """
        newest = self.manager.latest_step()
        if newest is None:
            return state, 0, key
        self._same_recipe(newest)
        wanted = {**jax.tree.map(_abstract, _as_tree(state)), "position": np.zeros((), int), "key": _key_data(key)}
        self._same_weights(wanted, self.manager.item_metadata(newest)[STATE].tree)
        for leaf in jax.tree.leaves((state.step, state.params, state.opt_state, state.ema)):
            leaf.delete()
        tree = self.manager.restore(newest, args=ocp.args.Composite(**{STATE: ocp.args.StandardRestore(wanted)}))[STATE]
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
        optimiser = [tree["optimiser"][jax.tree_util.keystr(path)] for path in paths]
        opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), optimiser)
        restored = TrainState(tree["step"], tree["params"], opt_state, tree["ema"], state.sound)
        return restored, int(tree["position"]), jax.random.wrap_key_data(jnp.asarray(tree["key"]))

    def options(self, taken: int) -> dict[str, Any]:
        """The options of the run that wrote the checkpoint of this step."""
        return dict(self._about(taken)["options"])

    def close(self) -> None:
        """Waits for what is being written; UserError where it could not be."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error
        finally:
            self.manager.close()

    def _about(self, taken: int) -> Mapping[str, Any]:
        return self.manager.restore(taken, args=ocp.args.Composite(**{ABOUT: ocp.args.JsonRestore()}))[ABOUT]

    def _same_recipe(self, taken: int) -> None:
        found, wanted = (_recipe(about) for about in (self._about(taken), self.about))
        if found != wanted:
            raise UserError(
                f"the checkpoints in {self.folder} are of {found}, expected {wanted}; give another folder with --set "
                "out="
            )

    def _same_weights(self, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        for part in ("params", "ema", "optimiser"):
            odd = sorted(set(wanted[part]) ^ set(found[part]))
            shapes = [name for name in wanted[part] if name in found[part]]
            odd += [name for name in shapes if tuple(wanted[part][name].shape) != tuple(found[part][name].shape)]
            if odd:
                raise UserError(
                    f"the checkpoints in {self.folder} are of another run: its {part} differ in {odd[0]!r}, expected "
                    "the same model and optimiser; give another folder with --set out="
                )

    def _unwritten(self, error: Exception) -> UserError:
        steps = self.manager.all_steps()
        last = f"the newest whole one is of step {max(steps)}" if steps else "there is no whole one yet"
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return UserError(
            f"a checkpoint could not be written to {self.folder} ({reason}): {last}; make room and run the same "
            "command again"
        )


def newest_step(out: str | Path) -> int | None:
    """Steps taken in the newest checkpoint of a run, or None."""
    folder = Path(out).resolve() / FOLDER
    steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def load_ema(out: str | Path) -> dict[str, np.ndarray]:
    """The running mean of the weights, by dotted path, in the newest checkpoint of a run."""
    step = newest_step(out)
    if step is None:
        raise UserError(f"{out} holds no checkpoint; expected one under {out}/checkpoints, train first.")
    folder = Path(out).resolve() / FOLDER / str(step) / STATE
    with _lone_reader() as reader:
        wanted = {"ema": reader.metadata(folder).item_metadata.tree["ema"]}
        arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        # Of a large model the masters and the optimiser's state are three times as much.
        args = ocp.args.PyTreeRestore(wanted, arrays, partial_restore=True)
        return {name: np.asarray(leaf) for name, leaf in reader.restore(folder, args)["ema"].items()}


def _lone_reader() -> ocp.Checkpointer:
    """Reads in this process alone, whatever the others of the run do."""
    alone = in_this_process_alone()
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


def code_version(file: Path = Path(__file__)) -> str:
    """The package's version, with the commit where `file`, one of its own, is in a repository (and `.dirty` where
    files differ from it), else with what the environment variable DIT_JAX_COMMIT says, as in a container."""
    version, commit = importlib.metadata.version("dit-jax"), os.environ.get("DIT_JAX_COMMIT", "")
    try:
        _git(file, "ls-files", "--error-unmatch", file.name)
        commit = _git(file, "rev-parse", "--short=12", "HEAD")
        commit += ".dirty" if _git(file, "status", "--porcelain", "--untracked-files=no") else ""
    except (OSError, subprocess.SubprocessError):
        pass
    return f"{version}+{commit}" if commit else version


def _git(file: Path, *words: str) -> str:
    command = ["git", "-C", str(file.parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _recipe(about: Mapping[str, Any]) -> str:
    """What makes a run's weights another's, though they may be as many: the recipe, and the expert that it trains."""
    expert = about.get("options", {}).get("expert")
    return f"the recipe {about['recipe']}" + (f" with expert={expert}" if expert else "")


def _as_tree(state: TrainState) -> dict[str, Any]:
    # Optimiser states are nested named tuples; in the checkpoint they are one flat dict by path.
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    optimiser = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return {"step": state.step, "params": state.params, "ema": state.ema, "optimiser": optimiser}


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    # A restored scalar must be where the step expects it, so every leaf says its own sharding.
    sharding = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _key_data(key: jax.Array) -> np.ndarray:
    # On the host: an array on a device could only be restored onto a device of the same name.
    return np.asarray(jax.random.key_data(key))
