"""A diffusion transformer as tokenizer → trunk → head, whichever backbone it is.

Shapes: B batch rows (guidance branches included), N tokens, M padded tokens, P channels of a patch row, D width, G
blocks, T Y X latent grid, C latent channels. Latents are channels last and in raster order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.ops import mesh as meshes
from dit_jax.ops.attention import attend
from dit_jax.ops.rope import Rope

TPU_TOKENS = 128
Patch = tuple[int, int, int]


class Tokens(NamedTuple):
    """Patch rows [B, M, P], their (t, y, x) in token units [B, M, 3], and which rows are real [B, M] (None: all)."""

    rows: jax.Array
    positions: jax.Array
    valid: jax.Array | None


class Context(NamedTuple):
    """Queries, keys and values of text that shares the tokens' attention (FLUX), [B, L, H, K] each."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


class Place(NamedTuple):
    """What self-attention knows of its tokens besides their features.

    positions  (t, y, x) in token units [B, M, 3]
    rope       rotation table
    valid      which tokens are real [B, M] (None: all)
    context    text that attends and is attended with them, or None
    """

    positions: jax.Array
    rope: Rope
    valid: jax.Array | None
    context: Context | None = None


class Conditioning(NamedTuple):
    """What a model is told besides the timestep; a backbone reads the fields that it has weights for.

    text      embeddings [B, L, E]
    image     hidden states of the image encoder [B, I, E'] (image-to-video)
    pooled    one embedding a text [B, E'']
    guidance  scale of distilled guidance [B]
    """

    text: jax.Array
    image: jax.Array | None = None
    pooled: jax.Array | None = None
    guidance: jax.Array | None = None


class TokenTimesteps(NamedTuple):
    """Timesteps of tokens that have their own: the few distinct values [B, Q], and which of them each has [B, M].

    What a model makes of a timestep it makes of the Q values; no array of modulation per token is ever built.
    """

    values: jax.Array
    which: jax.Array


Timesteps = jax.Array | TokenTimesteps  # [B], or of every token


class Attended(NamedTuple):
    """Output of self-attention: the tokens' projected [B, M, D], and of a context's queries its heads [B, L, H, K]."""

    tokens: jax.Array
    context: jax.Array | None = None


class Strategy(Protocol):
    """How a block's self-attention runs: which tokens are projected, what they attend, what is kept for later steps."""

    def __call__(
        self, attention, x_BMD: jax.Array, place: Place, block: jax.Array, cache: Any, aux: Any
    ) -> tuple[Attended, Any]: ...


@dataclass(frozen=True)
class Dense:
    """Every token is projected and attends every valid token (and the context, which attends them too)."""

    def __call__(self, attention, x_BMD, place, block, cache, aux):
        q, k, v = attention.qkv(x_BMD, place.rope)
        if place.context is None:
            return Attended(attention.out(attend(q, k, v, place.valid))), cache
        k, v, valid = with_context(place.context, k, v, place.valid)
        context = attend(place.context.q, k, v, valid)
        return Attended(attention.out(attend(q, k, v, valid)), context), cache


def with_context(context: Context, k_BMHK: jax.Array, v_BMHK: jax.Array, valid_BM: jax.Array | None):
    """Keys, values and validity with the context's in front."""
    k, v = (jnp.concatenate(pair, axis=1) for pair in ((context.k, k_BMHK), (context.v, v_BMHK)))
    real = jnp.ones(context.k.shape[:2], bool)
    return k, v, None if valid_BM is None else jnp.concatenate([real, valid_BM], axis=1)


@dataclass(frozen=True, kw_only=True)
class NetworkCall:
    """The static part of what a step may vary; part of a program's key."""

    attention: Strategy = Dense()
    remat: bool = False


def grid(latents_shape, patch: Patch) -> tuple[int, int, int]:
    """Token grid (T, Y, X) of latents [B, T, Y, X, C]."""
    return tuple(size // step for size, step in zip(latents_shape[1:4], patch, strict=True))


def padded_length(tokens: int) -> int:
    """Tokens with the padding that the mesh in force needs: an even split, and on TPU whole lanes a shard."""
    multiple = meshes.token_multiple(meshes.current_mesh()) * (TPU_TOKENS if meshes.platform() == "tpu" else 1)
    return math.ceil(tokens / multiple) * multiple


def layout(latents_BTYXC: jax.Array, patch: Patch) -> Tokens:
    """Latents in rows of `patch` (t, y, x) cells, channels ordered (t y x c), padded for the mesh in force."""
    batch, (t, y, x) = latents_BTYXC.shape[0], grid(latents_BTYXC.shape, patch)
    rows = einops.rearrange(
        latents_BTYXC, "b (t pt) (y py) (x px) c -> b (t y x) (pt py px c)", pt=patch[0], py=patch[1], px=patch[2]
    )
    positions = np.stack(np.meshgrid(np.arange(t), np.arange(y), np.arange(x), indexing="ij"), -1).reshape(-1, 3)
    count = t * y * x
    pad = padded_length(count) - count
    rows = meshes.constrain_tokens(jnp.pad(rows, ((0, 0), (0, pad), (0, 0))))
    positions = np.pad(positions, ((0, pad), (0, 0))).astype(np.float32)
    valid = jnp.broadcast_to(np.arange(count + pad) < count, (batch, count + pad)) if pad else None
    return Tokens(rows, jnp.broadcast_to(positions, (batch, *positions.shape)), valid)


def unlayout(rows_BMP: jax.Array, latents_shape, patch: Patch) -> jax.Array:
    """Latent-shaped [B, T, Y, X, C'] array from patch rows; the padding is dropped."""
    t, y, x = grid(latents_shape, patch)
    return einops.rearrange(
        rows_BMP[:, : t * y * x],
        "b (t y x) (pt py px c) -> b (t pt) (y py) (x px) c",
        t=t, y=y, x=x, pt=patch[0], py=patch[1], px=patch[2],
    )  # fmt: skip


def network(model, call: NetworkCall, tokens: Tokens, t: Timesteps, conditioning: Conditioning, state=None, aux=None):
    """One evaluation of a backbone: (velocity rows [B, M, P] in fp32, state).

    `t` is the model's timestep in [0, 1000], of a row or (Wan) of each token; `state` is what the attention strategy
    keeps between steps, `aux` its arrays.
    """
    signal = model.signal(t, conditioning)
    x_BMD = meshes.constrain_tokens(model.embed(tokens.rows))
    place = Place(tokens.positions, model.rope(tokens.positions), tokens.valid)
    x_BMD, state = model.trunk(x_BMD, signal, place, call, state, aux)
    return model.head(x_BMD, signal).astype(jnp.float32), state


def run_blocks(blocks, x, signal, place: Place, call: NetworkCall, state=None, aux=None, first: int = 0):
    """Tokens through a stack of blocks, one after the other: (x, state).

    x      [B, M, D], or a tuple of that and of text tokens [B, L, D] that the blocks also change
    first  index of the stack's first block in the model
    """

    def step(carry, block_and_index):
        x, cache = carry
        block, index = block_and_index
        x, cache = block(x, signal, place, call.attention, index, cache, aux)
        return (_pinned(x), cache), None

    step = jax.checkpoint(step) if call.remat else step
    count = jax.tree.leaves(blocks)[0].shape[0]
    return jax.lax.scan(step, (_pinned(x), state), (blocks, first + jnp.arange(count)))[0]


def _pinned(x):
    if isinstance(x, tuple):
        return meshes.constrain_tokens(x[0]), *(meshes.constrain_rows(text) for text in x[1:])
    return meshes.constrain_tokens(x)
