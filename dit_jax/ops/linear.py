"""Linear maps that compute in the dtype of their own weights."""

from __future__ import annotations

import jax
from flax import nnx


class Linear(nnx.Linear):
    """`nnx.Linear` whose input is cast to the kernel's dtype: casting the weights casts the matmul."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.astype(self.kernel.dtype))


class LinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` whose input is cast to the kernel's dtype."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.astype(self.kernel.dtype))
