"""Parameters of a model by their dotted paths, and the dtypes that they are kept in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dit_jax.config import UserError

STACKS = ("blocks.", "double.", "single.")  # how the names of stacked blocks' weights begin


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtype policy: floating weights (and with them the matmuls) in `weights`, those under the `exact` prefixes in
    fp32.

    Norms, rotations, softmax, modulation and schedules compute in fp32 under any policy; the models see to that.
    """

    weights: Any = jnp.float32
    exact: tuple[str, ...] = ()

    def dtype(self, name: str) -> Any:
        """Dtype of the leaf with this dotted path."""
        return jnp.float32 if name.startswith(self.exact) and self.exact else self.weights


def stacked(build: Callable[[nnx.Rngs], Any], count: int, rngs: nnx.Rngs) -> Any:
    """`count` modules in one, every parameter with a leading axis over them, as `lax.scan` takes them."""
    return nnx.vmap(build, in_axes=0, out_axes=0)(rngs.fork(split=count))


def leaf_name(path) -> str:
    """The dotted path of a leaf of an NNX module: `blocks.attn1.q.kernel`."""
    return ".".join(str(getattr(p, "name", getattr(p, "key", getattr(p, "idx", "")))) for p in path).removesuffix(
        ".value"
    )


def named_leaves(model) -> list[tuple[str, Any]]:
    """(dotted path, array) of every parameter, in the order of the tree."""
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(model)]


def with_leaves(model, values: Mapping[str, Any]):
    """`model` (or its abstract form) with the arrays of the same dotted paths; UserError for one of another shape."""

    def value(path, leaf):
        name = leaf_name(path)
        if values[name].shape != leaf.shape:
            expected = f"expected {leaf.shape}, found {values[name].shape}"
            raise UserError(f"weight {name} has the wrong shape: {expected}; use weights of a model of these sizes")
        return values[name]

    return jax.tree_util.tree_map_with_path(value, model)


def cast(model, precision: Precision):
    """`model` with its leaves in the policy's dtypes; works on arrays, tracers and abstract leaves alike."""

    def convert(path, leaf):
        dtype = precision.dtype(leaf_name(path))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=dtype)
        return leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(convert, model)
