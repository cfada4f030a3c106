"""The FLUX.1 image diffusion transformer, dev and schnell (Black Forest Labs, 2024; a rectified-flow transformer as in
Esser et al., arXiv 2403.03206).

Shapes: B batch rows, N image tokens, L text tokens, D width, H heads, K head width, F MLP width, G blocks, P row
channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.models.network import Aux, Conditioning, Context, NetworkCall, Patch, Place, branch, run_blocks
from dit_jax.ops.linear import Linear, LinearGeneral, Mlp
from dit_jax.ops.norms import layer_norm, rms_norm
from dit_jax.ops.rope import Rope, merged_centres, rope_table, rotate
from dit_jax.ops.timestep import sinusoids
from dit_jax.parameters import stacked

GUIDANCE_SCALE = 1000.0  # the guidance embedding is told the scale times this


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Sizes of a FLUX transformer; `guidance` says whether it has a guidance embedding (dev has, schnell has not).

    `rope_widths` are the head channels rotated by t (always 0), y and x. `merged` is how many patches of the size that
    it was made for a token covers along y and along x (DDiT).
    """

    double_blocks: int = 19
    single_blocks: int = 38
    width: int = 3072
    heads: int = 24
    head_width: int = 128
    mlp_width: int = 12288
    in_channels: int = 16
    out_channels: int = 16
    text_width: int = 4096
    pooled_width: int = 768
    time_frequencies: int = 256
    guidance: bool = True
    rope_widths: tuple[int, int, int] = (16, 56, 56)
    patch: Patch = (1, 2, 2)
    merged: int = 1
    epsilon: float = 1e-6


FLUX_DEV = FluxConfig()
FLUX_SCHNELL = replace(FLUX_DEV, guidance=False)

PRESETS = {"flux.1-dev": FLUX_DEV, "flux.1-schnell": FLUX_SCHNELL}

# Logical axes of every parameter (dit_jax/sharding.py has the rules from these to mesh axes).
AXES = {
    "patch.kernel": (None, None),
    "text.kernel": (None, "embed"),
    "[tpg]*.up.kernel": (None, "mlp"),
    "[tpg]*.down.kernel": ("mlp", "embed"),
    "out.kernel": (None, None),
    "out_s*.kernel": ("embed", None),
    "[!ds]*.bias": (None,),
    "[ds]*.modulation.linear.kernel": ("blocks", "embed", "mlp"),
    "[ds]*.modulation.linear.bias": ("blocks", "mlp"),
    "[ds]*.attn.[qk].linear.kernel": ("blocks", "embed", "heads", None),
    "[ds]*.attn.[qk].linear.bias": ("blocks", "heads", None),
    "[ds]*.attn.[qk].norm": ("blocks", None),
    "[ds]*.attn.v.kernel": ("blocks", "embed", "heads", None),
    "[ds]*.attn.v.bias": ("blocks", "heads", None),
    "[ds]*.attn.o.kernel": ("blocks", "heads", None, "embed"),
    "double.*.attn.o.bias": ("blocks", None),
    "[ds]*.mlp.up.kernel": ("blocks", "embed", "mlp"),
    "[ds]*.mlp.up.bias": ("blocks", "mlp"),
    "[ds]*.mlp.down.kernel": ("blocks", "mlp", "embed"),
    "[ds]*.mlp.down.bias": ("blocks", None),
}


class Signal(NamedTuple):
    """What every block is told: activated embedding of time, guidance and pooled text [B, D]; text tokens [B, L, D]."""

    vector: jax.Array
    text: jax.Array


class HeadProjection(nnx.Module):
    """Projection to heads, each RMS-normalised over its own width (queries and keys)."""

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs):
        self.linear = LinearGeneral(config.width, (config.heads, config.head_width), rngs=rngs)
        self.norm = nnx.Param(jnp.ones(config.head_width))
        self.epsilon = config.epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        projected = self.linear(x)
        return rms_norm(projected, self.norm[...], self.epsilon).astype(projected.dtype)


