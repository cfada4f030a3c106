"""Rotary position embedding over several axes, from positions that are data.

Shapes: B batch, N tokens, H heads, K head width, A axes of the position (t, y, x). The two channels of a rotated pair
lie half a head apart (channel j pairs with j + K/2), in a checkpoint next to each other: the converter tables reorder
the channels of q, k and their norms, which leaves q·k as it is and the rotation free of strided access.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.ops import mesh as meshes
from dit_jax.ops.linear import precision_in


class Rope(NamedTuple):
    """Cosines and sines of the rotation angles, [B, N, K/2] in fp32."""

    cos: jax.Array
    sin: jax.Array


def rope_table(positions_BNA: jax.Array, widths: tuple[int, ...], theta: float = 10_000.0) -> Rope:
    """Rotation table for positions in token units; `widths` splits the head width among the axes, each even."""
    angles = []
    for axis, width in enumerate(widths):
        frequencies = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
        angles.append(positions_BNA[..., axis, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32))
    angles_BNK = jnp.concatenate(angles, axis=-1)
    return Rope(jnp.cos(angles_BNK), jnp.sin(angles_BNK))


def merged_centres(positions_BN3: jax.Array, merged: int) -> jax.Array:
    """Centres in base-patch units of tokens that cover `merged` base patches along y and along x; t stays."""
    if merged == 1:
        return positions_BN3
    step = np.array([1, merged, merged], np.float32)
    return positions_BN3 * step + (step - 1) / 2


def rotate(x_BNHK: jax.Array, rope: Rope) -> jax.Array:
    """Rotates every pair of channels of every head by its token's angles; fp32 inside, the input's dtype outside."""
    if meshes.platform() == "tpu":
        return _rotated_whole(x_BNHK, rope)
    first, second = jnp.split(x_BNHK.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x_BNHK.dtype)


def _rotated_whole(x_BNHK: jax.Array, rope: Rope) -> jax.Array:
    """The same numbers without halves of heads, which on TPU would fill half a tile each and keep XLA from fusing the
    norm before them: x and its halves in fp32 would be written out. A product with ±1 exchanges the halves exactly."""
    half = x_BNHK.shape[-1] // 2
    zero, one = np.zeros((half, half)), np.eye(half)
    exchange = jnp.asarray(np.block([[zero, one], [-one, zero]]), x_BNHK.dtype)
    other = jnp.dot(x_BNHK, exchange, precision=precision_in(x_BNHK.dtype)).astype(jnp.float32)
    cos, sin = (jnp.concatenate([angles, angles], axis=-1)[:, :, None, :] for angles in rope)
    return (x_BNHK.astype(jnp.float32) * cos + other * sin).astype(x_BNHK.dtype)
