"""The video autoencoder of Wan 2.1: causal in time, 4 frames and 8×8 pixels to a latent of 16 channels.

Letters: B batch, T frames, Y X pixels or latent grid, C channels, N pixels of a frame.

The facts are those of `AutoencoderKLWan` in diffusers (the non-residual form) and of Wan-Video/Wan2.1. The first frame
stands alone: it is never resampled in time, and a clip has 1 + 4k frames. A module with memory is
`module(x, cache) -> (x, cache)`, where `None` is the clip's start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dit_jax.config import UserError
from dit_jax.models.causal_conv import CausalConv, FrameConv, HalvingTimeConv
from dit_jax.models.tiles import Tiling, code_in_tiles

# Small enough to be whole on every device.
AXES: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("*.scale", "*.bias"), (None,)),
    **dict.fromkeys(("*.qkv.kernel", "*.out.kernel"), (None,) * 2),
    **dict.fromkeys(("encoder.down.*.conv.kernel", "decoder.up.*.conv.kernel"), (None,) * 4),
    **dict.fromkeys(("*.conv_in.kernel", "*.conv[12].kernel", "*.head.conv.kernel", "*quant_conv.kernel"), (None,) * 5),
    **dict.fromkeys(("*.shortcut.kernel", "*.time_conv.kernel"), (None,) * 5),
}

# Attention weights of a call above this many bytes are made one frame at a time.
_ATTENTION_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
    """Shapes of the autoencoder; the defaults are the published Wan 2.1 VAE.

    `attn_scales` adds attention to the encoder's blocks at those scales (1, 1/2, ...), not to the decoder's, as in
    diffusers; `decoder_base_dim` defaults to `base_dim`.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    in_channels: int = 3
    out_channels: int = 3
    patch: int = 1
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )

    def __post_init__(self):
        for name in ("latents_mean", "latents_std"):
            count = len(getattr(self, name))
            if count != self.z_dim:
                raise UserError(f"{name} has {count} values, expected z_dim = {self.z_dim}; give one per channel")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise UserError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries, expected {len(self.dim_mult) - 1}: "
                "give one between each two of dim_mult"
            )

    @property
    def time_factor(self) -> int:
        """Frames to a latent frame."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def space_factor(self) -> int:
        """Pixels to a latent along Y and X."""
        return self.patch * 2 ** len(self.temporal_downsample)


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
        self.qkv = nnx.Linear(channels, 3 * channels, rngs=rngs)
        self.out = nnx.Linear(channels, channels, rngs=rngs)

    def __call__(self, x_BTYXC, cache=None):
        batch, frames, height, width, channels = x_BTYXC.shape
        x_FNC = self.norm(x_BTYXC).reshape(batch * frames, height * width, channels)
        qkv = self.qkv(x_FNC.astype(self.qkv.kernel.dtype))
        split = jnp.split(qkv, 3, axis=-1)
        if 4 * batch * frames * (height * width) ** 2 <= _ATTENTION_BYTES:
            y_FNC = _attend(*split)
        else:
            y_FNC = lax.map(jax.checkpoint(lambda frame: _attend(*frame)), tuple(split))
        return x_BTYXC + self.out(y_FNC).reshape(x_BTYXC.shape), ()


def _attend(q, k, v):
    """Softmax attention in fp32, [..., N, C]; normalised after the second product."""
    scores = jnp.einsum("...nc,...mc->...nm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    y = jnp.einsum("...nm,...mc->...nc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
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
    """Doubles Y and X and halves the channels; doubles the frames where `over_time`, save the clip's first.

    The first frame is not in the context of the convolution over time either: the second frame sees zeros before it.
    """

    def __init__(self, channels: int, over_time: bool, *, rngs: nnx.Rngs):
        self.conv = FrameConv(channels, channels // 2, rngs=rngs)
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


def _chain(layers: Sequence[nnx.Module], x, caches):
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
        return _chain([self.before, self.attention, self.after], x, cache)


class Head(nnx.Module):
    """Norm, SiLU and the last 3×3×3 convolution."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(inputs)
        self.conv = CausalConv(inputs, outputs, (3, 3, 3), rngs=rngs)

    def __call__(self, x, cache=None):
        return self.conv(jax.nn.silu(self.norm(x)), cache)


