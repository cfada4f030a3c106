"""The image tower of CLIP (Radford et al., arXiv 2103.00020), which Wan's image-to-video models look through, and the
block that it shares with the text tower (clip_text.py).

Shapes: B batch, Y X pixels, C colours, N patches (or tokens), H heads, K head width, D width, P width of the shared
image-text space.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from dit_jax.ops.attention import attend
from dit_jax.ops.linear import Linear, LinearGeneral, precision_in
from dit_jax.ops.norms import LayerNorm
from dit_jax.parameters import stacked

Activation = Literal["gelu", "quick_gelu"]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What the image tower's config has in common with the text tower's."""

    blocks: int
    width: int
    heads: int
    mlp_width: int
    activation: Activation = "gelu"
    epsilon: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(TowerConfig):
    """Sizes of an image tower; `projection` is the width of the shared space, None for a tower without it."""

    patch: int = 14
    image_size: int = 224
    channels: int = 3
    projection: int | None = None

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch) ** 2


VIT_H = CLIPVisionConfig(blocks=32, width=1280, heads=16, mlp_width=5120)
PRESETS = {"clip-vit-h-14": VIT_H}

# Logical axes of every leaf (dit_jax/sharding.py).
BLOCK_AXES: dict[str, tuple[str | None, ...]] = {
    "blocks.norm[12].*": ("blocks", None),
    "blocks.attention.[qkv].kernel": ("blocks", "embed", "encoder_heads", None),
    "blocks.attention.[qkv].bias": ("blocks", "encoder_heads", None),
    "blocks.attention.o.kernel": ("blocks", "encoder_heads", None, "embed"),
    "blocks.attention.o.bias": ("blocks", None),
    "blocks.up.kernel": ("blocks", "embed", "mlp"),
    "blocks.up.bias": ("blocks", "mlp"),
    "blocks.down.kernel": ("blocks", "mlp", "embed"),
    "blocks.down.bias": ("blocks", None),
}
AXES = {
    "patch.kernel": (None, "embed"),
    "class_token": (None,),
    "positions": (None, None),
    "norm_*": (None,),
    "projection.kernel": ("embed", None),
    **BLOCK_AXES,
}


class Features(NamedTuple):
    """Last states [B, 1+N, D]; normed class token [B, D]; its projection [B, P], None without one."""

    states: jax.Array
    pooled: jax.Array
    projected: jax.Array | None


