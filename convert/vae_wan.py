"""Wan's autoencoders in diffusers' layout (`AutoencoderKLWan`) and in the authors' (`Wan2.1_VAE.pth`, `Wan2.2_VAE`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from convert.tables import CONV2D, CONV3D, Row, linear_rows
from dit_jax.models.vae_wan import WanVAEConfig
from dit_jax.models.vae_wan_blocks import Fold

_NORM3D = "c 1 1 1 -> c"
_NORM2D = "c 1 1 -> c"
_CONV1X1 = "o i 1 1 -> i o"

# Our field -> diffusers'. "temperal" is theirs.
_FIELDS = {
    "base_dim": "base_dim",
    "decoder_base_dim": "decoder_base_dim",
    "z_dim": "z_dim",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "attn_scales": "attn_scales",
    "temporal_downsample": "temperal_downsample",
    "residual": "is_residual",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}


def config_from_diffusers(config: Mapping[str, Any]) -> WanVAEConfig:
    """Our config from the dict of `vae/config.json`; a field that is absent has Wan 2.1's published default."""
    given = {ours: config[theirs] for ours, theirs in _FIELDS.items() if theirs in config}
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return WanVAEConfig(**fields, patch=config.get("patch_size") or 1)


def config_to_diffusers(config: WanVAEConfig) -> dict[str, Any]:
    """The dict of `vae/config.json`."""
    values = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    return {
        "_class_name": "AutoencoderKLWan",
        **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
        "dropout": 0.0,
        "patch_size": config.patch if config.patch > 1 else None,
        "scale_factor_temporal": config.time_factor,
        "scale_factor_spatial": config.space_factor,
    }


def vae_wan_rows(config: WanVAEConfig) -> list[Row]:
    """Every leaf of `WanVAE`, in both layouts."""
    rows = [
        *linear_rows("quant_conv", "quant_conv", "conv1", CONV3D),
        *linear_rows("post_quant_conv", "post_quant_conv", "conv2", CONV3D),
    ]
    for coder in ("encoder", "decoder"):
        rows += linear_rows(f"{coder}.conv_in", f"{coder}.conv_in", f"{coder}.conv1", CONV3D)
        rows += _middle(f"{coder}.middle", f"{coder}.mid_block", f"{coder}.middle")
        rows.append(_norm(f"{coder}.head.norm", f"{coder}.norm_out", f"{coder}.head.0"))
        rows += linear_rows(f"{coder}.head.conv", f"{coder}.conv_out", f"{coder}.head.2", CONV3D)
    levels = _residual_levels if config.residual else _flat_levels
    return [*rows, *levels(config)]


def _flat_levels(config: WanVAEConfig) -> Iterator[Row]:
    yield from _encoder_levels(config)
    yield from _decoder_levels(config)


def _residual_levels(config: WanVAEConfig) -> Iterator[Row]:
    """Wan 2.2: all layouts nest the blocks in levels."""
    widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
    for level, (inputs, outputs) in enumerate(pairwise(widths)):
        names = f"encoder.down.{level}", f"encoder.down_blocks.{level}", f"encoder.downsamples.{level}.downsamples"
        yield from _level(*names, "downsampler", inputs, outputs, config.num_res_blocks, config.fold(level))
    base = config.decoder_base_dim or config.base_dim
    widths = [base * factor for factor in (config.dim_mult[-1], *reversed(config.dim_mult))]
    for level, (inputs, outputs) in enumerate(pairwise(widths)):
        names = f"decoder.up.{level}", f"decoder.up_blocks.{level}", f"decoder.upsamples.{level}.upsamples"
        yield from _level(*names, "upsampler", inputs, outputs, config.num_res_blocks + 1, config.unfold(level))


def _level(
    ours: str, diffusers: str, original: str, sampler: str, inputs: int, outputs: int, blocks: int, fold: Fold | None
) -> Iterator[Row]:
    for block in range(blocks):
        names = f"{ours}.layers.{block}", f"{diffusers}.resnets.{block}", f"{original}.{block}"
        yield from _residual(*names, widens=block == 0 and inputs != outputs)
    if fold:
        names = f"{ours}.layers.{blocks}", f"{diffusers}.{sampler}", f"{original}.{blocks}"
        yield from _resample(*names, over_time=fold[0] > 1)


