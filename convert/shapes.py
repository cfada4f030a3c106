"""Configs of models whose authors publish weights alone: sizes from shapes, the rest from the published models.

Each function takes a file's tensors and the config.json that lies beside it ({} where there is none), and gives the
config that diffusers or transformers has of such a model. What no shape tells, and no published model either, is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import count, takewhile
from typing import Any

from convert.components import Settings, usable_config
from convert.encoders import ORIGINAL_CLIP, clip_text_settings, clip_vision_settings, t5_settings
from convert.safetensors_files import Tensor
from convert.vae_kl import config_to_diffusers as vae_kl_settings
from convert.vae_wan import config_to_diffusers as vae_wan_settings
from convert.wan import wan_config, wan_settings
from dit_jax.config import UserError
from dit_jax.models.clip_text import CLIP_L
from dit_jax.models.flux import FLUX_DEV
from dit_jax.models.t5 import T5_XXL, UMT5_XXL
from dit_jax.models.vae_kl import FLUX_VAE
from dit_jax.models.vae_wan import PRESETS as VAE_PRESETS
from dit_jax.models.wan import WAN_14B

Tensors = Mapping[str, Tensor]
SIDECAR = "diffusers_configs.json"


def wan(tensors: Tensors, beside: Settings) -> Settings:
    """Of a Wan transformer; the authors' config.json gives the heads, and their width of 128 where there is none."""
    width, channels, *patch = _shape(tensors, "patch_embedding.weight", "width", "channels", "t", "y", "x")
    if "dim" not in beside:
        beside = {
            "dim": width,
            "num_heads": _heads(tensors, "patch_embedding.weight", width, WAN_14B.head_width),
            "num_layers": _depth(tensors, "blocks."),
            "ffn_dim": _shape(tensors, "blocks.0.ffn.0.weight", "hidden width", "width")[0],
            "freq_dim": _shape(tensors, "time_embedding.0.weight", "width", "frequencies")[1],
            "in_dim": channels,
            "out_dim": _shape(tensors, "head.head.weight", "values of a patch", "width")[0]
            // (patch[0] * patch[1] * patch[2]),
        }
    with usable_config("WanModel", _file(tensors).parent / "config.json"):
        settings = wan_settings(wan_config(beside))
    settings["text_dim"] = _shape(tensors, "text_embedding.0.weight", "width", "text width")[1]
    settings["patch_size"] = patch
    # Wan 2.2 says i2v of models without an image branch.
    settings["image_dim"] = settings["added_kv_proj_dim"] = settings["pos_embed_seq_len"] = None
    if "img_emb.proj.1.weight" in tensors:
        settings["image_dim"] = _shape(tensors, "img_emb.proj.1.weight", "hidden width", "image width")[1]
        settings["added_kv_proj_dim"] = beside["dim"]
    if "img_emb.emb_pos" in tensors:
        settings["pos_embed_seq_len"] = _shape(tensors, "img_emb.emb_pos", "1", "positions", "image width")[1]
    return settings


def flux(tensors: Tensors, beside: Settings) -> Settings:
    """Of a FLUX transformer; the norm of a head's queries tells the width of a head."""
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    width, channels = _shape(tensors, "img_in.weight", "width", "channels")
    (head_width,) = _shape(tensors, norm, "head width")
    if head_width != FLUX_DEV.head_width:
        raise UserError(
            f"{_file(tensors)}: {norm} has {head_width} values, expected {FLUX_DEV.head_width} as in FLUX.1, of which "
            f"alone the widths that positions rotate are known; put {SIDECAR} with its config beside the file."
        )
    out = _shape(tensors, "final_layer.linear.weight", "channels", "width")[0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": _depth(tensors, "double_blocks."),
        "num_single_layers": _depth(tensors, "single_blocks."),
        "attention_head_dim": head_width,
        "num_attention_heads": _heads(tensors, "img_in.weight", width, head_width),
        "joint_attention_dim": _shape(tensors, "txt_in.weight", "width", "text width")[1],
        "pooled_projection_dim": _shape(tensors, "vector_in.in_layer.weight", "width", "pooled width")[1],
        "guidance_embeds": any(key.startswith("guidance_in.") for key in tensors),
        "axes_dims_rope": list(FLUX_DEV.rope_widths),
    }


