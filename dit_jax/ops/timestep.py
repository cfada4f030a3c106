"""Embedding of a timestep, or of any other scalar."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def sinusoids(t: jax.Array, channels: int) -> jax.Array:
    """Cosines, then sines, of t [...] at geometric frequencies from 1 to 1/10,000; [..., channels] in fp32."""
    half = channels // 2
    frequencies = np.exp(-np.log(10_000.0) * np.arange(half, dtype=np.float64) / half)
    angles = t.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
