"""What the video autoencoders of Wan are made of: 2.1's levels are flat lists of these blocks, 2.2's have shortcuts.

Letters: B batch, T frames, Y X pixels, C channels, N pixels of a frame.

A module with memory is `module(x, cache) -> (x, cache)`, where `None` is the clip's start.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dit_jax.models.causal_conv import CausalConv, FrameConv, HalvingTimeConv
from dit_jax.ops.linear import Linear, precision_in

Fold = tuple[int, int]  # frames, and pixels along Y and X, that a level takes together

# Attention weights of a call above this many bytes are made one frame at a time.
_ATTENTION_BYTES = 64 * 2**20


class ChannelNorm(nnx.Module):
    """Every pixel's channels scaled to a root mean square of `scale`, in fp32."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))

    def __call__(self, x_BTYXC):
        x = x_BTYXC.astype(jnp.float32)
        # What is shorter than 1e-12 becomes zero. torch divides it by 1e-12, and its gradient with it, in every norm.
        square = jnp.sum(x * x, axis=-1, keepdims=True)
        inverse = lax.rsqrt(jnp.where(square > 1e-24, square, jnp.inf))
        return (x * inverse * (math.sqrt(x.shape[-1]) * self.scale[...].astype(jnp.float32))).astype(x_BTYXC.dtype)


class ResidualBlock(nnx.Module):
    """Twice norm, SiLU and 3×3×3 convolution, round a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(inputs)
        self.conv1 = CausalConv(inputs, outputs, (3, 3, 3), rngs=rngs)
        self.norm2 = ChannelNorm(outputs)
        self.conv2 = CausalConv(outputs, outputs, (3, 3, 3), rngs=rngs)
        widens = inputs != outputs
        self.shortcut = nnx.data(CausalConv(inputs, outputs, (1, 1, 1), rngs=rngs) if widens else None)

    def __call__(self, x, cache=None):
        cache1, cache2 = cache or (None, None)
        y, cache1 = self.conv1(jax.nn.silu(self.norm1(x)), cache1)
        y, cache2 = self.conv2(jax.nn.silu(self.norm2(y)), cache2)
        if self.shortcut is not None:
            x, _ = self.shortcut(x)
        return x + y, (cache1, cache2)


class FrameAttention(nnx.Module):
    """Single-head self-attention among the pixels of each frame."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(channels)
        self.qkv = Linear(channels, 3 * channels, rngs=rngs)
        self.out = Linear(channels, channels, rngs=rngs)

    def __call__(self, x_BTYXC, cache=None):
        batch, frames, height, width, channels = x_BTYXC.shape
        x_FNC = self.norm(x_BTYXC).reshape(batch * frames, height * width, channels)
        split = jnp.split(self.qkv(x_FNC), 3, axis=-1)
        if 4 * batch * frames * (height * width) ** 2 <= _ATTENTION_BYTES:
            y_FNC = _attend(*split)
        else:
            y_FNC = lax.map(jax.checkpoint(lambda frame: _attend(*frame)), tuple(split))
        return x_BTYXC + self.out(y_FNC).reshape(x_BTYXC.shape), ()


def _attend(q, k, v):
    """Softmax attention in fp32, [..., N, C]; normalised after the second product."""
    product = functools.partial(jnp.einsum, precision=precision_in(q.dtype), preferred_element_type=jnp.float32)
    scores = product("...nc,...mc->...nm", q, k) / math.sqrt(q.shape[-1])
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    y = product("...nm,...mc->...nc", weights.astype(v.dtype), v)
    return (y / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


class Downsample(nnx.Module):
    """Halves Y and X, and the frames where `over_time`."""

    def __init__(self, channels: int, over_time: bool, *, rngs: nnx.Rngs):
        self.conv = FrameConv(channels, channels, pads=((0, 1), (0, 1)), stride=2, rngs=rngs)
        self.time_conv = nnx.data(HalvingTimeConv(channels, rngs=rngs) if over_time else None)

    def __call__(self, x, cache=None):
        x = self.conv(x)
        return (x, ()) if self.time_conv is None else self.time_conv(x, cache)


class Upsample(nnx.Module):
    """Doubles Y and X; doubles the frames where `over_time`, save the clip's first.

    The first frame is not in the context of the convolution over time either: the second frame sees zeros before it.
    """

    def __init__(self, channels: int, outputs: int, over_time: bool, *, rngs: nnx.Rngs):
        self.conv = FrameConv(channels, outputs, rngs=rngs)
        self.time_conv = nnx.data(CausalConv(channels, 2 * channels, (3, 1, 1), rngs=rngs) if over_time else None)

    def __call__(self, x, cache=None):
        if self.time_conv is None:
            cache = ()
        elif cache is not None:
            x, cache = self._double(x, cache)
        else:
            context = self.time_conv.kernel.shape[0] - 1
            cache = jnp.zeros((x.shape[0], context, *x.shape[2:]), self.time_conv.kernel.dtype)
            if x.shape[1] > 1:
                rest, cache = self._double(x[:, 1:], cache)
                x = jnp.concatenate([x[:, :1].astype(rest.dtype), rest], axis=1)
        # "nearest-exact" interpolation by a factor of two repeats every pixel.
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)), cache

    def _double(self, x, cache):
        assert self.time_conv is not None
        batch, frames, height, width, channels = x.shape
        y, cache = self.time_conv(x, cache)
        y = y.reshape(batch, frames, height, width, 2, channels)
        return jnp.moveaxis(y, 4, 2).reshape(batch, 2 * frames, height, width, channels), cache


