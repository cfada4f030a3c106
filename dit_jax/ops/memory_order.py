"""The order in which arrays lie in memory on TPU, where XLA would choose a worse one for what a loop carries."""

from __future__ import annotations

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from dit_jax.ops import mesh as meshes


def row_major(x: jax.Array) -> jax.Array:
    """What is read from or written to a large array that a loop carries, held on TPU to that array's own order.

    Left free, XLA takes the order that suits the slice's maker for the whole array, and copies it there and back at
    every step.
    """
    if meshes.platform() != "tpu":
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
