"""What a checkpoint holds for methods: `methods/NAME/` with config.json and, where there are arrays,
weights.safetensors.

Those are of the transformer; of another component (the low-noise expert) they lie in `methods/NAME/COMPONENT/`.
Settings without arrays are of the whole pipeline, and told to each of its transformers.

Weights are stored as our leaves in a native checkpoint, and under PyTorch's keys (`convert/method_keys.py`) in
diffusers' layout. They are read whichever they are, known by their keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors.numpy import load, save

from convert.checkpoint import METHODS, Checkpoint, CheckpointLayout
from convert.components import read_json
from convert.leaves import Leaf, check_leaves, finite, leaves_from_tensors, tensors_from_leaves
from convert.method_keys import MethodKeys, method_keys
from convert.original import CONFIG
from convert.safetensors_files import Outgoing, Tensor, read_safetensors
from convert.wan import HIGH_NOISE, LOW_NOISE
from dit_jax.config import UserError
from dit_jax.methods.coredit import Coredit
from dit_jax.methods.method import Part

WEIGHTS = "weights.safetensors"
FEW_STEP = "few_step"
OF_PIPELINE = (Coredit.name, FEW_STEP)  # settings alone


def transformers(checkpoint: Checkpoint) -> list[str]:
    """The components that methods apply to: the transformer, or the two experts."""
    return [name for name in (HIGH_NOISE, LOW_NOISE) if name in checkpoint.settings]


def part_files(parts: Mapping[str, Part], component: str = HIGH_NOISE) -> dict[str, bytes]:
    """The files of a component's parts by their place in a checkpoint: to be written as any of its `files`. `convert`
    writes them in the layout of its destination."""
    files = {}
    for name, part in parts.items():
        folder = _folder(name, component)
        files[f"{folder}/{CONFIG}"] = (json.dumps(dict(part.settings), indent=2) + "\n").encode()
        if name not in OF_PIPELINE:
            arrays = {key: np.ascontiguousarray(leaf) for key, leaf in sorted(part.leaves.items())}
            files[f"{folder}/{WEIGHTS}"] = save(arrays, {"format": "pt"})
    return files


def read_parts(checkpoint: Checkpoint, component: str = HIGH_NOISE) -> dict[str, Part]:
    """The parts of a component by their names, arrays on the host; UserError for files that are missing or damaged."""
    parts = {}
    for name in _names(checkpoint, component):
        settings = _settings(checkpoint, name, component)
        leaves = {} if name in OF_PIPELINE else _leaves(checkpoint, name, component, settings)
        parts[name] = Part(settings, {key: leaf.rectangle(None) for key, leaf in leaves.items()})
    return parts


def part_weights(checkpoint: Checkpoint, layout: CheckpointLayout) -> dict[str, list[Outgoing]]:
    """Place in a checkpoint of this layout -> tensors, of all parts whose weights have other keys there.

    Raises UserError as `read_parts` does.
    """
    weights = {}
    for component in transformers(checkpoint):
        for name in _names(checkpoint, component):
            settings = {} if name in OF_PIPELINE else _settings(checkpoint, name, component)
            keys = None if name in OF_PIPELINE else method_keys(name, settings, checkpoint.component(component))
            if keys is None:
                continue
            leaves = _leaves(checkpoint, name, component, settings)
            place = f"{_folder(name, component)}/{WEIGHTS}"
            if layout == "native":
                weights[place] = [_outgoing(key, leaf) for key, leaf in leaves.items()]
            else:
                weights[place] = tensors_from_leaves(leaves, keys.rows, "diffusers")
    return weights


def _names(checkpoint: Checkpoint, component: str) -> list[str]:
    inside = {PurePosixPath(place).parts[1] for place in checkpoint.files if place.startswith(f"{METHODS}/")}
    return [name for name in sorted(inside) if f"{_folder(name, component)}/{CONFIG}" in checkpoint.files]


def _folder(name: str, component: str) -> str:
    alone = component == HIGH_NOISE or name in OF_PIPELINE
    return f"{METHODS}/{name}" if alone else f"{METHODS}/{name}/{component}"


def _settings(checkpoint: Checkpoint, name: str, component: str) -> dict:
    return read_json(checkpoint.files[f"{_folder(name, component)}/{CONFIG}"])


def _leaves(checkpoint: Checkpoint, name: str, component: str, settings: Mapping) -> dict[str, Leaf]:
    """A part's leaves of ours, from weights with either kind of keys."""
    folder = _folder(name, component)
    content, source = checkpoint.files.get(f"{folder}/{WEIGHTS}"), checkpoint.folder / folder
    if content is None:
        raise UserError(
            f"{source} lacks {WEIGHTS}; expected the weights beside {CONFIG}; download the checkpoint again."
        )
    tensors = _tensors(content, source / WEIGHTS)
    keys = method_keys(name, settings, checkpoint.component(component))
    if keys is not None and not _are_ours(tensors, keys):
        return leaves_from_tensors(tensors, keys.rows, keys.shapes, "diffusers", source)
    leaves = {key: _own_leaf(tensor) for key, tensor in tensors.items()}
    if keys is not None:
        check_leaves(leaves, keys.shapes, source)
    return leaves


def _are_ours(tensors: Mapping[str, Tensor], keys: MethodKeys) -> bool:
    return len(tensors.keys() & keys.shapes.keys()) > len(tensors.keys() & keys.theirs)


def _tensors(content: Path | bytes, file: Path) -> dict[str, Tensor]:
    if isinstance(content, Path):
        return read_safetensors(content)
    arrays = load(content)
    return {
        key: Tensor(key, file, array.dtype, array.shape, partial(arrays.__getitem__, key))
        for key, array in arrays.items()
    }


def _own_leaf(tensor: Tensor) -> Leaf:
    leaf = Leaf(tensor.shape, tensor.dtype, False, lambda block: tensor.read())
    return finite(leaf, lambda block: f"{tensor.file}: {tensor.key}")


def _outgoing(key: str, leaf: Leaf) -> Outgoing:
    return Outgoing(key, leaf.dtype, leaf.shape, lambda: leaf.rectangle(None))