def chain(layers: Sequence[nnx.Module], x, caches):
    """Layers one after the other, each with its own cache."""
    after = []
    for layer, cache in zip(layers, caches or [None] * len(layers), strict=True):
        x, cache = layer(x, cache)
        after.append(cache)
    return x, tuple(after)


class MiddleBlock(nnx.Module):
    """Residual block, attention, residual block, at the latent resolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.before = ResidualBlock(channels, channels, rngs=rngs)
        self.attention = FrameAttention(channels, rngs=rngs)
        self.after = ResidualBlock(channels, channels, rngs=rngs)

    def __call__(self, x, cache=None):
        return chain([self.before, self.attention, self.after], x, cache)


class Head(nnx.Module):
    """Norm, SiLU and the last 3×3×3 convolution."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(inputs)
        self.conv = CausalConv(inputs, outputs, (3, 3, 3), rngs=rngs)

    def __call__(self, x, cache=None):
        return self.conv(jax.nn.silu(self.norm(x)), cache)


class ResidualDown(nnx.Module):
    """A level of Wan 2.2's encoder: layers beside a shortcut that means over what is folded into one pixel."""

    def __init__(self, inputs: int, outputs: int, blocks: int, fold: Fold | None, *, rngs: nnx.Rngs):
        layers: list[nnx.Module] = []
        for block in range(blocks):
            layers.append(ResidualBlock(outputs if block else inputs, outputs, rngs=rngs))
        if fold:
            layers.append(Downsample(outputs, fold[0] > 1, rngs=rngs))
        self.layers = nnx.List(layers)
        self.fold: Fold = fold or (1, 1)
        self.outputs = outputs

    def __call__(self, x, cache=None):
        y, after = chain(self.layers, x, cache)
        return y + _folded_mean(x, self.fold, self.outputs, starts=cache is None), after


class ResidualUp(nnx.Module):
    """A level of Wan 2.2's decoder: layers beside a shortcut (but for the last) that spreads channels over pixels."""

    def __init__(self, inputs: int, outputs: int, blocks: int, fold: Fold | None, *, rngs: nnx.Rngs):
        layers: list[nnx.Module] = []
        for block in range(blocks):
            layers.append(ResidualBlock(outputs if block else inputs, outputs, rngs=rngs))
        if fold:
            layers.append(Upsample(outputs, outputs, fold[0] > 1, rngs=rngs))
        self.layers = nnx.List(layers)
        self.fold = fold
        self.outputs = outputs

    def __call__(self, x, cache=None):
        y, after = chain(self.layers, x, cache)
        return (y if self.fold is None else y + _spread(x, self.fold, self.outputs, starts=cache is None)), after


def _folded_mean(x_BTYXC, fold: Fold, outputs: int, starts: bool):
    """`fold` frames and pixels in one, its channels the means of equal runs of theirs; at a clip's start the first
    frame is folded with zeros before it."""
    time, space = fold
    if starts and time > 1:
        x_BTYXC = jnp.pad(x_BTYXC, ((0, 0), (time - 1, 0), (0, 0), (0, 0), (0, 0)))
    folded = einops.rearrange(x_BTYXC, "b (t ft) (y fy) (x fx) c -> b t y x (c ft fy fx)", ft=time, fy=space, fx=space)
    return jnp.mean(folded.reshape(*folded.shape[:-1], outputs, -1), axis=-1)


def _spread(x_BTYXC, fold: Fold, outputs: int, starts: bool):
    """Each channel in as many of the pixels and frames of `fold` as there is room; at a clip's start the frames that
    would lie before the first are dropped."""
    time, space = fold
    copies = outputs * time * space**2 // x_BTYXC.shape[-1]
    spread = einops.rearrange(
        jnp.repeat(x_BTYXC, copies, axis=-1), "b t y x (c ft fy fx) -> b (t ft) (y fy) (x fx) c",
        c=outputs, ft=time, fy=space, fx=space,
    )  # fmt: skip
    return spread[:, time - 1 :] if starts else spread
