"""The Wan 2.1 and 2.2 video diffusion transformer, text-to-video and image-to-video (Wan team, arXiv 2503.20314).

Shapes: B batch rows, N tokens, Q distinct timesteps of a row, L text tokens, I image tokens, D width, H heads, K head
width, F MLP width, G blocks, P row channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.models.network import (
    Aux,
    Conditioning,
    CrossWatcher,
    NetworkCall,
    Patch,
    Place,
    Timesteps,
    TokenTimesteps,
    branch,
    run_blocks,
)
from dit_jax.ops.attention import attend
from dit_jax.ops.linear import Linear, LinearGeneral, Mlp
from dit_jax.ops.norms import LayerNorm, layer_norm, rms_norm
from dit_jax.ops.rope import Rope, merged_centres, rope_table, rotate
from dit_jax.ops.timestep import sinusoids
from dit_jax.parameters import stacked

TEXT_TOKENS_WITH_IMAGE = 512  # image-to-video was trained on text padded to this length, behind the image tokens


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes of a Wan transformer; `image_width` is set for image-to-video with an image branch, None otherwise.

    A pruned model has fewer `heads` than fill its width, in both attentions of every block. Its queries and keys are
    normalised over the kept heads alone, or, with `norm_counts_pruned`, as if the others were there with zeros.
    `merged` is how many patches of the size that it was made for a token covers along y and along x (DDiT).
    """

    blocks: int = 40
    width: int = 5120
    heads: int = 40
    head_width: int = 128
    mlp_width: int = 13824
    in_channels: int = 16
    out_channels: int = 16
    text_width: int = 4096
    time_frequencies: int = 256
    patch: Patch = (1, 2, 2)
    merged: int = 1
    epsilon: float = 1e-6
    image_width: int | None = None
    image_positions: int | None = None
    norm_counts_pruned: bool = False

    @property
    def rope_widths(self) -> tuple[int, int, int]:
        """Head channels rotated by t, y and x."""
        space = 2 * (self.head_width // 6)
        return self.head_width - 2 * space, space, space


WAN_14B = WanConfig()
WAN_1_3B = replace(WAN_14B, blocks=30, width=1536, heads=12, mlp_width=8960)
PRESETS = {
    "wan2.1-t2v-1.3b": WAN_1_3B,
    "wan2.1-t2v-14b": WAN_14B,
    "wan2.1-i2v-14b": replace(WAN_14B, in_channels=36, image_width=1280),
    "wan2.2-t2v-a14b": WAN_14B,
    "wan2.2-i2v-a14b": replace(WAN_14B, in_channels=36),
    "wan2.2-ti2v-5b": replace(
        WAN_14B, blocks=30, width=3072, heads=24, mlp_width=14336, in_channels=48, out_channels=48
    ),
}
TWO_EXPERTS = ("wan2.2-t2v-a14b", "wan2.2-i2v-a14b")  # presets of pipelines with two transformers of the config

# Leaves that stay in fp32 when the weights are cast: dotted prefixes, as diffusers keeps them.
FP32_LEAVES = ("time.", "modulation", "blocks.modulation", "blocks.cross_norm", "image.norm1", "image.norm2")

# Logical axes of every parameter (dit_jax/sharding.py has the rules from these to mesh axes).
AXES = {
    "patch.kernel": (None, None),
    "time.up.kernel": (None, "mlp"),
    "time.down.kernel": ("mlp", "embed"),
    "time_out.kernel": ("embed", "mlp"),
    "text.up.kernel": (None, "mlp"),
    "text.down.kernel": ("mlp", "embed"),
    "image.mlp.up.kernel": (None, "mlp"),
    "image.mlp.down.kernel": ("mlp", "embed"),
    "image.positions": (None, None),
    "out.kernel": (None, None),
    "[!b]*.bias": (None,),
    "image.norm[12].scale": (None,),
    "modulation": (None, None),
    "blocks.attn[12].*[qk].linear.kernel": ("blocks", "embed", "heads", None),
    "blocks.attn[12].*[qk].linear.bias": ("blocks", "heads", None),
    "blocks.attn[12].*[qk].norm": ("blocks", "heads", None),
    "blocks.attn[12].*v.kernel": ("blocks", "embed", "heads", None),
    "blocks.attn[12].*v.bias": ("blocks", "heads", None),
    "blocks.attn[12].o.kernel": ("blocks", "heads", None, "embed"),
    "blocks.attn[12].o.bias": ("blocks", None),
    "blocks.mlp.up.kernel": ("blocks", "embed", "mlp"),
    "blocks.mlp.up.bias": ("blocks", "mlp"),
    "blocks.mlp.down.kernel": ("blocks", "mlp", "embed"),
    "blocks.mlp.down.bias": ("blocks", None),
    "blocks.cross_norm.*": ("blocks", None),
    "blocks.modulation": ("blocks", None, None),
}


class Signal(NamedTuple):
    """What every block is told.

    time, modulation  of the distinct timesteps, [B, Q, D] and [B, Q, 6, D] in fp32
    which             which of the Q is each token's [B, N]; None where all tokens of a row share one
    text, image       [B, L, D], [B, I, D]
    """

    time: jax.Array
    modulation: jax.Array
    which: jax.Array | None
    text: jax.Array
    image: jax.Array | None

    def of_tokens(self, of: Callable[[int], jax.Array]) -> jax.Array:
        """`of(q)` [B, N, D] of the timestep q that each token has.

        A token's result is selected, not its modulation, which would be written out for all tokens before its use.
        """
        chosen = of(0)
        if self.which is not None:
            for q in range(1, self.time.shape[1]):
                chosen = jnp.where(self.which[..., None] == q, of(q), chosen)
        return chosen


def _modulated(normed_BND: jax.Array, table_BQSD: jax.Array, shift: int, scale: int, signal: Signal) -> jax.Array:
    """Each token scaled and shifted by these rows of its timestep's table."""
    return signal.of_tokens(lambda q: normed_BND * (1 + table_BQSD[:, q, scale, None]) + table_BQSD[:, q, shift, None])


class HeadProjection(nnx.Module):
    """Projection to heads, RMS-normalised over all of them together (queries and keys)."""

    def __init__(self, inputs: int, config: WanConfig, rngs: nnx.Rngs):
        self.linear = LinearGeneral(inputs, (config.heads, config.head_width), rngs=rngs)
        self.norm = nnx.Param(jnp.ones((config.heads, config.head_width)))
        self.epsilon = config.epsilon
        self.present = config.heads * config.head_width / config.width if config.norm_counts_pruned else 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        projected = self.linear(x)
        normed = rms_norm(projected, self.norm[...], self.epsilon, axes=(-2, -1), present=self.present)
        return normed.astype(projected.dtype)


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys: of the tokens themselves, or of a context."""

    def __init__(self, config: WanConfig, image: bool, rngs: nnx.Rngs):
        width, heads = config.width, (config.heads, config.head_width)
        self.q = HeadProjection(width, config, rngs)
        self.k = HeadProjection(width, config, rngs)
        self.v = LinearGeneral(width, heads, rngs=rngs)
        self.o = LinearGeneral(heads, width, axis=(-2, -1), rngs=rngs)
        self.image_k: Any = nnx.data(HeadProjection(width, config, rngs) if image else None)
        self.image_v: Any = nnx.data(LinearGeneral(width, heads, rngs=rngs) if image else None)

    def qkv(self, x_BND: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries and keys, and values, of the tokens given: [B, N, H, K] each."""
        return rotate(self.q(x_BND), rope), rotate(self.k(x_BND), rope), self.v(x_BND)

    def out(self, y_BNHK: jax.Array) -> jax.Array:
        """Output projection, [B, N, D]."""
        return self.o(y_BNHK)

    def cross(self, x_BND: jax.Array, text_BLD: jax.Array, image_BID: jax.Array | None) -> tuple[jax.Array, ...]:
        """Values attended in the text, and in the image where there is one: [B, N, H, K] each, to be added up."""
        q = self.q(x_BND)
        text = attend(q, self.k(text_BLD), self.v(text_BLD))
        if image_BID is None:
            return (text,)
        return text, attend(q, self.image_k(image_BID), self.image_v(image_BID))


def gelu_exact(x: jax.Array) -> jax.Array:
    """GELU by the error function."""
    return jax.nn.gelu(x, approximate=False)


class WanBlock(nnx.Module):
    """Self-attention, cross-attention and MLP on one residual stream; the first and last are modulated by time."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        self.attn1 = Attention(config, image=False, rngs=rngs)
        self.cross_norm = LayerNorm(config.width, config.epsilon)
        self.attn2 = Attention(config, image=config.image_width is not None, rngs=rngs)
        self.mlp = Mlp(config.width, config.mlp_width, config.width, rngs)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, config.width)) / config.width**0.5)
        self.epsilon = config.epsilon

    def __call__(self, x_BND: jax.Array, signal: Signal, place: Place, strategy, index: jax.Array, cache, aux):
        table = self.modulation[...].astype(jnp.float32) + signal.modulation
        dtype = x_BND.dtype

        def modulated(x, shift, scale):
            return _modulated(layer_norm(x, epsilon=self.epsilon), table, shift, scale, signal).astype(dtype)

        def added(x, update, gate):
            update = update.astype(jnp.float32)
            return signal.of_tokens(lambda q: x + update * table[:, q, gate, None]).astype(dtype)

        attended, cache = strategy(self.attn1, modulated(x_BND, 0, 1), place, index, cache, aux)
        x = added(x_BND, attended.tokens, 2)

        def crossed():
            heads = self.attn2.cross(self.cross_norm(x).astype(dtype), signal.text, signal.image)
            return heads, self.attn2.out(functools.reduce(jnp.add, heads)).astype(dtype)

        if isinstance(strategy, CrossWatcher):
            heads, update = crossed()
            cache = strategy.watch_cross(heads, place, index, cache, aux)
        else:
            update, cache = branch(strategy, "cross", lambda: crossed()[1], index, cache, aux)
        x = x + update
        update, cache = branch(strategy, "mlp", lambda: self.mlp(modulated(x, 3, 4)), index, cache, aux)
        return added(x, update, 5), cache


class ImageProjection(nnx.Module):
    """Image encoder states to the model's width: norm, MLP, norm."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        inputs = config.image_width
        assert inputs is not None
        self.norm1 = LayerNorm(inputs, 1e-5)
        self.mlp = Mlp(inputs, inputs, config.width, rngs, activation=gelu_exact)
        self.norm2 = LayerNorm(config.width, 1e-5)
        positions = config.image_positions
        self.positions = nnx.data(nnx.Param(jnp.zeros((positions, inputs))) if positions else None)

    def __call__(self, states_BIE: jax.Array) -> jax.Array:
        if self.positions is not None:
            # First- and last-frame models concatenate both images' tokens in one row.
            states_BIE = states_BIE.reshape(-1, 2 * states_BIE.shape[1], states_BIE.shape[2]) + self.positions[...]
        return self.norm2(self.mlp(self.norm1(states_BIE)))


class Wan(nnx.Module):
    """The Wan transformer: `signal`, `rope`, `embed`, `trunk`, `head`; run it with `network`."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        width = config.width
        cells = int(np.prod(config.patch))
        self.patch = Linear(config.in_channels * cells, width, rngs=rngs)
        self.time = Mlp(config.time_frequencies, width, width, rngs, activation=jax.nn.silu)
        self.time_out = Linear(width, 6 * width, rngs=rngs)
        self.text = Mlp(config.text_width, width, width, rngs)
        self.image: Any = nnx.data(ImageProjection(config, rngs) if config.image_width else None)
        self.blocks = stacked(lambda rngs: WanBlock(config, rngs), config.blocks, rngs)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, width)) / width**0.5)
        self.out = Linear(width, config.out_channels * cells, rngs=rngs)
        self.config = config

    def signal(self, t: Timesteps, conditioning: Conditioning) -> Signal:
        """Embeds the timesteps (0 to 1000), the text and the image."""
        values, which = t if isinstance(t, TokenTimesteps) else (t[:, None], None)
        time = self.time(sinusoids(values, self.config.time_frequencies))
        text = self.text(conditioning.text)
        modulation = self.time_out(jax.nn.silu(time.astype(text.dtype)))
        image = None if conditioning.image is None else self.image(conditioning.image).astype(text.dtype)
        modulation = modulation.astype(jnp.float32).reshape(*values.shape, 6, self.config.width)
        return Signal(time.astype(jnp.float32), modulation, which, text, image)

    def branch_shapes(self, x_BND: jax.ShapeDtypeStruct, signal: Signal) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a block's outputs: of its attention, and of its branches by name."""
        return dict.fromkeys(("attention", "cross", "mlp"), x_BND)

    @property
    def stacks(self) -> tuple[int, ...]:
        """Blocks of each stack."""
        return (self.config.blocks,)

    def rope(self, positions_BN3: jax.Array) -> Rope:
        """Rotation table of tokens at (t, y, x)."""
        return rope_table(merged_centres(positions_BN3, self.config.merged), self.config.rope_widths)

    def embed(self, rows_BNP: jax.Array) -> jax.Array:
        """Patch rows to tokens."""
        return self.patch(rows_BNP)

    def trunk(self, x_BND: jax.Array, signal: Signal, place: Place, call: NetworkCall, state=None, aux: Aux = Aux()):
        """Tokens through all blocks: (x [B, N, D], the attention strategy's state)."""
        return run_blocks(self.blocks, x_BND, signal, place, call, state, aux)

    def cache_signal(self, x_BND: jax.Array, signal: Signal, projected: bool = False) -> jax.Array:
        """What TeaCache compares from step to step: the embedding of the timestep [B, D], or, `projected`, the six
        vectors that all blocks are modulated by [B, 6·D]; of held tokens' timestep nothing."""
        return signal.modulation[:, 0].reshape(len(x_BND), -1) if projected else signal.time[:, 0]

    def head(self, x_BND: jax.Array, signal: Signal) -> jax.Array:
        """Tokens to velocity rows."""
        table = self.modulation[...].astype(jnp.float32) + signal.time[:, :, None]
        normed = layer_norm(x_BND, epsilon=self.config.epsilon)
        return self.out(_modulated(normed, table, 0, 1, signal).astype(x_BND.dtype))
