"""FLUX.1's autoencoder in diffusers' layout (`AutoencoderKL`) and in Black Forest Labs' (`ae.safetensors`)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from convert.tables import CONV2D, Row, linear_rows, norm_rows
from dit_jax.config import UserError
from dit_jax.models.vae_kl import AutoencoderKLConfig

_CONV1X1 = "o i 1 1 -> i o"
_TILE = 1024  # pixels along a tile of diffusers' `enable_tiling`, which it calls the sample size

# Our field -> diffusers' and its default there.
_FIELDS: dict[str, tuple[str, Any]] = {
    "widths": ("block_out_channels", (64,)),
    "blocks": ("layers_per_block", 1),
    "groups": ("norm_num_groups", 32),
    "z_dim": ("latent_channels", 4),
    "in_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
    "scaling_factor": ("scaling_factor", 0.18215),
    "shift_factor": ("shift_factor", None),
    "quant_conv": ("use_quant_conv", True),
    "post_quant_conv": ("use_post_quant_conv", True),
    "middle_attention": ("mid_block_add_attention", True),
}


def config_from_diffusers(config: Mapping[str, Any]) -> AutoencoderKLConfig:
    """Our config from the dict of `vae/config.json`; a field that is absent has diffusers' default.

    Raises UserError for attention beside the middle block, another activation, and statistics per channel.
    """
    fields = {ours: config.get(theirs, default) for ours, (theirs, default) in _FIELDS.items()}
    fields |= {"widths": tuple(fields["widths"]), "shift_factor": fields["shift_factor"] or 0.0}
    for name, expected in _fixed(len(fields["widths"])).items():
        found = config.get(name, expected)
        if (list(found) if isinstance(found, tuple) else found) != expected:
            raise UserError(f"the VAE has {name} {found}, expected {expected} as FLUX.1's has; use a VAE of that form")
    return AutoencoderKLConfig(**fields)


def config_to_diffusers(config: AutoencoderKLConfig) -> dict[str, Any]:
    """The dict of `vae/config.json`."""
    values = {theirs: getattr(config, ours) for ours, (theirs, _) in _FIELDS.items()}
    return {
        "_class_name": "AutoencoderKL",
        **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
        **_fixed(len(config.widths)),
        "force_upcast": True,
        "sample_size": _TILE,
    }


def _fixed(levels: int) -> dict[str, Any]:
    """The settings of diffusers that our model has one value of."""
    return {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latents_mean": None,
        "latents_std": None,
    }


def vae_kl_rows(config: AutoencoderKLConfig) -> list[Row]:
    """Every leaf of `AutoencoderKL`, in both layouts."""
    rows = []
    for name, present in (("quant_conv", config.quant_conv), ("post_quant_conv", config.post_quant_conv)):
        rows += linear_rows(name, name, name, _CONV1X1) if present else []
    for coder in ("encoder", "decoder"):
        rows += [
            *linear_rows(f"{coder}.conv_in", f"{coder}.conv_in", f"{coder}.conv_in", CONV2D),
            *_middle(f"{coder}.middle", f"{coder}.mid_block", f"{coder}.mid", config),
            *norm_rows(f"{coder}.norm_out", f"{coder}.conv_norm_out", f"{coder}.norm_out"),
            *linear_rows(f"{coder}.conv_out", f"{coder}.conv_out", f"{coder}.conv_out", CONV2D),
        ]
    count = len(config.widths)
    for level in range(count):
        names = f"encoder.levels.{level}", f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        widths = [config.widths[max(level - 1, 0)], *[config.widths[level]] * config.blocks]
        rows += _level(*names, widths, "down" if level < count - 1 else "")
        # The authors count the decoder's levels from whole pixels down, as the encoder's.
        back = count - 1 - level
        names = f"decoder.levels.{back}", f"decoder.up_blocks.{back}", f"decoder.up.{level}"
        widths = [config.widths[min(level + 1, count - 1)], *[config.widths[level]] * (config.blocks + 1)]
        rows += _level(*names, widths, "up" if level else "")
    return rows


def _level(ours: str, diffusers: str, original: str, widths: list[int], way: str) -> list[Row]:
    """Rows of one resolution's blocks, and of the convolution `way` to the next ("" for the last)."""
    rows = []
    for block, (inputs, outputs) in enumerate(pairwise(widths)):
        names = f"{ours}.blocks.{block}", f"{diffusers}.resnets.{block}", f"{original}.block.{block}"
        rows += _residual(*names, widens=inputs != outputs)
    if way:
        rows += linear_rows(
            f"{ours}.resample", f"{diffusers}.{way}samplers.0.conv", f"{original}.{way}sample.conv", CONV2D
        )
    return rows


def _middle(ours: str, diffusers: str, original: str, config: AutoencoderKLConfig) -> list[Row]:
    rows = [
        *_residual(f"{ours}.before", f"{diffusers}.resnets.0", f"{original}.block_1", widens=False),
        *_residual(f"{ours}.after", f"{diffusers}.resnets.1", f"{original}.block_2", widens=False),
    ]
    if not config.middle_attention:
        return rows
    mine, theirs, authors = f"{ours}.attention", f"{diffusers}.attentions.0", f"{original}.attn_1"
    rows += norm_rows(f"{mine}.norm", f"{theirs}.group_norm", f"{authors}.norm")
    # diffusers has made linear maps of the authors' 1×1 convolutions.
    patterns = {"original": _CONV1X1}
    for name in "qkv":
        rows += linear_rows(f"{mine}.{name}", f"{theirs}.to_{name}", f"{authors}.{name}", patterns=patterns)
    return [*rows, *linear_rows(f"{mine}.out", f"{theirs}.to_out.0", f"{authors}.proj_out", patterns=patterns)]


def _residual(ours: str, diffusers: str, original: str, *, widens: bool) -> list[Row]:
    rows = []
    for index in (1, 2):
        norm, conv = f"norm{index}", f"conv{index}"
        rows += norm_rows(f"{ours}.{norm}", f"{diffusers}.{norm}", f"{original}.{norm}")
        rows += linear_rows(f"{ours}.{conv}", f"{diffusers}.{conv}", f"{original}.{conv}", CONV2D)
    if widens:
        rows += linear_rows(f"{ours}.shortcut", f"{diffusers}.conv_shortcut", f"{original}.nin_shortcut", _CONV1X1)
    return rows