class Attention(nnx.Module):
    """The projections of one stream's attention."""

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs, out_bias: bool = True):
        heads = (config.heads, config.head_width)
        self.q = HeadProjection(config, rngs)
        self.k = HeadProjection(config, rngs)
        self.v = LinearGeneral(config.width, heads, rngs=rngs)
        self.o = LinearGeneral(heads, config.width, axis=(-2, -1), use_bias=out_bias, rngs=rngs)

    def qkv(self, x_BND: jax.Array, rope: Rope | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of the tokens given, [B, N, H, K] each; rotated unless `rope` is None."""
        q, k, v = self.q(x_BND), self.k(x_BND), self.v(x_BND)
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

    def out(self, y_BNHK: jax.Array) -> jax.Array:
        """Output projection, [B, N, D]."""
        return self.o(y_BNHK)


class Modulation(nnx.Module):
    """`count` vectors [B, 1, D] in fp32 from the signal's vector."""

    def __init__(self, count: int, config: FluxConfig, rngs: nnx.Rngs):
        self.linear = Linear(config.width, count * config.width, rngs=rngs)
        self.count = count

    def __call__(self, vector_BD: jax.Array) -> list[jax.Array]:
        table = self.linear(vector_BD).astype(jnp.float32)[:, None]
        return jnp.split(table, self.count, axis=-1)


def _modulated(x: jax.Array, shift: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    return (layer_norm(x, epsilon=epsilon) * (1 + scale) + shift).astype(x.dtype)


def _gated(x: jax.Array, gate: jax.Array, update: jax.Array) -> jax.Array:
    return (x + gate * update.astype(jnp.float32)).astype(x.dtype)


class Stream(nnx.Module):
    """One of a double block's two streams: modulation, attention projections and MLP of its own."""

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs):
        self.modulation = Modulation(6, config, rngs)
        self.attn = Attention(config, rngs)
        self.mlp = Mlp(config.width, config.mlp_width, config.width, rngs)
        self.epsilon = config.epsilon

    def add(self, x: jax.Array, attended: jax.Array, table: list[jax.Array], run: Callable):
        """The residual stream after attention's output and the MLP, and the strategy's state; `run` is `branch` of the
        MLP, told what computes it."""
        gate1, shift2, scale2, gate2 = table
        x = _gated(x, gate1, attended)
        update, cache = run(lambda: self.mlp(_modulated(x, shift2, scale2, self.epsilon)))
        return _gated(x, gate2, update), cache


class DoubleBlock(nnx.Module):
    """Image and text tokens, each with weights of their own, in one joint attention."""

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs):
        self.image = Stream(config, rngs)
        self.text = Stream(config, rngs)
        self.epsilon = config.epsilon

    def __call__(self, tokens, signal: Signal, place: Place, strategy, index: jax.Array, cache, aux):
        x, text = tokens
        shift, scale, *image_table = self.image.modulation(signal.vector)
        text_shift, text_scale, *text_table = self.text.modulation(signal.vector)
        context = Context(*self.text.attn.qkv(_modulated(text, text_shift, text_scale, self.epsilon), None))
        normed = _modulated(x, shift, scale, self.epsilon)
        attended, cache = strategy(self.image.attn, normed, place._replace(context=context), index, cache, aux)

        def run(name, cache):
            return lambda compute: branch(strategy, name, compute, index, cache, aux)

        x, cache = self.image.add(x, attended.tokens, image_table, run("mlp", cache))
        projected = self.text.attn.out(attended.context)
        text, cache = self.text.add(text, projected, text_table, run("text_mlp", cache))
        return (x, text), cache


class SingleBlock(nnx.Module):
    """Image and text tokens with the same weights; attention and MLP side by side on one normalised input."""

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs):
        self.modulation = Modulation(3, config, rngs)
        # The bias of their joint output projection is the MLP's.
        self.attn = Attention(config, rngs, out_bias=False)
        self.mlp = Mlp(config.width, config.mlp_width, config.width, rngs)
        self.epsilon = config.epsilon

    def __call__(self, tokens, signal: Signal, place: Place, strategy, index: jax.Array, cache, aux):
        x, text = tokens
        shift, scale, gate = self.modulation(signal.vector)
        normed, normed_text = (_modulated(stream, shift, scale, self.epsilon) for stream in tokens)
        context = Context(*self.attn.qkv(normed_text, None))
        attended, cache = strategy(self.attn, normed, place._replace(context=context), index, cache, aux)
        update, cache = branch(strategy, "mlp", lambda: self.mlp(normed), index, cache, aux)
        x = _gated(x, gate, attended.tokens + update)
        update, cache = branch(strategy, "text_mlp", lambda: self.mlp(normed_text), index, cache, aux)
        return (x, _gated(text, gate, self.attn.out(attended.context) + update)), cache