class Encoder(nnx.Module):
    """Video to the moments before `quant_conv`."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv(config.in_channels, widths[0], (3, 3, 3), rngs=rngs)
        down: list[nnx.Module] = []
        for level, (inputs, outputs) in enumerate(pairwise(widths)):
            for block in range(config.num_res_blocks):
                down.append(ResidualBlock(outputs if block else inputs, outputs, rngs=rngs))
                if 0.5**level in config.attn_scales:
                    down.append(FrameAttention(outputs, rngs=rngs))
            if level < len(config.temporal_downsample):
                down.append(Downsample(outputs, config.temporal_downsample[level], rngs=rngs))
        self.down = nnx.List(down)
        self.middle = MiddleBlock(widths[-1], rngs=rngs)
        self.head = Head(widths[-1], 2 * config.z_dim, rngs=rngs)

    def __call__(self, x, caches=None):
        return _chain([self.conv_in, *self.down, self.middle, self.head], x, caches)


class Decoder(nnx.Module):
    """Latents after `post_quant_conv` to video. No attention but in the middle block."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        base = config.decoder_base_dim or config.base_dim
        widths = [base * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        self.conv_in = CausalConv(config.z_dim, widths[0], (3, 3, 3), rngs=rngs)
        self.middle = MiddleBlock(widths[0], rngs=rngs)
        over_time = tuple(reversed(config.temporal_downsample))
        up: list[nnx.Module] = []
        for level, (inputs, outputs) in enumerate(pairwise(widths)):
            inputs = inputs // 2 if level else inputs  # the level before halved them
            for block in range(config.num_res_blocks + 1):
                up.append(ResidualBlock(outputs if block else inputs, outputs, rngs=rngs))
            if level < len(over_time):
                up.append(Upsample(outputs, over_time[level], rngs=rngs))
        self.up = nnx.List(up)
        self.head = Head(widths[-1], config.out_channels, rngs=rngs)

    def __call__(self, z, caches=None):
        return _chain([self.conv_in, self.middle, *self.up, self.head], z, caches)


class WanVAE(nnx.Module):
    """Autoencoder of videos in [-1, 1], [B, 1 + 4k, Y, X, 3], and latents, [B, 1 + k, Y/8, X/8, 16]."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = CausalConv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), rngs=rngs)
        self.post_quant_conv = CausalConv(config.z_dim, config.z_dim, (1, 1, 1), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, video_BTYXC, chunk: int | None = None):
        """Mean and log-variance of the latents, not normalised, each [B, 1 + k, Y/8, X/8, 16].

        `chunk` latent frames (of 4 video frames each) are made at a time after the first; None makes all at once.
        """
        self._check_video(video_BTYXC.shape)
        mean, logvar = jnp.split(self._moments(_fold(video_BTYXC, self.config.patch), chunk), 2, axis=-1)
        return mean, logvar

    def decode(self, latents_BTYXC, chunk: int | None = None, clip: bool = True):
        """Video [B, 1 + 4k, 8Y, 8X, 3] of latents [B, 1 + k, Y, X, 16] that are not normalised.

        `chunk` latent frames are decoded at a time after the first; None decodes all at once. `clip` bounds the video
        to [-1, 1] as the published pipelines do; training leaves it off, for a clipped pixel has no gradient.
        """
        video = _unfold(self._folded_video(latents_BTYXC, chunk), self.config.patch)
        return jnp.clip(video, -1, 1) if clip else video

    def encode_tiled(self, video_BTYXC, tile: int = 32, overlap: int = 8, chunk: int | None = 1):
        """`encode` in blended tiles of `tile`×`tile` latents; the numbers are those of diffusers' `enable_tiling`."""
        self._check_video(video_BTYXC.shape)
        patch = self.config.patch
        tiling = Tiling(size=tile, overlap=overlap, into=self.config.space_factor // patch, out=1)
        moments = code_in_tiles(lambda video: self._moments(video, chunk), _fold(video_BTYXC, patch), tiling)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, logvar

    def decode_tiled(self, latents_BTYXC, tile: int = 32, overlap: int = 8, chunk: int | None = 1):
        """`decode` in blended tiles of `tile`×`tile` latents; the numbers are those of diffusers' `enable_tiling`."""
        patch = self.config.patch
        tiling = Tiling(size=tile, overlap=overlap, into=1, out=self.config.space_factor // patch)
        video = code_in_tiles(lambda latents: self._folded_video(latents, chunk), latents_BTYXC, tiling)
        return jnp.clip(_unfold(video, patch), -1, 1)

    def _moments(self, folded_BTYXC, chunk: int | None):
        moments = _by_chunks(self.encoder, folded_BTYXC, chunk and chunk * self.config.time_factor)
        return self.quant_conv(moments)[0]

    def _folded_video(self, latents_BTYXC, chunk: int | None):
        return _by_chunks(self.decoder, self.post_quant_conv(latents_BTYXC)[0], chunk)

    def normalise(self, latents_BTYXC):
        """Latents as the diffusion model sees them: zero mean, unit variance per channel."""
        mean, std = self._statistics()
        return ((latents_BTYXC - mean) / std).astype(latents_BTYXC.dtype)

    def denormalise(self, latents_BTYXC):
        """The inverse of `normalise`: what `decode` takes."""
        mean, std = self._statistics()
        return (latents_BTYXC * std + mean).astype(latents_BTYXC.dtype)

    def _statistics(self):
        return jnp.asarray(self.config.latents_mean, jnp.float32), jnp.asarray(self.config.latents_std, jnp.float32)

    def _check_video(self, shape: Sequence[int]) -> None:
        _, frames, height, width, _ = shape
        time, space = self.config.time_factor, self.config.space_factor
        if (frames - 1) % time:
            raise UserError(f"expected 1 + {time}k frames, found {frames}; use {frames - (frames - 1) % time}")
        if height % space or width % space:
            raise UserError(
                f"expected a height and width divisible by {space}, found {height}×{width}; crop or pad the video"
            )


def _fold(video_BTYXC, patch: int):
    """Squares of `patch`×`patch` pixels to channels."""
    return einops.rearrange(video_BTYXC, "b t (y p) (x q) c -> b t y x (c q p)", p=patch, q=patch)


def _unfold(folded_BTYXC, patch: int):
    """The inverse of `_fold`."""
    return einops.rearrange(folded_BTYXC, "b t y x (c q p) -> b t (y p) (x q) c", p=patch, q=patch)


def _by_chunks(coder, x_BTYXC, chunk: int | None):
    """`coder` over all frames at once, or over the first and then `chunk` at a time (and the rest) with its caches."""
    if chunk is None:
        return coder(x_BTYXC)[0]
    first, caches = coder(x_BTYXC[:, :1])
    batch, frames, *image = x_BTYXC.shape
    steps = (frames - 1) // chunk
    parts = [first]
    if steps:
        chunks = x_BTYXC[:, 1 : 1 + steps * chunk].reshape(batch, steps, chunk, *image)

        def step(caches, x):
            y, caches = coder(x, caches)
            return caches, y

        caches, y = lax.scan(step, caches, jnp.moveaxis(chunks, 1, 0))
        y = jnp.moveaxis(y, 0, 1)
        parts.append(y.reshape(batch, -1, *y.shape[3:]))
    if 1 + steps * chunk < frames:
        parts.append(coder(x_BTYXC[:, 1 + steps * chunk :], caches)[0])
    return jnp.concatenate(parts, axis=1)