def vae_wan(tensors: Tensors, beside: Settings) -> Settings:
    """Of Wan's VAE: the published one at the width of its first convolutions; 2.2's nests its blocks in levels.

    Raises UserError for other latents than the published ones, whose scale is another.
    """
    kernel = ("outputs", "inputs", "t", "y", "x")
    nested = any(key.startswith("encoder.downsamples.0.downsamples.") for key in tensors)
    published = VAE_PRESETS["wan2.2" if nested else "wan2.1"]
    width, channels = _shape(tensors, "decoder.conv1.weight", *kernel)[:2]
    if channels != published.z_dim:
        raise UserError(
            f"{_file(tensors)}: decoder.conv1.weight takes latents of {channels} channels, expected {published.z_dim} "
            f"as the published VAE's; put {SIDECAR} with the config of this VAE beside the file."
        )
    base = _shape(tensors, "encoder.conv1.weight", *kernel)[0]
    decoder = width // published.dim_mult[-1]
    return vae_wan_settings(replace(published, base_dim=base, decoder_base_dim=None if decoder == base else decoder))


def vae_kl(tensors: Tensors, beside: Settings) -> Settings:
    """Of FLUX's autoencoder; no shape tells the norms' groups and the latents' scale, which are FLUX.1's.

    Raises UserError for other latents than its 16 channels, whose scale is another.
    """
    kernel = ("outputs", "inputs", "y", "x")
    channels = _shape(tensors, "decoder.conv_in.weight", *kernel)[1]
    if channels != FLUX_VAE.z_dim:
        raise UserError(
            f"{_file(tensors)}: decoder.conv_in.weight takes latents of {channels} channels, expected "
            f"{FLUX_VAE.z_dim} as FLUX.1's; put {SIDECAR} with the config of this VAE beside the file."
        )
    levels = range(_depth(tensors, "encoder.down."))
    config = replace(
        FLUX_VAE,
        widths=tuple(_shape(tensors, f"encoder.down.{i}.block.0.conv1.weight", *kernel)[0] for i in levels),
        blocks=_depth(tensors, "encoder.down.0.block."),
        in_channels=_shape(tensors, "encoder.conv_in.weight", *kernel)[1],
        out_channels=_shape(tensors, "decoder.conv_out.weight", *kernel)[0],
        quant_conv=any(key.startswith("quant_conv.") for key in tensors),
        post_quant_conv=any(key.startswith("post_quant_conv.") for key in tensors),
        middle_attention=any(key.startswith("encoder.mid.attn_1.") for key in tensors),
    )
    return vae_kl_settings(config)


def umt5(tensors: Tensors, beside: Settings) -> Settings:
    """Of a UMT5 encoder in Wan's keys."""
    vocabulary, width = _shape(tensors, "token_embedding.weight", "vocabulary", "width")
    buckets, heads = _shape(tensors, "blocks.0.pos_embedding.embedding.weight", "buckets", "heads")
    config = replace(
        UMT5_XXL,
        vocab_size=vocabulary,
        width=width,
        heads=heads,
        head_width=_shape(tensors, "blocks.0.attn.q.weight", "heads x head width", "width")[0] // heads,
        mlp_width=_shape(tensors, "blocks.0.ffn.fc1.weight", "hidden width", "width")[0],
        blocks=_depth(tensors, "blocks."),
        relative_buckets=buckets,
    )
    return t5_settings(config)


