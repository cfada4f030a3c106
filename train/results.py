"""A checkpoint with what was trained in place of what it had: what recipes export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.checkpoint import Checkpoint, CheckpointLayout
from convert.leaves import Leaf
from convert.progress import progress_bar
from convert.transfer import convert, refuse_existing, refuse_overlap
from convert.wan import HIGH_NOISE
from train.checkpoints import load_ema
from train.step import of_modules

if TYPE_CHECKING:
    from train.recipe import RecipeConfig, Training


def with_transformer(
    checkpoint: Checkpoint, weights: Mapping[str, np.ndarray], component: str = HIGH_NOISE
) -> Checkpoint:
    """The checkpoint with these weights as those of its transformer, or expert, in the dtypes that its own have."""
    own = checkpoint.leaves(component)

    def leaf(name: str) -> Leaf:
        old = own[name]

        def read(block: int | None) -> np.ndarray:
            array = weights[name] if block is None else weights[name][block]
            return np.asarray(array).astype(old.dtype)

        return Leaf(old.shape, old.dtype, old.stacked, read)

    return replace(checkpoint, edited={**checkpoint.edited, component: {name: leaf(name) for name in own}})


def with_student(component: str, checkpoint: Checkpoint, trained: Mapping[str, Any]) -> Checkpoint:
    """`Training.result` of a student alone: its weights are those of the transformer, or expert, of this name."""
    return with_transformer(checkpoint, trained["student"], component)


def with_files(checkpoint: Checkpoint, files: Mapping[str, bytes]) -> Checkpoint:
    """The checkpoint with these files of methods (`convert.method_parts.part_files`) in place of those it has."""
    return replace(checkpoint, files={**checkpoint.files, **files})


def check_export(destination: Path, training: Training) -> None:
    """UserError for a destination that would be refused in the end."""
    refuse_overlap(training.target.checkpoint.place, destination)
    refuse_existing(destination, overwrite=True)


def export(config: RecipeConfig, training: Training) -> None:
    """Writes the running mean of the newest checkpoint's weights to `config.export`: in the target's checkpoint, or as
    `training.write` does."""
    modules = of_modules(load_ema(config.out))
    target, destination = training.target.checkpoint, Path(config.export)
    if training.write is not None:
        training.write(modules, destination)
        return
    with progress_bar(unit="tensor", desc=config.export) as bar:
        layout: CheckpointLayout = "native" if target.layout == "native" else "diffusers"
        convert(training.result(target, modules), destination, layout, overwrite=True, progress=bar)
