"""A checkpoint with what was trained in place of what it had: what recipes export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from convert.leaves import Leaf
from convert.wan import HIGH_NOISE


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
