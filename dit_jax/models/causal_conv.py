"""Causal convolutions over the frames of a video, whole or a few frames at a time.

Letters: B batch, T frames, Y X pixels, C channels, O output channels, M rows of pixels.

Every convolution over time is `conv(x, cache) -> (y, cache)`: the cache holds the last frames of the input that the next call needs,
and `None` stands for the start of a clip, where the frames before the first are zeros.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]

_SAME: Pads = ((1, 1), (1, 1))


def causal_conv3d(x_BTYXC, kernel):
    """A 3-D convolution that pads space but not time: [B, T + kt - 1, Y, X, C] with [kt, ky, kx, C, O] -> [B, T, Y, X, O].

    Space is padded to keep its size (odd kernels). The body follows the platform.
    """
    kt, ky, kx, _, outputs = kernel.shape
    if ky == kx == 1:
        return _time_conv(x_BTYXC, kernel[:, 0, 0], 1)
    pads = ((ky // 2, ky // 2), (kx // 2, kx // 2))
    if kt == 1:
        return conv2d(x_BTYXC, kernel[0], pads)
    if _platform() != "cpu":
        return lax.conv_general_dilated(
            x_BTYXC, kernel, (1, 1, 1), ((0, 0), *pads), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
    # XLA's 3-D convolution on a CPU takes two to four times as long as these 2-D ones.
    frames = x_BTYXC.shape[1] - kt + 1
    taps = (conv2d(x_BTYXC[:, t : t + frames], kernel[t], pads) for t in range(kt))
    return sum(taps)


def conv2d(x_BTYXC, kernel, pads: Pads = _SAME, stride: int = 1):
    """A 2-D convolution of every frame alone: kernel [ky, kx, C, O]."""
    batch, frames, *image = x_BTYXC.shape
    y = lax.conv_general_dilated(
        x_BTYXC.reshape(batch * frames, *image),
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(batch, frames, *y.shape[1:])


def _time_conv(x_BTYXC, kernel, stride: int):
    """Over time alone, no padding: kernel [kt, C, O], every `stride`-th frame kept."""
    kt = kernel.shape[0]
    span = x_BTYXC.shape[1] - kt + 1
    return sum(x_BTYXC[:, t : t + span : stride] @ kernel[t] for t in range(kt))


def _platform() -> Literal["cpu", "tpu", "gpu"]:
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device if not mesh.empty else None
    return device.platform if device is not None else jax.default_backend()


class CausalConv(nnx.Module):
    """Convolution [kt, ky, kx] over time and space; frames before the clip are zeros, space keeps its size."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int, int], *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.nn.initializers.lecun_normal()(rngs.params(), (*size, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x_BTYXC, cache=None):
        """[B, T, Y, X, C] -> [B, T, Y, X, O] and the last kt - 1 input frames."""
        kernel = self.kernel[...]
        x_BTYXC = x_BTYXC.astype(kernel.dtype)
        context = kernel.shape[0] - 1
        if context:
            if cache is None:
                cache = jnp.zeros((x_BTYXC.shape[0], context, *x_BTYXC.shape[2:]), x_BTYXC.dtype)
            x_BTYXC = jnp.concatenate([cache, x_BTYXC], axis=1)
            cache = x_BTYXC[:, -context:]
        return causal_conv3d(x_BTYXC, kernel) + self.bias[...], cache


class StridedTimeConv(nnx.Module):
    """Halves the frames: kernel 3 over [last frame of the call before, new frames], stride 2. The clip's first frame passes through."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.nn.initializers.lecun_normal()(rngs.params(), (3, 1, 1, channels, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x_BTYXC, cache=None):
        """At the start [B, 1 + 2k, Y, X, C] -> [B, 1 + k, Y, X, C], later [B, 2k, ...] -> [B, k, ...]; and the last frame."""
        kernel = self.kernel[...]
        x_BTYXC = x_BTYXC.astype(kernel.dtype)
        last = x_BTYXC[:, -1:]
        if cache is not None:
            x_BTYXC = jnp.concatenate([cache, x_BTYXC], axis=1)
        elif x_BTYXC.shape[1] == 1:
            return x_BTYXC, last
        y = _time_conv(x_BTYXC, kernel[:, 0, 0], 2) + self.bias[...]
        return (y if cache is not None else jnp.concatenate([x_BTYXC[:, :1], y], axis=1)), last


class FrameConv(nnx.Module):
    """3×3 convolution of every frame alone."""

    def __init__(self, inputs: int, outputs: int, *, pads: Pads = _SAME, stride: int = 1, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.nn.initializers.lecun_normal()(rngs.params(), (3, 3, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.pads = pads
        self.stride = stride

    def __call__(self, x_BTYXC):
        kernel = self.kernel[...]
        return conv2d(x_BTYXC.astype(kernel.dtype), kernel, self.pads, self.stride) + self.bias[...]