def t5(tensors: Tensors, beside: Settings) -> Settings:
    """Of a T5 or UMT5 encoder in transformers' keys; UMT5 has a table of relative positions in every block."""
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    tokens = "shared.weight" if "shared.weight" in tensors else "encoder.embed_tokens.weight"
    vocabulary, width = _shape(tensors, tokens, "vocabulary", "width")
    buckets, heads = _shape(tensors, bias.format(0), "buckets", "heads")
    query, up = "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"
    config = replace(
        T5_XXL,
        vocab_size=vocabulary,
        width=width,
        heads=heads,
        head_width=_shape(tensors, query, "heads x head width", "width")[0] // heads,
        mlp_width=_shape(tensors, up, "hidden width", "width")[0],
        blocks=_depth(tensors, "encoder.block."),
        relative_buckets=buckets,
        per_block_bias=any(key != bias.format(0) and "relative_attention_bias" in key for key in tensors),
    )
    return t5_settings(config)


def clip_vision(tensors: Tensors, beside: Settings) -> Settings:
    """Of the image tower of Wan's CLIP; no shape tells the width of a head, which is the published share of all."""
    width, channels, patch, _ = _shape(tensors, "visual.patch_embedding.weight", "width", "channels", "y", "x")
    positions = _shape(tensors, "visual.pos_embedding", "1", "positions", "width")[1]
    config = replace(
        ORIGINAL_CLIP,
        width=width,
        heads=width * ORIGINAL_CLIP.heads // ORIGINAL_CLIP.width,
        mlp_width=_shape(tensors, "visual.transformer.0.mlp.0.weight", "hidden width", "width")[0],
        blocks=_depth(tensors, "visual.transformer."),
        channels=channels,
        patch=patch,
        image_size=round((positions - 1) ** 0.5) * patch,
        projection=_shape(tensors, "visual.head", "width", "projection")[1],
    )
    return clip_vision_settings(config)


def clip_text(tensors: Tensors, beside: Settings) -> Settings:
    """Of CLIP's text tower; no shape tells the width of a head, which is CLIP-L's 64."""
    inside = "text_model."
    vocabulary, width = _shape(tensors, inside + "embeddings.token_embedding.weight", "vocabulary", "width")
    positions = _shape(tensors, inside + "embeddings.position_embedding.weight", "positions", "width")[0]
    config = replace(
        CLIP_L,
        vocab_size=vocabulary,
        width=width,
        heads=_heads(tensors, inside + "embeddings.token_embedding.weight", width, CLIP_L.width // CLIP_L.heads),
        mlp_width=_shape(tensors, inside + "encoder.layers.0.mlp.fc1.weight", "hidden width", "width")[0],
        blocks=_depth(tensors, inside + "encoder.layers."),
        positions=positions,
    )
    return clip_text_settings(config)


def _file(tensors: Tensors) -> Any:
    return next(iter(tensors.values())).file


def _heads(tensors: Tensors, key: str, width: int, head_width: int) -> int:
    """Heads of the published width, where nothing tells their number."""
    if width % head_width:
        raise UserError(
            f"{_file(tensors)}: {key} has width {width}, expected a multiple of {head_width}, the width of the "
            f"published model's heads; put {SIDECAR} or config.json with the number of heads beside the file."
        )
    return width // head_width


def _shape(tensors: Tensors, key: str, *axes: str) -> tuple[int, ...]:
    """The shape of a tensor, one size for each of the names `axes`."""
    if key not in tensors:
        raise UserError(f"{_file(tensors)} lacks {key}; expected it in a file of this kind; download it again.")
    shape = tensors[key].shape
    if len(shape) != len(axes) or 0 in shape:
        raise UserError(
            f"{tensors[key].file}: {key} has shape {shape}, expected ({', '.join(axes)}), none of them 0; "
            "download the weights again."
        )
    return shape


def _depth(tensors: Tensors, prefix: str) -> int:
    """How many of the numbers 0, 1, … follow a prefix without a gap."""
    numbers = (re.match(rf"{re.escape(prefix)}(\d+)\.", key) for key in tensors)
    found = {int(number[1]) for number in numbers if number}
    return len(list(takewhile(found.__contains__, count())))
