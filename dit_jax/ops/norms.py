"""Norms, computed in fp32 whatever comes in. Shapes end in the normalised axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def layer_norm(
    x: jax.Array, scale: jax.Array | None = None, bias: jax.Array | None = None, epsilon: float = 1e-6
) -> jax.Array:
    """Layer norm over the last axis; returns fp32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    if scale is not None:
        normed = normed * scale.astype(jnp.float32)
    return normed if bias is None else normed + bias.astype(jnp.float32)


def rms_norm(
    x: jax.Array, scale: jax.Array, epsilon: float = 1e-6, axes: tuple[int, ...] = (-1,), present: float = 1.0
) -> jax.Array:
    """Root-mean-square norm over `axes` (trailing; `scale` has their shape); returns fp32.

    present  fraction of the normalised channels that x has; the mean counts the others as zeros
    """
    x = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(x), axis=axes, keepdims=True) * present
    return x * jax.lax.rsqrt(mean + epsilon) * scale.astype(jnp.float32)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias; returns fp32."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)
