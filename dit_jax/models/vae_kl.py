"""The image autoencoder of FLUX.1: 8×8 pixels to a latent of 16 channels (Rombach et al., arXiv 2112.10752).

Letters: B batch, T frames, Y X pixels or latent grid, C channels, F frames of all clips, N pixels of a frame.

The facts are those of `AutoencoderKL` in diffusers. Pictures are clips of one frame; in a longer clip each frame is
coded as if it stood alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dit_jax.config import UserError
from dit_jax.models.causal_conv import FrameConv
from dit_jax.models.tiles import Tiling, code_in_tiles
from dit_jax.ops.linear import Linear, products_in

# Small enough to be whole on every device.
AXES: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("*.scale", "*.bias"), (None,)),
    **dict.fromkeys(("*.shortcut.kernel", "*.attention.*.kernel", "*quant_conv.kernel"), (None,) * 2),
    **dict.fromkeys(("*.conv_in.kernel", "*.conv_out.kernel", "*.conv[12].kernel", "*.resample.kernel"), (None,) * 4),
}

# Attention weights of a call above this many bytes are made one column of queries at a time.
_ATTENTION_BYTES = 64 * 2**20
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Shapes of the autoencoder; the defaults are those of FLUX.1.

    `widths` are the channels of the levels from whole pixels to latents, `blocks` the residual blocks of a level in the
    encoder (the decoder's have one more), `groups` those of every norm.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    z_dim: int = 16
    in_channels: int = 3
    out_channels: int = 3
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    quant_conv: bool = False
    post_quant_conv: bool = False
    middle_attention: bool = True

    def __post_init__(self):
        odd = [width for width in self.widths if width % self.groups]
        if odd:
            raise UserError(
                f"the autoencoder has a level of {odd[0]} channels, expected a multiple of its {self.groups} norm "
                "groups; change widths or groups"
            )

    @property
    def time_factor(self) -> int:
        """Frames to a latent frame."""
        return 1

    @property
    def space_factor(self) -> int:
        """Pixels to a latent along Y and X."""
        return 2 ** (len(self.widths) - 1)


FLUX_VAE = AutoencoderKLConfig()
PRESETS = {"flux-vae": FLUX_VAE}


class GroupNorm(nnx.Module):
    """Group norm of each frame over Y, X and a group's channels (Wu and He, arXiv 1803.08494); returns fp32."""

    def __init__(self, channels: int, groups: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def __call__(self, x_BTYXC):
        x = x_BTYXC.astype(jnp.float32)
        centred = x - self._group_mean(x)
        inverse = lax.rsqrt(self._group_mean(jnp.square(centred)) + _EPSILON)
        return centred * (inverse * self.scale[...].astype(jnp.float32)) + self.bias[...].astype(jnp.float32)

    def _group_mean(self, x_BTYXC):
        """Every channel's mean over its group, [B, T, 1, 1, C]; pixels first, so that no large array is regrouped."""
        mean = jnp.mean(x_BTYXC, axis=(2, 3), keepdims=True)
        grouped = mean.reshape(*mean.shape[:-1], self.groups, -1)
        return jnp.broadcast_to(jnp.mean(grouped, axis=-1, keepdims=True), grouped.shape).reshape(mean.shape)


class ResidualBlock(nnx.Module):
    """Twice norm, SiLU and 3×3 convolution, round a shortcut."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, groups)
        self.conv1 = FrameConv(inputs, outputs, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups)
        self.conv2 = FrameConv(outputs, outputs, rngs=rngs)
        self.shortcut = nnx.data(Linear(inputs, outputs, rngs=rngs) if inputs != outputs else None)

    def __call__(self, x):
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return (x if self.shortcut is None else self.shortcut(x)) + y


class FrameAttention(nnx.Module):
    """Single-head self-attention among the pixels of each frame."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, groups)
        self.q = Linear(channels, channels, rngs=rngs)
        self.k = Linear(channels, channels, rngs=rngs)
        self.v = Linear(channels, channels, rngs=rngs)
        self.out = Linear(channels, channels, rngs=rngs)

    def __call__(self, x_BTYXC):
        batch, frames, height, width, channels = x_BTYXC.shape
        normed = self.norm(x_BTYXC)
        k_FNC, v_FNC = (part(normed).reshape(batch * frames, height * width, channels) for part in (self.k, self.v))
        q = self.q(normed).reshape(batch * frames, height, width, channels)
        if 4 * batch * frames * (height * width) ** 2 <= _ATTENTION_BYTES:
            y = _attend(q.reshape(k_FNC.shape), k_FNC, v_FNC)
        else:
            # Columns, not rows: where devices split a picture along Y, every one of them has its part of each.
            columns = lax.map(jax.checkpoint(lambda q_FYC: _attend(q_FYC, k_FNC, v_FNC)), jnp.moveaxis(q, 2, 0))
            y = jnp.moveaxis(columns, 0, 2)
        return x_BTYXC + self.out(y.reshape(x_BTYXC.shape))


def _attend(q_FNC, k_FMC, v_FMC):
    """Softmax attention of one head, in fp32."""
    q, k, v = (x[:, :, None] for x in (q_FNC, k_FMC, v_FMC))
    with products_in(q.dtype):
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")[:, :, 0]


class MiddleBlock(nnx.Module):
    """Residual block, attention, residual block, at the latent resolution."""

    def __init__(self, channels: int, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        self.before = ResidualBlock(channels, channels, config.groups, rngs=rngs)
        attention = FrameAttention(channels, config.groups, rngs=rngs) if config.middle_attention else None
        self.attention = nnx.data(attention)
        self.after = ResidualBlock(channels, channels, config.groups, rngs=rngs)

    def __call__(self, x):
        x = self.before(x)
        return self.after(x if self.attention is None else self.attention(x))


class UpsampledConv(FrameConv):
    """3×3 convolution of every frame after each of its pixels became 2×2."""

    def __call__(self, x_BTYXC):
        return super().__call__(jnp.repeat(jnp.repeat(x_BTYXC, 2, axis=2), 2, axis=3))


class Level(nnx.Module):
    """Residual blocks of one resolution, and the convolution that leads to the next."""

    def __init__(self, widths: Sequence[int], groups: int, resample: FrameConv | None, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([ResidualBlock(*pair, groups, rngs=rngs) for pair in pairwise(widths)])
        self.resample = nnx.data(resample)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Encoder(nnx.Module):
    """Pictures to the moments before `quant_conv`."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        widths = [config.widths[0], *config.widths]
        self.conv_in = FrameConv(config.in_channels, widths[0], rngs=rngs)
        levels = []
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            halves = index < len(config.widths) - 1
            down = FrameConv(outputs, outputs, pads=((0, 1), (0, 1)), stride=2, rngs=rngs) if halves else None
            levels.append(Level([inputs, *[outputs] * config.blocks], config.groups, down, rngs=rngs))
        self.levels = nnx.List(levels)
        self.middle = MiddleBlock(widths[-1], config, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], config.groups)
        self.conv_out = FrameConv(widths[-1], 2 * config.z_dim, rngs=rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """Latents after `post_quant_conv` to pictures; its levels are those of the encoder in reverse."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        widths = [config.widths[-1], *reversed(config.widths)]
        self.conv_in = FrameConv(config.z_dim, widths[0], rngs=rngs)
        self.middle = MiddleBlock(widths[0], config, rngs=rngs)
        levels = []
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            doubles = index < len(config.widths) - 1
            up = UpsampledConv(outputs, outputs, rngs=rngs) if doubles else None
            levels.append(Level([inputs, *[outputs] * (config.blocks + 1)], config.groups, up, rngs=rngs))
        self.levels = nnx.List(levels)
        self.norm_out = GroupNorm(widths[-1], config.groups)
        self.conv_out = FrameConv(widths[-1], config.out_channels, rngs=rngs)

    def __call__(self, z):
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Autoencoder of pictures in [-1, 1], [B, 1, Y, X, 3], and latents, [B, 1, Y/8, X/8, 16].

    The methods are those of `WanVAE`; `chunk` is taken for its sake, and changes nothing.
    """

    decode_tile = 128

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        moments, latents = 2 * config.z_dim, config.z_dim
        self.quant_conv = nnx.data(Linear(moments, moments, rngs=rngs) if config.quant_conv else None)
        self.post_quant_conv = nnx.data(Linear(latents, latents, rngs=rngs) if config.post_quant_conv else None)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, video_BTYXC, chunk: int | None = None):
        """Mean and log-variance of the latents, not normalised, each [B, T, Y/8, X/8, 16]."""
        self._check_video(video_BTYXC.shape)
        mean, logvar = jnp.split(self._moments(video_BTYXC), 2, axis=-1)
        return mean, logvar

    def decode(self, latents_BTYXC, chunk: int | None = None, clip: bool = True):
        """Pictures [B, T, 8Y, 8X, 3] of latents [B, T, Y, X, 16] that are not normalised.

        `clip` bounds them to [-1, 1]; training leaves it off, for a clipped pixel has no gradient.
        """
        video = self._video(latents_BTYXC)
        return jnp.clip(video, -1, 1) if clip else video

    def encode_tiled(self, video_BTYXC, tile: int = 128, overlap: int = 32, chunk: int | None = None):
        """`encode` in blended tiles of `tile`×`tile` latents; the numbers are those of diffusers' `enable_tiling`."""
        self._check_video(video_BTYXC.shape)
        tiling = Tiling(size=tile, overlap=overlap, into=self.config.space_factor, out=1)
        mean, logvar = jnp.split(code_in_tiles(self._moments, video_BTYXC, tiling), 2, axis=-1)
        return mean, logvar

    def decode_tiled(
        self, latents_BTYXC, tile: int | None = None, overlap: int | None = None, chunk: int | None = None
    ):
        """`decode` in blended tiles of `tile`×`tile` latents; the numbers are those of diffusers' `enable_tiling`.

        By default tiles are diffusers', of `decode_tile` latents; they share a quarter of them.
        """
        tile = self.decode_tile if tile is None else tile
        overlap = tile // 4 if overlap is None else overlap
        tiling = Tiling(size=tile, overlap=overlap, into=1, out=self.config.space_factor)
        return jnp.clip(code_in_tiles(self._video, latents_BTYXC, tiling), -1, 1)

    def normalise(self, latents_BTYXC):
        """Latents as the diffusion model sees them: (z - shift) * scale."""
        shifted = latents_BTYXC.astype(jnp.float32) - self.config.shift_factor
        return (shifted * self.config.scaling_factor).astype(latents_BTYXC.dtype)

    def denormalise(self, latents_BTYXC):
        """The inverse of `normalise`: what `decode` takes."""
        scaled = latents_BTYXC.astype(jnp.float32) / self.config.scaling_factor
        return (scaled + self.config.shift_factor).astype(latents_BTYXC.dtype)

    def _moments(self, video_BTYXC):
        moments = self.encoder(video_BTYXC)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _video(self, latents_BTYXC):
        return self.decoder(latents_BTYXC if self.post_quant_conv is None else self.post_quant_conv(latents_BTYXC))

    def _check_video(self, shape: Sequence[int]) -> None:
        height, width = shape[2:4]
        space = self.config.space_factor
        if height % space or width % space:
            raise UserError(
                f"expected a height and width divisible by {space}, found {height}×{width}; crop or pad the picture"
            )
