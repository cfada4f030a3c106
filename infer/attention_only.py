"""Transformers whose blocks are self-attention and nothing else: what a plan does to attention's own time.

They have the methods' seams, so that any plan runs on them as on the whole model.

Shapes: B batch rows, N tokens, L text tokens, D width.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from dit_jax.models import flux, wan
from dit_jax.models.flux import Flux, FluxConfig
from dit_jax.models.network import Context, Place
from dit_jax.models.wan import Wan, WanConfig
from dit_jax.ops.norms import layer_norm
from dit_jax.parameters import stacked


class WanAttention(nnx.Module):
    """x [B, N, D] and the self-attention of its norm."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        self.attn1 = wan.Attention(config, image=False, rngs=rngs)

    def __call__(self, x: jax.Array, signal: wan.Signal, place: Place, strategy, index: jax.Array, cache, aux):
        attended, cache = strategy(self.attn1, layer_norm(x).astype(x.dtype), place, index, cache, aux)
        return x + attended.tokens.astype(x.dtype), cache


class AttentionWan(Wan):
    """A Wan whose blocks are `WanAttention`."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.blocks = stacked(lambda rngs: WanAttention(config, rngs), config.blocks, rngs)


class FluxAttention(nnx.Module):
    """Image [B, N, D] and text [B, L, D], and the joint attention of their norms; the text has projections of its own
    in a double block."""

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs, double: bool):
        self.attn = flux.Attention(config, rngs)
        self.text_attn: Any = nnx.data(flux.Attention(config, rngs) if double else None)

    def __call__(self, tokens, signal: flux.Signal, place: Place, strategy, index: jax.Array, cache, aux):
        x, text = tokens
        of_text = self.attn if self.text_attn is None else self.text_attn
        context = Context(*of_text.qkv(layer_norm(text).astype(text.dtype), None))
        normed = layer_norm(x).astype(x.dtype)
        attended, cache = strategy(self.attn, normed, place._replace(context=context), index, cache, aux)
        text = text + of_text.out(attended.context).astype(text.dtype)
        return (x + attended.tokens.astype(x.dtype), text), cache


class AttentionFlux(Flux):
    """A FLUX whose blocks are `FluxAttention`."""

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.double = stacked(lambda rngs: FluxAttention(config, rngs, True), config.double_blocks, rngs)
        self.single = stacked(lambda rngs: FluxAttention(config, rngs, False), config.single_blocks, rngs)
