"""From a checkpoint in one layout to another on disk: built beside its destination, then renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from convert import original
from convert.checkpoint import Checkpoint, CheckpointLayout
from convert.components import Settings, component_of
from convert.kinds import kind_to_write
from convert.leaves import Leaf, check_leaves, tensors_from_leaves
from convert.method_parts import part_weights
from convert.native import PARAMS, write_native
from convert.original import CONFIG, INDEX, SIDECAR
from convert.references import with_references
from convert.safetensors_files import flush, write_durably, write_safetensors, write_tensors
from dit_jax.config import UserError
from dit_jax.parameters import named_leaves

MAX_SHARD_BYTES = 5 * 10**9
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # what marks a folder as a LoRA of diffusers


def convert(
    source: Checkpoint,
    destination: Path,
    layout: CheckpointLayout,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: tqdm | None = None,
    base: str | None = None,
) -> None:
    """Write a checkpoint in another layout, every tensor bit for bit in its own dtype, one at a time.

    progress  a bar that is told the number of reads, then advanced by each
    base      a checkpoint whose components are named, instead of copied, where the source's are the same
    Raises UserError for whatever is wrong with the source, and when the destination exists and `overwrite` is not set;
    the destination is then as it was, with nothing left beside it.
    """
    refuse_overlap(source.place, destination)
    # All components are opened before anything is written: most mistakes show in configs, names and shapes.
    leaves = {name: source.leaves(name) for name in source.settings}
    files = original.side_files(source.settings, source.files) if layout == "original" else source.files
    if base is not None:
        files, shared = with_references(source, base, layout)
        leaves = {name: part for name, part in leaves.items() if name not in shared}
    weights_of_methods = {} if layout == "original" else part_weights(source, layout)
    if progress is not None:
        progress.total = sum(len(leaf.blocks) for part in leaves.values() for leaf in part.values())
        leaves = {name: {key: _watched(leaf, progress) for key, leaf in part.items()} for name, part in leaves.items()}
    with staged(destination, overwrite) as folder:
        for place, content in files.items():
            if place not in weights_of_methods:
                _copy(content, folder / place)
        for place, outgoing in weights_of_methods.items():
            write_safetensors(folder / place, outgoing)
        for name, part in leaves.items():
            component = source.component(name)
            if layout == "native":
                write_native(folder / name / PARAMS, part, component.axes)
                continue
            if layout == "original":
                kind = kind_to_write(source.settings[name])
                assert kind and kind.stem, name  # side_files has refused the others
                tensors = tensors_from_leaves(part, component.rows, kind.layout)
                inside = folder / original.subfolder(name, source.settings)
                write_tensors(inside, kind.stem(source.settings[name]), tensors, max_shard_bytes)
            else:
                tensors = tensors_from_leaves(part, component.rows_to_write("diffusers"), "diffusers")
                write_tensors(folder / name, component.stem, tensors, max_shard_bytes)


def _watched(leaf: Leaf, progress: tqdm) -> Leaf:
    def read(block: int | None) -> np.ndarray:
        array = leaf.read(block)
        progress.update()
        return array

    return replace(leaf, read=read)


def _copy(content: Path | bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target, content if isinstance(content, bytes) else content.read_bytes())


@contextlib.contextmanager
def staged(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `destination` that takes its place when the block ends, and vanishes when the block raises.

    Raises UserError when the destination exists and may not be replaced.
    """
    refuse_existing(destination, overwrite)
    destination = destination.absolute()
    partial = destination.with_name(f"{destination.name}.partial-{os.getpid()}")
    replaced = destination.with_name(f"{destination.name}.old-{os.getpid()}")
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        _flush_folders(partial)
        _swap(partial, destination, replaced)
    except BaseException:
        if replaced.exists() and not destination.exists():
            replaced.rename(destination)
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _swap(partial: Path, destination: Path, replaced: Path) -> None:
    if destination.exists():
        destination.rename(replaced)
    partial.rename(destination)
    flush(destination.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def refuse_existing(destination: Path, overwrite: bool) -> None:
    """Raises UserError for a destination that exists and may not be replaced, being no checkpoint or not to be."""
    if not destination.exists() and not destination.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{destination} exists; choose another destination or pass --overwrite.")
    if not destination.is_dir() or destination.is_symlink():
        raise UserError(f"{destination} is not a folder; expected a checkpoint to replace; choose another destination.")
    # Replacing means deleting: never a folder that holds something else.
    known = (INDEX, CONFIG, SIDECAR, LORA_WEIGHTS)
    if any(destination.iterdir()) and not any((destination / name).is_file() for name in known):
        raise UserError(f"{destination} is no checkpoint, so --overwrite leaves it alone; choose another destination.")


def refuse_overlap(source: Path, destination: Path) -> None:
    """Raises UserError for a destination that is the source, or in it, or round it."""
    source, destination = source.resolve(), destination.resolve()
    if source == destination or destination in source.parents or source in destination.parents:
        raise UserError(f"{destination} and the source {source} lie in one another; choose another destination.")


def _flush_folders(root: Path) -> None:
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        flush(folder)


def write_model(
    folder: Path, model: nnx.Module, settings: Settings, layout: Literal["diffusers", "native"] = "diffusers"
) -> None:
    """Write a model that is in memory into a new folder: config.json and weights. Put it inside `staged` to be safe.

    settings  contents of config.json, which name the class
    Raises UserError, with nothing written, when the model's leaves are not those of the model in `settings`.
    """
    component = component_of(settings, folder)
    stacked = {row.ours for row in component.rows if row.stacked("diffusers") or row.stacked("original")}
    leaves = {name: _array_leaf(array, name in stacked) for name, array in named_leaves(model)}
    check_leaves(leaves, component.shapes, folder)
    folder.mkdir(parents=True)
    write_durably(folder / CONFIG, (json.dumps(settings, indent=2) + "\n").encode())
    if layout == "native":
        write_native(folder / PARAMS, leaves, component.axes)
    else:
        tensors = tensors_from_leaves(leaves, component.rows_to_write("diffusers"), "diffusers")
        write_tensors(folder, component.stem, tensors, MAX_SHARD_BYTES)


def _array_leaf(array: jax.Array, stacked: bool) -> Leaf:
    read = (lambda block: np.asarray(array[block])) if stacked else (lambda block: np.asarray(array))
    return Leaf(array.shape, np.dtype(array.dtype), stacked, read)
