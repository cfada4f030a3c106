"""The LoRA nearest to what a model learnt: of every matrix that two checkpoints of one model do not share, the largest
singular values of the difference (Eckart and Young, 1936), by a randomised range finder (Halko, Martinsson and Tropp,
2011, arXiv 0909.4061, algorithm 4.4)."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint, CheckpointLayout, open_checkpoint
from convert.leaves import Leaf
from convert.lora_export import write_lora
from convert.lora_keys import Target
from convert.progress import progress_bar
from convert.tables import Row
from convert.transfer import convert
from dit_jax.config import UserError
from dit_jax.lora import Adapter
from dit_jax.ops.linear import products_in

MODELS = ("transformer", "transformer_2")
OVERSAMPLED = 10
TURNS = 4  # of subspace iteration


def convert_to_lora(
    source: Checkpoint, destination: Path, layout: CheckpointLayout, base: str, rank: int, *, overwrite: bool = False
) -> float:
    """Write a pipeline that names another's transformers and, beside that, the LoRA that makes them nearly its own;
    returns the share of the squared difference that the LoRA has [0, 1].

    base  a pipeline with transformers of the same sizes; whatever else is the same is named too (`with_references`)
    rank  of every block's matrix, at most; a smaller matrix is kept whole
    Raises UserError as `convert`, for transformers of other sizes, and where no matrix differs; the destination is then
    as it was.
    """
    if rank < 1:
        raise UserError(f"the rank of a LoRA is {rank}: expected at least 1")
    other = open_checkpoint(base)
    names = [name for name in MODELS if name in source.settings]
    targets = {name: Target.of(source.component(name)) for name in names}
    for name, target in targets.items():
        if name in other.places:
            raise UserError(f"{base} names another's {name}: expected one that holds its own; give that one")
        if name not in other.settings or target.shapes != other.component(name).shapes:
            raise UserError(
                f"{base} has no {name} of the sizes of that of {source.place}: expected what it was made from; convert "
                "a pruned model without a rank"
            )
    found = {name: _extracted(source, other, target, name, rank) for name, target in targets.items()}
    loras = {name: {leaf: each.adapter for leaf, each in part.items() if each.adapter} for name, part in found.items()}
    if not any(loras.values()):
        raise UserError(f"no matrix of {source.place} differs from {base}: there is no LoRA to extract")
    with tempfile.TemporaryDirectory() as folder:
        files = {name: write_lora({name: lora}, targets, Path(folder) / name) for name, lora in loras.items() if lora}
        named = replace(
            source,
            edited={**source.edited, **{name: other.leaves(name) for name in names}},
            files={**source.files, **{f"{name}_lora.safetensors": file for name, file in files.items()}},
            loras={name: Path(f"{name}_lora.safetensors") for name in files},
        )
        convert(named, destination, layout, overwrite=overwrite, base=base)
    every = [each for part in found.values() for each in part.values()]
    return sum(each.kept for each in every) / sum(each.whole for each in every)


def _extracted(source: Checkpoint, base: Checkpoint, target: Target, name: str, rank: int) -> dict[str, _Nearest]:
    theirs = base.leaves(name)
    leaves = progress_bar(source.leaves(name).items(), desc=f"LoRA of {name}", unit="leaf")
    return {leaf: _nearest(ours, theirs[leaf], target.matrices.get(leaf), rank) for leaf, ours in leaves}


class _Nearest(NamedTuple):
    """What a leaf's difference is as an adapter (None where a LoRA cannot hold it, or it is zero), and the squares of
    what that has and of the whole."""

    adapter: Adapter | None
    kept: float
    whole: float


def _nearest(ours: Leaf, theirs: Leaf, row: Row | None, rank: int) -> _Nearest:
    """Block by block, so that no more than one is held in fp32."""
    downs, ups, whole = [], [], 0.0
    for block in ours.blocks:
        difference = ours.block(block).astype(np.float32) - theirs.block(block).astype(np.float32)
        whole += float(np.square(difference).sum())
        if row is not None:
            down, up = _factors(difference, row.inputs(), rank)
            downs.append(down)
            ups.append(up)
    kept = float(sum(np.square(up).sum() for up in ups))
    if not kept:
        return _Nearest(None, 0.0, whole)
    every = np.full(len(ups), ups[0].shape[0], np.float32)
    factors: dict[str, Any] = {"down": np.stack(downs).astype(ours.dtype), "up": np.stack(ups).astype(ours.dtype)}
    factors |= {"alpha": every, "rank": every}
    if not ours.stacked:
        factors = {name: array[0] for name, array in factors.items()}
    return _Nearest(Adapter(stacked=ours.stacked, **factors), kept, whole)


def _factors(difference: np.ndarray, inputs: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """`nearest_product` of a matrix [*inputs, *outputs], as [*inputs, R] and [R, *outputs]."""
    taken, given = difference.shape[:inputs], difference.shape[inputs:]
    down, up = nearest_product(jnp.asarray(difference.reshape(math.prod(taken), -1)), rank)
    return np.asarray(down).reshape(*taken, -1), np.asarray(up).reshape(-1, *given)


def nearest_product(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Orthonormal [inputs, R] and [R, outputs] whose product is the one of this rank that is nearest to a matrix."""
    width = min(rank + OVERSAMPLED, *matrix.shape)
    with products_in(matrix.dtype):
        basis = jnp.linalg.qr(matrix @ jax.random.normal(jax.random.key(0), (matrix.shape[1], width)))[0]
        for _ in range(TURNS):
            basis = jnp.linalg.qr(matrix @ jnp.linalg.qr(matrix.T @ basis)[0])[0]
        left, values, right = jnp.linalg.svd(basis.T @ matrix, full_matrices=False)
        return (basis @ left)[:, :rank], values[:rank, None] * right[:rank]
