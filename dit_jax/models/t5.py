"""T5 text encoders: UMT5 (Chung et al., arXiv 2304.09151) and T5 v1.1 (Raffel et al., arXiv 1910.10683).

Shapes: B batch, L text tokens, D width, H heads, K head width, F MLP width, G blocks, R buckets of relative distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.ops.linear import Linear, LinearGeneral, precision_in
from dit_jax.ops.norms import rms_norm
from dit_jax.parameters import stacked


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes of an encoder; `per_block_bias`: each block has its own distance bias (UMT5), or all share one (T5)."""

    vocab_size: int = 256384
    width: int = 4096
    heads: int = 64
    head_width: int = 64
    mlp_width: int = 10240
    blocks: int = 24
    relative_buckets: int = 32
    relative_distance: int = 128
    epsilon: float = 1e-6
    per_block_bias: bool = True


UMT5_XXL = T5Config()
T5_XXL = replace(UMT5_XXL, vocab_size=32128, per_block_bias=False)
PRESETS = {"umt5-xxl": UMT5_XXL, "t5-xxl": T5_XXL}

# Logical axes of every leaf (dit_jax/sharding.py).
AXES = {
    "tokens": ("vocabulary", "embed"),
    "norm": (None,),
    "bias.table": (None, "encoder_heads"),
    "blocks.bias.table": ("blocks", None, "encoder_heads"),
    "blocks.norm[12]": ("blocks", None),
    "blocks.attention.[qkv].kernel": ("blocks", "embed", "encoder_heads", None),
    "blocks.attention.o.kernel": ("blocks", "encoder_heads", None, "embed"),
    "blocks.mlp.gate.kernel": ("blocks", "embed", "mlp"),
    "blocks.mlp.up.kernel": ("blocks", "embed", "mlp"),
    "blocks.mlp.down.kernel": ("blocks", "mlp", "embed"),
}


class DistanceBias(nnx.Module):
    """A learned score for every bucket of relative distance and every head."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        shape = (config.relative_buckets, config.heads)
        self.table = nnx.Param(jax.random.normal(rngs.params(), shape) / config.width**0.5)

    def __call__(self, buckets_2L: np.ndarray) -> jax.Array:
        """Bias of every (query, key) pair, [H, L, L] in fp32, from the buckets of `cyclic_buckets`."""
        heads, length = self.table.shape[1], len(buckets_2L) // 2
        by_distance = self.table[...].astype(jnp.float32).T[:, buckets_2L]
        # The period of the repetition is one longer than a row, so distances shift by one a query: no gather of L x L.
        rows = jnp.tile(by_distance, (1, length))[:, : length * (2 * length - 1)]
        return rows.reshape(heads, length, 2 * length - 1)[:, :, :length]


class T5Attention(nnx.Module):
    """Self-attention without a scale: the initialisation of the queries holds it."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        width, heads = config.width, (config.heads, config.head_width)
        small = nnx.initializers.normal((width * config.head_width) ** -0.5)
        self.q = LinearGeneral(width, heads, use_bias=False, kernel_init=small, rngs=rngs)
        self.k = LinearGeneral(width, heads, use_bias=False, rngs=rngs)
        self.v = LinearGeneral(width, heads, use_bias=False, rngs=rngs)
        self.o = LinearGeneral(heads, width, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, bias_HLL: jax.Array, valid_BL: jax.Array | None) -> jax.Array:
        q, k, v = self.q(x_BLD), self.k(x_BLD), self.v(x_BLD)
        precision = precision_in(q.dtype)
        scores = jnp.einsum("bqhk,bmhk->bhqm", q, k, precision=precision, preferred_element_type=jnp.float32) + bias_HLL
        if valid_BL is not None:
            # Finite, so that a row without a valid token gives numbers and not NaN.
            scores = jnp.where(valid_BL[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return self.o(jnp.einsum("bhqm,bmhk->bqhk", weights, v, precision=precision))


class GatedMlp(nnx.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh form of GELU."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.gate = Linear(config.width, config.mlp_width, use_bias=False, rngs=rngs)
        self.up = Linear(config.width, config.mlp_width, use_bias=False, rngs=rngs)
        self.down = Linear(config.mlp_width, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.gate(x)) * self.up(x))


class T5Block(nnx.Module):
    """Attention and MLP on one residual stream, each behind an RMS norm."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.norm1 = nnx.Param(jnp.ones(config.width))
        self.attention = T5Attention(config, rngs)
        self.bias = nnx.data(DistanceBias(config, rngs) if config.per_block_bias else None)
        self.norm2 = nnx.Param(jnp.ones(config.width))
        self.mlp = GatedMlp(config, rngs)
        self.epsilon = config.epsilon

    def __call__(self, x_BLD: jax.Array, bias_HLL: jax.Array, valid_BL: jax.Array | None) -> jax.Array:
        attended = self.attention(rms_norm(x_BLD, self.norm1[...], self.epsilon), bias_HLL, valid_BL)
        x_BLD = x_BLD + attended.astype(x_BLD.dtype)
        return x_BLD + self.mlp(rms_norm(x_BLD, self.norm2[...], self.epsilon)).astype(x_BLD.dtype)


class T5Encoder(nnx.Module):
    """Token ids to one state a token."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.tokens = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.width)))
        self.bias = nnx.data(None if config.per_block_bias else DistanceBias(config, rngs))
        self.blocks = stacked(lambda rngs: T5Block(config, rngs), config.blocks, rngs)
        self.norm = nnx.Param(jnp.ones(config.width))
        self.config = config

    def __call__(self, ids_BL: jax.Array, valid_BL: jax.Array | None = None) -> jax.Array:
        """States [B, L, D] in the dtype of the embedding, before the padding is cut or zeroed.

        ids_BL int, valid_BL bool: false where a token is padding, which no token attends to. Without it every token
        attends to all, padding too (FLUX).
        """
        buckets = cyclic_buckets(ids_BL.shape[1], self.config)
        shared = None if self.bias is None else self.bias(buckets)
        valid_BL = None if valid_BL is None else valid_BL.astype(bool)

        def step(x, block):
            bias = block.bias(buckets) if shared is None else shared
            return block(x, bias, valid_BL), None

        x_BLD, _ = jax.lax.scan(step, self.tokens[...][ids_BL], self.blocks)
        return rms_norm(x_BLD, self.norm[...], self.config.epsilon).astype(x_BLD.dtype)


def cyclic_buckets(length: int, config: T5Config) -> np.ndarray:
    """Bucket of every distance key - query, in the order 0, 1, ... L-1, (unused), -L+1, ... -1; int [2L]."""
    distances = np.concatenate([np.arange(length), [0], np.arange(-length + 1, 0)])
    return relative_buckets(distances, config.relative_buckets, config.relative_distance)


def relative_buckets(distances: np.ndarray, buckets: int, farthest: int) -> np.ndarray:
    """Bucket of each distance key - query (T5, section 2.1): exact when near, then logarithmic up to `farthest`.

    The upper half of the buckets is for keys ahead of the query.
    """
    one_side = buckets // 2
    exact = one_side // 2
    far = np.abs(distances)
    # fp32 throughout, as the models were trained: a distance on the edge of a bucket depends on the rounding.
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(farthest / exact))
    logarithmic = exact + (ratio * np.float32(one_side - exact)).astype(np.int64)
    return np.where(far < exact, far, np.minimum(logarithmic, one_side - 1)) + one_side * (distances > 0)
