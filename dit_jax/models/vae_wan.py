"""The video autoencoders of Wan, causal in time: 4 frames and 8×8 pixels to a latent of 16 channels (2.1), or 4 and
16×16 to one of 48 (2.2).

Letters: B batch, T frames, Y X pixels or latent grid, C channels, N pixels of a frame.

The facts are those of `AutoencoderKLWan` in diffusers and of Wan-Video/Wan2.1 and Wan2.2. The first frame stands alone:
it is never resampled in time, and a clip has 1 + 4k frames. A module with memory is `module(x, cache) -> (x, cache)`,
where `None` is the clip's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import einops
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dit_jax.config import UserError
from dit_jax.models.causal_conv import CausalConv
from dit_jax.models.tiles import Tiling, code_in_tiles
from dit_jax.models.vae_wan_blocks import (
    Downsample,
    Fold,
    FrameAttention,
    Head,
    MiddleBlock,
    ResidualBlock,
    ResidualDown,
    ResidualUp,
    Upsample,
    chain,
)

# Small enough to be whole on every device.
AXES: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("*.scale", "*.bias"), (None,)),
    **dict.fromkeys(("*.qkv.kernel", "*.out.kernel"), (None,) * 2),
    **dict.fromkeys(("encoder.down.*.conv.kernel", "decoder.up.*.conv.kernel"), (None,) * 4),
    **dict.fromkeys(("*.conv_in.kernel", "*.conv[12].kernel", "*.head.conv.kernel", "*quant_conv.kernel"), (None,) * 5),
    **dict.fromkeys(("*.shortcut.kernel", "*.time_conv.kernel"), (None,) * 5),
}


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
    """Shapes of the autoencoder; the defaults are the published Wan 2.1 VAE.

    `attn_scales` adds attention to the encoder's blocks at those scales (1, 1/2, ...), not to the decoder's, as in
    diffusers; `decoder_base_dim` defaults to `base_dim`; `residual` is the form of Wan 2.2, whose levels have shortcuts
    and no attention; `patch`×`patch` pixels are folded into `in_channels`.
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
    residual: bool = False
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
        if self.residual and self.attn_scales:
            raise UserError(f"attn_scales are {self.attn_scales}, expected none in a residual VAE; leave them out")
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

    def fold(self, level: int) -> Fold | None:
        """Frames and pixels that a level of the encoder takes together; None for the last."""
        if level == len(self.temporal_downsample):
            return None
        return 2 if self.temporal_downsample[level] else 1, 2

    def unfold(self, level: int) -> Fold | None:
        """Frames and pixels that a level of the decoder makes of one; None for the last."""
        last = len(self.temporal_downsample)
        return None if level == last else self.fold(last - 1 - level)


PRESETS = {
    "wan2.1": WanVAEConfig(),
    "wan2.2": WanVAEConfig(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        in_channels=12,
        out_channels=12,
        residual=True,
        patch=2,
        latents_mean=(
            *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
            *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
            *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
            *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
            *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
            *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
        ),
        latents_std=(
            *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
            *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
            *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
            *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
            *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
            *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
        ),
    ),
}


class Encoder(nnx.Module):
    """Video to the moments before `quant_conv`."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv(config.in_channels, widths[0], (3, 3, 3), rngs=rngs)
        down: list[nnx.Module] = []
        for level, (inputs, outputs) in enumerate(pairwise(widths)):
            if config.residual:
                down.append(ResidualDown(inputs, outputs, config.num_res_blocks, config.fold(level), rngs=rngs))
                continue
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
        return chain([self.conv_in, *self.down, self.middle, self.head], x, caches)


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
            if config.residual:
                up.append(ResidualUp(inputs, outputs, config.num_res_blocks + 1, config.unfold(level), rngs=rngs))
                continue
            inputs = inputs // 2 if level else inputs  # the level before halved them
            for block in range(config.num_res_blocks + 1):
                up.append(ResidualBlock(outputs if block else inputs, outputs, rngs=rngs))
            if level < len(over_time):
                up.append(Upsample(outputs, outputs // 2, over_time[level], rngs=rngs))
        self.up = nnx.List(up)
        self.head = Head(widths[-1], config.out_channels, rngs=rngs)

    def __call__(self, z, caches=None):
        return chain([self.conv_in, self.middle, *self.up, self.head], z, caches)


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

    @property
    def decode_tile(self) -> int:
        """Latents along a side of `decode_tiled`'s tiles: diffusers' 256 pixels."""
        return 256 // self.config.space_factor

    def encode_tiled(self, video_BTYXC, tile: int = 32, overlap: int = 8, chunk: int | None = 1):
        """`encode` in blended tiles of `tile`×`tile` latents; the numbers are those of diffusers' `enable_tiling`."""
        self._check_video(video_BTYXC.shape)
        patch = self.config.patch
        tiling = Tiling(size=tile, overlap=overlap, into=self.config.space_factor // patch, out=1)
        moments = code_in_tiles(lambda video: self._moments(video, chunk), _fold(video_BTYXC, patch), tiling)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, logvar

    def decode_tiled(self, latents_BTYXC, tile: int | None = None, overlap: int | None = None, chunk: int | None = 1):
        """`decode` in blended tiles of `tile`×`tile` latents; the numbers are those of diffusers' `enable_tiling`.

        By default tiles are diffusers', of `decode_tile` latents; they share a quarter of them.
        """
        patch, tile = self.config.patch, self.decode_tile if tile is None else tile
        overlap = tile // 4 if overlap is None else overlap
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