class Flux(nnx.Module):
    """The FLUX transformer: `signal`, `rope`, `embed`, `trunk`, `head`; run it with `network`."""

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs):
        width, cells = config.width, int(np.prod(config.patch))
        self.patch = Linear(config.in_channels * cells, width, rngs=rngs)
        self.text = Linear(config.text_width, width, rngs=rngs)
        self.time = Mlp(config.time_frequencies, width, width, rngs, activation=jax.nn.silu)
        self.pooled = Mlp(config.pooled_width, width, width, rngs, activation=jax.nn.silu)
        guidance = Mlp(config.time_frequencies, width, width, rngs, activation=jax.nn.silu) if config.guidance else None
        self.guidance: Any = nnx.data(guidance)
        self.double = stacked(lambda rngs: DoubleBlock(config, rngs), config.double_blocks, rngs)
        self.single = stacked(lambda rngs: SingleBlock(config, rngs), config.single_blocks, rngs)
        self.out_scale = Linear(width, width, rngs=rngs)
        self.out_shift = Linear(width, width, rngs=rngs)
        self.out = Linear(width, config.out_channels * cells, rngs=rngs)
        self.config = config

    def signal(self, t_B: jax.Array, conditioning: Conditioning) -> Signal:
        """Embeds the timestep (0 to 1000), the pooled text, the guidance scale (if the model has one) and the text."""
        frequencies = self.config.time_frequencies
        assert conditioning.pooled is not None
        vector = self.time(sinusoids(t_B, frequencies))
        if self.guidance is not None:
            assert conditioning.guidance is not None
            vector = vector + self.guidance(sinusoids(conditioning.guidance * GUIDANCE_SCALE, frequencies))
        vector = vector + self.pooled(conditioning.pooled)
        return Signal(jax.nn.silu(vector), self.text(conditioning.text))

    def branch_shapes(self, x_BND: jax.ShapeDtypeStruct, signal: Signal) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a block's outputs: of its attention (`context`: the text's heads), and of its branches by name."""
        text = jax.ShapeDtypeStruct(signal.text.shape, x_BND.dtype)
        heads = (*text.shape[:2], self.config.heads, self.config.head_width)
        context = jax.ShapeDtypeStruct(heads, x_BND.dtype)
        return {"attention": x_BND, "context": context, "mlp": x_BND, "text_mlp": text}

    @property
    def stacks(self) -> tuple[int, ...]:
        """Blocks of each stack: double, single."""
        return self.config.double_blocks, self.config.single_blocks

    def rope(self, positions_BN3: jax.Array) -> Rope:
        """Rotation table of image tokens at (t, y, x); text stands at the origin and is not rotated."""
        return rope_table(merged_centres(positions_BN3, self.config.merged), self.config.rope_widths)

    def embed(self, rows_BNP: jax.Array) -> jax.Array:
        """Patch rows to tokens."""
        return self.patch(rows_BNP)

    def trunk(self, x_BND: jax.Array, signal: Signal, place: Place, call: NetworkCall, state=None, aux: Aux = Aux()):
        """Tokens through all blocks, double then single: (x [B, N, D], the attention strategy's state)."""
        tokens = (x_BND, signal.text)
        tokens, state = run_blocks(self.double, tokens, signal, place, call, state, aux)
        tokens, state = run_blocks(
            self.single, tokens, signal, place, call, state, aux, stack=1, first=self.config.double_blocks
        )
        return tokens[0], state

    def cache_signal(self, x_BND: jax.Array, signal: Signal, projected: bool = False) -> jax.Array:
        """What TeaCache compares from step to step: the modulated image tokens that block 0 attends [B, N, D]."""
        modulation = jax.tree.map(lambda leaf: leaf[0], self.double.image.modulation)
        shift, scale, *_ = modulation(signal.vector)
        return _modulated(x_BND, shift, scale, self.config.epsilon)

    def head(self, x_BND: jax.Array, signal: Signal) -> jax.Array:
        """Tokens to velocity rows."""
        scale, shift = (of(signal.vector).astype(jnp.float32)[:, None] for of in (self.out_scale, self.out_shift))
        return self.out(_modulated(x_BND, shift, scale, self.config.epsilon))
