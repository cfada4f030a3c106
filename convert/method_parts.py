"""What a checkpoint holds for methods: `methods/NAME/` with config.json and weights.safetensors.

Those are of the transformer; of another component (the low-noise expert) they lie in `methods/NAME/COMPONENT/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors.numpy import save

from convert.checkpoint import METHODS, Checkpoint
from convert.components import read_json
from convert.original import CONFIG
from convert.safetensors_files import read_safetensors
from convert.wan import HIGH_NOISE, LOW_NOISE
from dit_jax.config import UserError
from dit_jax.methods.method import Part

WEIGHTS = "weights.safetensors"


def transformers(checkpoint: Checkpoint) -> list[str]:
    """The components that methods apply to: the transformer, or the two experts."""
    return [name for name in (HIGH_NOISE, LOW_NOISE) if name in checkpoint.settings]


def part_files(parts: Mapping[str, Part], component: str = HIGH_NOISE) -> dict[str, bytes]:
    """The files of a component's parts by their place in a checkpoint: to be written as any of its `files`."""
    files = {}
    for name, part in parts.items():
        folder = _folder(name, component)
        files[f"{folder}/{CONFIG}"] = (json.dumps(dict(part.settings), indent=2) + "\n").encode()
        arrays = {key: np.ascontiguousarray(leaf) for key, leaf in sorted(part.leaves.items())}
        files[f"{folder}/{WEIGHTS}"] = save(arrays, {"format": "pt"})
    return files


def read_parts(checkpoint: Checkpoint, component: str = HIGH_NOISE) -> dict[str, Part]:
    """The parts of a component by their names, arrays on the host; UserError for files that are missing or damaged."""
    inside = {PurePosixPath(place).parts[1] for place in checkpoint.files if place.startswith(f"{METHODS}/")}
    return {
        name: _read_part(checkpoint.folder / _folder(name, component))
        for name in sorted(inside)
        if f"{_folder(name, component)}/{CONFIG}" in checkpoint.files
    }


def _folder(name: str, component: str) -> str:
    return f"{METHODS}/{name}" if component == HIGH_NOISE else f"{METHODS}/{name}/{component}"


def _read_part(folder: Path) -> Part:
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(
            f"{folder} lacks {WEIGHTS}; expected the weights beside {CONFIG}; download the checkpoint again."
        )
    tensors = read_safetensors(file)
    return Part(read_json(folder / CONFIG), {key: np.array(tensor.read()) for key, tensor in tensors.items()})
