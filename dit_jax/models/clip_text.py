"""The text tower of CLIP (Radford et al., arXiv 2103.00020), whose pooled state FLUX is told.

Shapes: B batch, L text tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dit_jax.config import UserError
from dit_jax.models.clip import BLOCK_AXES, CLIPBlock, TowerConfig
from dit_jax.ops.norms import LayerNorm
from dit_jax.parameters import stacked

HIGHEST_ID = 2  # as `end_token`: what transformers' old configs say, CLIP-L's too, though no text ends with that id


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(TowerConfig):
    """Sizes of a text tower; a text ends at the first `end_token`, or at its highest id if that is `HIGHEST_ID`."""

    vocab_size: int = 49408
    positions: int = 77
    end_token: int = 49407


CLIP_L = CLIPTextConfig(blocks=12, width=768, heads=12, mlp_width=3072, activation="quick_gelu", end_token=HIGHEST_ID)
PRESETS = {"clip-vit-l-14": CLIP_L}

# Logical axes of every leaf (dit_jax/sharding.py). Heads stay whole: 12 do not divide over a `tensor` axis of 8, and
# the tower is small.
AXES = {
    "tokens": ("vocabulary", "embed"),
    "positions": (None, None),
    "norm.*": (None,),
    **{name: tuple(None if axis == "encoder_heads" else axis for axis in axes) for name, axes in BLOCK_AXES.items()},
}


class TextFeatures(NamedTuple):
    """Normed states of the last block [B, L, D]; that of the token that ends the text [B, D]."""

    states: jax.Array
    pooled: jax.Array


class CLIPText(nnx.Module):
    """Token ids to states, each of which knows the tokens up to its own."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        width = config.width
        self.tokens = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, width)) / width**0.5)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (config.positions, width)) / width**0.5)
        self.blocks = stacked(lambda rngs: CLIPBlock(config, rngs, causal=True), config.blocks, rngs)
        self.norm = LayerNorm(width, config.epsilon)
        self.config = config

    def __call__(self, ids_BL: jax.Array) -> TextFeatures:
        """Features of ids, int [B, L], in the dtype of the embedding; what follows the end of a text is not masked.

        Raises UserError for a text that is longer than the model's positions.
        """
        length = ids_BL.shape[1]
        if length > self.config.positions:
            raise UserError(f"expected texts of up to {self.config.positions} tokens, found {length}; cut the text.")
        x_BLD = self.tokens[...][ids_BL] + self.positions[...][:length]
        x_BLD, _ = jax.lax.scan(lambda x, block: (block(x), None), x_BLD, self.blocks)
        states = self.norm(x_BLD).astype(x_BLD.dtype)
        ends = jnp.argmax(ids_BL if self.config.end_token == HIGHEST_ID else ids_BL == self.config.end_token, axis=1)
        return TextFeatures(states, states[jnp.arange(len(ids_BL)), ends])