def _encoder_levels(config: WanVAEConfig) -> Iterator[Row]:
    """Both layouts count the blocks as we do."""
    index = 0

    def names() -> tuple[str, str, str]:
        return f"encoder.down.{index}", f"encoder.down_blocks.{index}", f"encoder.downsamples.{index}"

    inputs = config.base_dim
    for level, factor in enumerate(config.dim_mult):
        outputs = config.base_dim * factor
        for _ in range(config.num_res_blocks):
            yield from _residual(*names(), widens=inputs != outputs)
            inputs = outputs
            index += 1
            if 0.5**level in config.attn_scales:
                yield from _attention(*names())
                index += 1
        if level < len(config.temporal_downsample):
            yield from _resample(*names(), over_time=config.temporal_downsample[level])
            index += 1


def _decoder_levels(config: WanVAEConfig) -> Iterator[Row]:
    """The authors count the blocks as we do, diffusers by levels."""
    base = config.decoder_base_dim or config.base_dim
    inputs = base * config.dim_mult[-1]
    per_level = config.num_res_blocks + 1
    for level, factor in enumerate(reversed(config.dim_mult)):
        outputs = base * factor
        start = level * (per_level + 1)
        for block in range(per_level):
            names = (
                f"decoder.up.{start + block}",
                f"decoder.up_blocks.{level}.resnets.{block}",
                f"decoder.upsamples.{start + block}",
            )
            yield from _residual(*names, widens=inputs != outputs)
            inputs = outputs
        inputs = outputs // 2
        if level < len(config.temporal_downsample):
            last = start + per_level
            names = f"decoder.up.{last}", f"decoder.up_blocks.{level}.upsamplers.0", f"decoder.upsamples.{last}"
            yield from _resample(*names, over_time=tuple(reversed(config.temporal_downsample))[level])


def _middle(ours: str, diffusers: str, original: str) -> list[Row]:
    return [
        *_residual(f"{ours}.before", f"{diffusers}.resnets.0", f"{original}.0", widens=False),
        *_attention(f"{ours}.attention", f"{diffusers}.attentions.0", f"{original}.1"),
        *_residual(f"{ours}.after", f"{diffusers}.resnets.1", f"{original}.2", widens=False),
    ]


def _residual(ours: str, diffusers: str, original: str, *, widens: bool) -> list[Row]:
    rows = [
        _norm(f"{ours}.norm1", f"{diffusers}.norm1", f"{original}.residual.0"),
        *linear_rows(f"{ours}.conv1", f"{diffusers}.conv1", f"{original}.residual.2", CONV3D),
        _norm(f"{ours}.norm2", f"{diffusers}.norm2", f"{original}.residual.3"),
        *linear_rows(f"{ours}.conv2", f"{diffusers}.conv2", f"{original}.residual.6", CONV3D),
    ]
    if widens:
        rows += linear_rows(f"{ours}.shortcut", f"{diffusers}.conv_shortcut", f"{original}.shortcut", CONV3D)
    return rows


def _attention(ours: str, diffusers: str, original: str) -> list[Row]:
    return [
        _norm(f"{ours}.norm", f"{diffusers}.norm", f"{original}.norm", _NORM2D),
        *linear_rows(f"{ours}.qkv", f"{diffusers}.to_qkv", f"{original}.to_qkv", _CONV1X1),
        *linear_rows(f"{ours}.out", f"{diffusers}.proj", f"{original}.proj", _CONV1X1),
    ]


def _resample(ours: str, diffusers: str, original: str, *, over_time: bool) -> list[Row]:
    rows = linear_rows(f"{ours}.conv", f"{diffusers}.resample.1", f"{original}.resample.1", CONV2D)
    if over_time:
        rows += linear_rows(f"{ours}.time_conv", f"{diffusers}.time_conv", f"{original}.time_conv", CONV3D)
    return rows


def _norm(ours: str, diffusers: str, original: str, pattern: str = _NORM3D) -> Row:
    return Row(ours=f"{ours}.scale", pattern=pattern, diffusers=f"{diffusers}.gamma", original=f"{original}.gamma")
