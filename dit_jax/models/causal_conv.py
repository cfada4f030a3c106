"""Causal convolutions over the frames of a video, whole or a few frames at a time.

Letters: B batch, T frames, Y X pixels, C channels, O output channels.

Every convolution over time is `conv(x, cache) -> (y, cache)`: the cache holds the last frames of the input, which the
next call needs, and `None` stands for the start of a clip, where the frames before the first are zeros.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dit_jax.ops.mesh import platform

Pads = tuple[tuple[int, int], tuple[int, int]]

_SAME: Pads = ((1, 1), (1, 1))
_KERNEL_INIT = jax.nn.initializers.lecun_normal()


def causal_conv3d(x_BTYXC, kernel, pads: Pads = _SAME, stride: int = 1):
    """A convolution that pads space but not time; the body follows the platform of the mesh.

    [B, T + kt - 1, Y, X, C] with a kernel [kt, ky, kx, C, O] -> [B, T, Y', X', O]; `pads` and `stride` for Y and X.
    """
    if platform() == "cpu":
        return _sum_of_frame_convs(x_BTYXC, kernel, pads, stride)
    return lax.conv_general_dilated(
        x_BTYXC, kernel, (1, stride, stride), ((0, 0), *pads), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


# On a CPU, XLA's 3-D convolution takes two to four times as long as one 2-D convolution a time tap, and XLA's gradient
# for the kernel up to twice as long as a frame's patches times the gradients of all the outputs that saw the frame.
@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sum_of_frame_convs(x_BTYXC, kernel, pads: Pads, stride: int):
    frames = x_BTYXC.shape[1] - kernel.shape[0] + 1
    return sum(_frame_conv(x_BTYXC[:, t : t + frames], tap, pads, stride) for t, tap in enumerate(kernel))


def _frame_conv(x_BTYXC, kernel, pads: Pads, stride: int):
    batch, frames, *image = x_BTYXC.shape
    x = x_BTYXC.reshape(batch * frames, *image)
    y = lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y.reshape(batch, frames, *y.shape[1:])


def _forward(x_BTYXC, kernel, pads: Pads, stride: int):
    return _sum_of_frame_convs(x_BTYXC, kernel, pads, stride), (x_BTYXC, kernel)


def _backward(pads: Pads, stride: int, saved, dy):
    x_BTYXC, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _sum_of_frame_convs.fun(x, kernel, pads, stride), x_BTYXC)(dy)
    return dx, _kernel_gradient(x_BTYXC, dy, kernel, pads, stride)


def _kernel_gradient(x_BTYXC, dy_BTYXO, kernel, pads: Pads, stride: int):
    """Summed over one frame at a time, so that its patches stay in the processor's cache; in fp32."""
    kt, ky, kx, channels, outputs = kernel.shape
    batch, frames, *_ = x_BTYXC.shape
    height, width = dy_BTYXO.shape[2:4]
    x = jnp.pad(x_BTYXC, ((0, 0), (0, 0), *pads, (0, 0)))
    dy = jnp.pad(dy_BTYXO, ((0, 0), (kt - 1, kt - 1), (0, 0), (0, 0), (0, 0)))

    def add_frame(total, index):
        b, t = index // frames, index % frames
        image = lax.dynamic_slice(x, (b, t, 0, 0, 0), (1, 1, *x.shape[2:]))[0, 0]
        shifts = [
            image[y : y + stride * (height - 1) + 1 : stride, x : x + stride * (width - 1) + 1 : stride]
            for y in range(ky)
            for x in range(kx)
        ]
        patches = jnp.concatenate(shifts, axis=-1).reshape(height * width, -1)
        # Tap k of output frame t - k saw this frame; the padding puts it at t + kt - 1 - k.
        seen_by = lax.dynamic_slice(dy, (b, t, 0, 0, 0), (1, kt, *dy.shape[2:]))[0]
        gradients = jnp.concatenate([seen_by[kt - 1 - k] for k in range(kt)], axis=-1).reshape(height * width, -1)
        return total + jnp.dot(patches.T, gradients, preferred_element_type=jnp.float32), None

    total, _ = lax.scan(add_frame, jnp.zeros((ky * kx * channels, kt * outputs)), jnp.arange(batch * frames))
    return jnp.moveaxis(total.reshape(ky, kx, channels, kt, outputs), 3, 0).astype(kernel.dtype)


_sum_of_frame_convs.defvjp(_forward, _backward)


def _mix_frames(x_BTYXC, kernel, stride: int = 1):
    """A kernel of 1×1 pixels, [kt, 1, 1, C, O]: a product a time tap, every `stride`-th frame kept, no padding."""
    taps = kernel[:, 0, 0]
    span = x_BTYXC.shape[1] - len(taps) + 1
    return sum(x_BTYXC[:, t : t + span : stride] @ tap for t, tap in enumerate(taps))


class CausalConv(nnx.Module):
    """Convolution [kt, ky, kx] over time and space; frames before the clip are zeros, Y and X keep their size."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int, int], *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_KERNEL_INIT(rngs.params(), (*size, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x_BTYXC, cache=None):
        """[B, T, Y, X, C] -> [B, T, Y, X, O], and the last kt - 1 input frames."""
        kernel = self.kernel[...]
        x = x_BTYXC.astype(kernel.dtype)
        kt, ky, kx = kernel.shape[:3]
        lone_first = cache is None and x.shape[1] == 1
        if kt > 1:
            if cache is None:
                cache = jnp.zeros((x.shape[0], kt - 1, *x.shape[2:]), x.dtype)
            x = jnp.concatenate([cache, x], axis=1)
            cache = x[:, 1 - kt :]
            if lone_first:
                # Every tap but the last sees zeros: an image takes a third of the time.
                x, kernel = x[:, -1:], kernel[-1:]
        conv = partial(causal_conv3d, pads=((ky // 2, ky // 2), (kx // 2, kx // 2))) if ky * kx > 1 else _mix_frames
        return conv(x, kernel) + self.bias[...], cache


class HalvingTimeConv(nnx.Module):
    """Halves the frames: a kernel of 3 over the last frame of the call before and the new ones, stride 2.

    The first frame of a clip passes through.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_KERNEL_INIT(rngs.params(), (3, 1, 1, channels, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x_BTYXC, cache=None):
        """1 + 2k frames of [B, T, Y, X, C] to 1 + k at the start, 2k to k thereafter; and the last input frame."""
        kernel = self.kernel[...]
        x = x_BTYXC.astype(kernel.dtype)
        last = x[:, -1:]
        if cache is not None:
            x = jnp.concatenate([cache, x], axis=1)
        elif x.shape[1] == 1:
            return x, last
        y = _mix_frames(x, kernel, stride=2) + self.bias[...]
        return (jnp.concatenate([x[:, :1], y], axis=1) if cache is None else y), last


class FrameConv(nnx.Module):
    """3×3 convolution of every frame alone."""

    def __init__(self, inputs: int, outputs: int, *, pads: Pads = _SAME, stride: int = 1, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_KERNEL_INIT(rngs.params(), (3, 3, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.pads = pads
        self.stride = stride

    def __call__(self, x_BTYXC):
        kernel = self.kernel[...]
        return causal_conv3d(x_BTYXC.astype(kernel.dtype), kernel[None], self.pads, self.stride) + self.bias[...]