class CLIPAttention(nnx.Module):
    """Multi-head self-attention over all tokens, or over those up to each one where it is causal."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs, causal: bool):
        heads = (config.heads, config.width // config.heads)
        self.q = LinearGeneral(config.width, heads, rngs=rngs)
        self.k = LinearGeneral(config.width, heads, rngs=rngs)
        self.v = LinearGeneral(config.width, heads, rngs=rngs)
        self.o = LinearGeneral(heads, config.width, axis=(-2, -1), rngs=rngs)
        self.attend = _attend_causally if causal else attend

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        return self.o(self.attend(self.q(x_BND), self.k(x_BND), self.v(x_BND)))


class CLIPBlock(nnx.Module):
    """Attention and MLP on one residual stream, each behind a layer norm."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs, causal: bool = False):
        self.norm1 = LayerNorm(config.width, config.epsilon)
        self.attention = CLIPAttention(config, rngs, causal)
        self.norm2 = LayerNorm(config.width, config.epsilon)
        self.up = Linear(config.width, config.mlp_width, rngs=rngs)
        self.down = Linear(config.mlp_width, config.width, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        x_BND = x_BND + self.attention(self.norm1(x_BND)).astype(x_BND.dtype)
        hidden = _activate(self.up(self.norm2(x_BND)), self.activation)
        return x_BND + self.down(hidden).astype(x_BND.dtype)


class CLIPVision(nnx.Module):
    """Pixels of `preprocess` to states of a class token and one token a patch."""

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs):
        width = config.width
        self.patch = Linear(config.patch**2 * config.channels, width, use_bias=False, rngs=rngs)
        self.class_token = nnx.Param(jax.random.normal(rngs.params(), (width,)) / width**0.5)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (1 + config.patches, width)) / width**0.5)
        self.norm_in = LayerNorm(width, config.epsilon)
        self.blocks = stacked(lambda rngs: CLIPBlock(config, rngs), config.blocks, rngs)
        self.norm_out = LayerNorm(width, config.epsilon)
        self.projection = nnx.data(
            Linear(width, config.projection, use_bias=False, rngs=rngs) if config.projection else None
        )
        self.config = config

    def __call__(self, pixels_BYXC: jax.Array) -> jax.Array:
        """States [B, 1+N, D] that the last block but one returns, class token first: what image-to-video takes."""
        return self._run(pixels_BYXC)[0]

    def features(self, pixels_BYXC: jax.Array) -> Features:
        """States of the last block, and what CLIP compares with a text."""
        states = self._run(pixels_BYXC)[1]
        pooled = self.norm_out(states[:, 0]).astype(states.dtype)
        return Features(states, pooled, None if self.projection is None else self.projection(pooled))

    def _run(self, pixels_BYXC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """States after the last block but one, and after the last."""

        # Both leave one scan over all blocks, as a stack cut short would be copied.
        def step(states, block):
            _, x = states
            return (x, block(x)), None

        x_BND = self._embed(pixels_BYXC)
        states, _ = jax.lax.scan(step, (x_BND, x_BND), self.blocks)
        return states

    def _embed(self, pixels_BYXC: jax.Array) -> jax.Array:
        config = self.config
        expected = (config.image_size, config.image_size, config.channels)
        if pixels_BYXC.shape[1:] != expected:
            raise ValueError(f"expected images of shape {expected}, found {pixels_BYXC.shape[1:]}; use `preprocess`")
        whole = config.image_size // config.patch * config.patch
        patches_of_pixels = "b (y py) (x px) c -> b (y x) (py px c)"
        rows = einops.rearrange(pixels_BYXC[:, :whole, :whole], patches_of_pixels, py=config.patch, px=config.patch)
        patches = self.patch(rows)
        first = jnp.broadcast_to(self.class_token[...].astype(patches.dtype), (len(patches), 1, config.width))
        x_BND = jnp.concatenate([first, patches], axis=1) + self.positions[...].astype(patches.dtype)
        return self.norm_in(x_BND).astype(patches.dtype)


def preprocess(images: np.ndarray, size: int = 224) -> np.ndarray:
    """Images uint8 [B, Y, X, 3] to pixels float32 [B, size, size, 3], as transformers' CLIPImageProcessor makes them.

    The shorter edge is scaled to `size` (bicubic), the centre is cut out, CLIP's mean and deviation are taken out.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        found = f"{images.dtype} {images.shape}"
        raise ValueError(f"expected uint8 images [B, Y, X, 3], found {found}; convert them to RGB bytes")
    height, width = images.shape[1:3]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    top, left = (height - size) // 2, (width - size) // 2
    scaled = [Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in images]
    cut = np.stack([np.asarray(image)[top : top + size, left : left + size] for image in scaled])
    return (cut.astype(np.float32) / np.float32(255) - MEAN) / DEVIATION


def _attend_causally(q_BNHK: jax.Array, k_BNHK: jax.Array, v_BNHK: jax.Array) -> jax.Array:
    """Attention of each token to itself and those before it, with all scores at once: a text is short."""
    product = functools.partial(jnp.einsum, precision=precision_in(q_BNHK.dtype))
    scores = product("bqhk,bmhk->bhqm", q_BNHK, k_BNHK, preferred_element_type=jnp.float32)
    scores = scores * q_BNHK.shape[-1] ** -0.5
    before = jnp.tri(q_BNHK.shape[1], dtype=bool)
    weights = jax.nn.softmax(jnp.where(before, scores, -jnp.inf), axis=-1).astype(v_BNHK.dtype)
    return product("bhqm,bmhk->bqhk", weights, v_BNHK)


def _activate(x: jax.Array, activation: Activation) -> jax.Array:
    """GELU by the error function, or the sigmoid approximation that OpenAI's models were trained with; fp32 within."""
    y = x.astype(jnp.float32)
    y = y * jax.nn.sigmoid(1.702 * y) if activation == "quick_gelu" else jax.nn.gelu(y, approximate=False)
    return y.astype(x.dtype)
