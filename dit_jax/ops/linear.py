"""Linear maps that compute in the dtype of their own weights."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from dit_jax.ops import mesh as meshes

TPU_SUBLANES = 8


class Linear(nnx.Linear):
    """`nnx.Linear` whose input is cast to the kernel's dtype: casting the weights casts the matmul."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        kernel = self.kernel[...]
        y = jnp.dot(x.astype(kernel.dtype), kernel, precision=precision_in(kernel.dtype))
        return y if self.bias is None else y + self.bias[...]


class LinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` over trailing axes whose input is cast to the kernel's dtype."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        kernel = as_stored(self.kernel[...])
        y = jnp.tensordot(
            x.astype(kernel.dtype), kernel, axes=len(self.in_features), precision=precision_in(kernel.dtype)
        )
        return y if self.bias is None else y + self.bias[...]


class Mlp(nnx.Module):
    """Two linear maps with an activation between (by default the tanh form of GELU)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, rngs: nnx.Rngs, activation=jax.nn.gelu):
        self.up = Linear(inputs, hidden, rngs=rngs)
        self.down = Linear(hidden, outputs, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.up(x)))


def precision_in(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """What keeps a product in this dtype: left to itself, a TPU multiplies fp32 in one bf16 pass, a GPU in TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def products_in(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """What `precision_in` says, for all products that are traced within: of functions that take no precision."""
    exact = precision_in(dtype) is not None
    return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()


def as_stored(kernel: jax.Array) -> jax.Array:
    """A block's [D, H, K] or [H, K, D] kernel, held on TPU to the memory order of the stack that it is a slice of.

    Left free, XLA chooses the order that suits the matmul and copies whole stacks into it before the loop over blocks:
    most of the attention's weights a second time. A stack is stored in the order that pads tiles of 8 sublanes × 128
    lanes least.
    """
    if meshes.platform() != "tpu" or kernel.ndim != 3:
        return kernel
    mesh = meshes.current_mesh()
    shards = mesh.shape["tensor"] if mesh is not None and "tensor" in mesh.axis_names else 1
    rows = kernel.shape[1] // shards if kernel.shape[1] % shards == 0 else kernel.shape[1]
    whole_tiles = rows % TPU_SUBLANES == 0 or rows in (2, 4)  # tiles of 2 and 4 sublanes exist too
    return with_layout_constraint(kernel, Layout(major_to_minor=(0, 1, 2) if whole_tiles else (1, 0, 2)))
