"""Low-rank adapters (LoRA; Hu et al., 2021, arXiv 2106.09685): as data, merged into a model's weights, or beside them
where they are trained.

Shapes: G blocks, R rank. One block of a kernel is [*inputs, *outputs].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from dit_jax.config import UserError
from dit_jax.ops.linear import precision_in
from dit_jax.parameters import STACKS, leaf_name, named_leaves

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a LoRA adds to one leaf: `down · up · alpha / rank`, and `full`.

    stacked      whether the leaf has an axis G of blocks; where it has none, neither has anything below
    down, up     [G, *inputs, R] and [G, R, *outputs], or None; a block of a lower rank is padded with zeros
    alpha, rank  fp32 [G], each block's own; None where down and up are
    full         of the leaf's shape, or None
    """

    stacked: bool = field(metadata={"static": True})
    down: Array | None = None
    up: Array | None = None
    alpha: Array | None = None
    rank: Array | None = None
    full: Array | None = None


Lora = Mapping[str, Adapter]
"""A LoRA of one model: dotted path of a leaf -> what is added to it."""


def delta(adapter: Adapter) -> jax.Array:
    """What an adapter without the axis G adds at strength 1: fp32, of the leaf's shape."""
    total = jnp.float32(0) if adapter.full is None else jnp.asarray(adapter.full, jnp.float32)
    if adapter.down is None or adapter.up is None or adapter.alpha is None or adapter.rank is None:
        return total
    down, up = jnp.asarray(adapter.down, jnp.float32), jnp.asarray(adapter.up, jnp.float32)
    # A TPU would otherwise multiply fp32 in bf16.
    product = jnp.tensordot(down, up, axes=1, precision=jax.lax.Precision.HIGHEST)
    return product * jnp.asarray(adapter.alpha / adapter.rank) + total


def merged_leaf(leaf: jax.Array, adapters: Sequence[tuple[Adapter, float]]) -> jax.Array:
    """A leaf with adapters added, each times its strength: summed in fp32, in the leaf's dtype and sharding.

    Blocks are added to one by one, so that a TPU never holds more than one of them in fp32. (A CPU has no bf16 of its
    own, and holds a copy of a stack in it.)
    """
    if not adapters:
        return leaf
    strengths = np.array([strength for _, strength in adapters], np.float32)
    return _merging(leaf.sharding)(leaf, tuple(adapter for adapter, _ in adapters), strengths)


@lru_cache
def _merging(sharding: Sharding):
    return jax.jit(_merge, out_shardings=sharding)


def _merge(leaf, adapters: tuple[Adapter, ...], strengths):
    def block(weights, own: tuple[Adapter, ...]):
        total = weights.astype(jnp.float32)
        for number, adapter in enumerate(own):
            total = total + strengths[number] * delta(adapter)
        return total.astype(weights.dtype)

    def next_block(index, merged):
        def at(array):
            return jax.lax.dynamic_index_in_dim(array, index, keepdims=False)

        return jax.lax.dynamic_update_index_in_dim(merged, block(at(merged), jax.tree.map(at, adapters)), index, 0)

    if not adapters[0].stacked:
        return block(leaf, adapters)
    return jax.lax.fori_loop(0, leaf.shape[0], next_block, leaf)


def untrained(model: Any, rank: int, seed: int = 0) -> Lora:
    """A LoRA that adds nothing yet, to every linear map of a model's blocks: `down` is random, `up` zero, alpha the
    rank."""
    rng = np.random.default_rng(seed)
    lora = {}
    for name, leaf in named_leaves(model):
        if not name.startswith(STACKS) or not name.endswith(".kernel") or ".modulation." in name:
            continue
        # From heads [G, H, K, D]; any other from the width [G, D, ...].
        inputs = 2 if name.endswith(".o.kernel") and len(leaf.shape) == 4 else 1
        blocks, wide, out = leaf.shape[0], leaf.shape[1 : 1 + inputs], leaf.shape[1 + inputs :]
        down = rng.standard_normal((blocks, *wide, rank), np.float32) / np.sqrt(np.prod(wide))
        every = np.full(blocks, rank, np.float32)
        up = np.zeros((blocks, rank, *out), np.float32)
        lora[name] = Adapter(stacked=True, down=down, up=up, alpha=every, rank=every.copy())
    return lora


def of_leaf(name: str, loras: Sequence[tuple[Lora, float]]) -> list[tuple[Adapter, float]]:
    """The adapters of one leaf with their strengths."""
    return [(lora[name], strength) for lora, strength in loras if name in lora]


def merged(model, loras: Sequence[tuple[Lora, float]]):
    """A copy of a model without LoRAs that has these, each with its strength; leaves without an adapter are shared.

    `model` stays as it is, so that other strengths start from the same weights. Raises UserError for an adapter of a
    leaf that the model lacks.
    """
    known = {name for name, _ in named_leaves(model)}
    unknown = sorted({name for lora, _ in loras for name in lora} - known)
    if unknown:
        raise UserError(f"the model has no leaf {unknown[0]}, which a LoRA adds to; use a LoRA of this model")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: merged_leaf(leaf, of_leaf(leaf_name(path), loras)), model
    )


class Beside(nnx.Module):
    """A linear map and, beside it, x·down·up·alpha/rank, so that neither a merged weight nor its gradient is held."""

    def __init__(self, base: Any, adapter: Adapter):
        assert adapter.alpha is not None and adapter.rank is not None
        self.base = base
        self.down, self.up = nnx.Param(jnp.asarray(adapter.down)), nnx.Param(jnp.asarray(adapter.up))
        # Settings, though they are arrays: not to be trained.
        self.scale = nnx.Param(jax.lax.stop_gradient(jnp.asarray(adapter.alpha / adapter.rank)))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.base(x)
        down, up = self.down[...].astype(y.dtype), self.up[...].astype(y.dtype)
        product = partial(jnp.tensordot, precision=precision_in(y.dtype))
        added = product(product(x.astype(y.dtype), down, axes=down.ndim - 1), up, axes=1)
        return y + self.scale[...].astype(y.dtype) * added


def beside(model: Any, lora: Lora) -> Any:
    """A copy of a model whose linear maps have a LoRA beside them; the weights are the model's own.

    Raises UserError for an adapter of another kind than low-rank factors of a linear map's kernel.
    """
    copy = jax.tree.map(lambda leaf: leaf, model)
    for name, adapter in lora.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "kernel" or adapter.down is None or adapter.up is None or adapter.full is not None:
            raise UserError(
                f"the LoRA's {name} cannot lie beside the weights: expected low-rank factors of a kernel; merge it "
                "instead, or leave it out"
            )
        *parents, last = path.split(".")
        parent = reduce(getattr, parents, copy)
        setattr(parent, last, Beside(getattr(parent, last), adapter))
    return copy
