"""The Wan transformer's keys and configs, in diffusers' layout and the authors' own."""

from __future__ import annotations

from typing import Any

from convert.pruned import HEADS, NORM, kept, pruned_settings
from convert.tables import (
    HEADS_IN,
    HEADS_IN_BIAS,
    HEADS_OUT,
    PAIRS,
    ROTATED_BIAS,
    ROTATED_IN,
    Row,
    linear_rows,
    norm_rows,
)
from dit_jax.models.wan import PRESETS, WanConfig

HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"  # components of a model of two experts
EXPERTS = {HIGH_NOISE: "high_noise_model", LOW_NOISE: "low_noise_model"}  # and the authors' folders of them
FLF2V_POSITIONS = 514  # image tokens of the first and the last frame, as the authors' code has them
PATCH_IN = "d c t y x -> (t y x c) d"


def wan_config(settings: dict[str, Any]) -> WanConfig:
    """Our config from a diffusers `WanTransformer3DModel` config or from the authors' `config.json`."""
    if "num_attention_heads" not in settings:
        return _original_config(settings)
    heads, head_width = settings["num_attention_heads"], settings["attention_head_dim"]
    pruned = kept(settings, {HEADS: heads, NORM: False})
    return WanConfig(
        blocks=settings["num_layers"],
        width=heads * head_width,
        heads=pruned[HEADS],
        head_width=head_width,
        norm_counts_pruned=pruned[NORM],
        mlp_width=settings["ffn_dim"],
        in_channels=settings["in_channels"],
        out_channels=settings.get("out_channels") or settings["in_channels"],
        text_width=settings["text_dim"],
        time_frequencies=settings["freq_dim"],
        patch=tuple(settings["patch_size"]),
        epsilon=settings["eps"],
        image_width=settings.get("image_dim"),
        image_positions=settings.get("pos_embed_seq_len"),
    )


def wan_settings(config: WanConfig) -> dict[str, Any]:
    """The diffusers config of a model of ours; with pruned heads a superset of it (`convert/pruned.py`)."""
    full_heads = config.width // config.head_width
    pruned = {HEADS: config.heads, NORM: config.norm_counts_pruned}
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch),
        "num_attention_heads": full_heads,
        "attention_head_dim": config.head_width,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_width,
        "freq_dim": config.time_frequencies,
        "ffn_dim": config.mlp_width,
        "num_layers": config.blocks,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.epsilon,
        "image_dim": config.image_width,
        "added_kv_proj_dim": config.width if config.image_width else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": config.image_positions,
        **pruned_settings(pruned, {HEADS: full_heads, NORM: False}),
    }


def wan_original_settings(config: WanConfig) -> dict[str, Any]:
    """The authors' `config.json` of a model of ours."""
    return {
        "_class_name": "WanModel",
        "model_type": _model_type(config),
        "dim": config.width,
        "eps": config.epsilon,
        "ffn_dim": config.mlp_width,
        "freq_dim": config.time_frequencies,
        "in_dim": config.in_channels,
        "num_heads": config.heads,
        "num_layers": config.blocks,
        "out_dim": config.out_channels,
        "text_dim": config.text_width,
        "text_len": 512,
    }


def _model_type(config: WanConfig) -> str:
    if config.out_channels == PRESETS["wan2.2-ti2v-5b"].out_channels:
        return "ti2v"
    if config.image_positions is not None:
        return "flf2v"
    return "i2v" if config.in_channels > config.out_channels else "t2v"


def _original_config(settings: dict[str, Any]) -> WanConfig:
    return WanConfig(
        blocks=settings["num_layers"],
        width=settings["dim"],
        heads=settings["num_heads"],
        head_width=settings["dim"] // settings["num_heads"],
        mlp_width=settings["ffn_dim"],
        in_channels=settings["in_dim"],
        out_channels=settings["out_dim"],
        text_width=settings.get("text_dim", 4096),
        time_frequencies=settings.get("freq_dim", 256),
        epsilon=settings.get("eps", 1e-6),
        image_width=1280 if settings.get("model_type") in ("i2v", "flf2v") else None,
        image_positions=FLF2V_POSITIONS if settings.get("model_type") == "flf2v" else None,
    )


def wan_rows(config: WanConfig) -> list[Row]:
    """The table of a Wan transformer."""
    rows = [
        *linear_rows("patch", "patch_embedding", "patch_embedding", pattern=PATCH_IN, sizes=_patch_sizes(config)),
        *linear_rows("time.up", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        *linear_rows("time.down", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        *linear_rows("time_out", "condition_embedder.time_proj", "time_projection.1"),
        *linear_rows("text.up", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        *linear_rows("text.down", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        Row(ours="modulation", pattern="1 s d -> s d", diffusers="scale_shift_table", original="head.modulation"),
        *linear_rows("out", "proj_out", "head.head"),
        *_block_rows(config),
    ]
    return rows + (_image_rows(config) if config.image_width else [])


def _block_rows(config: WanConfig) -> list[Row]:
    block, image = "blocks.{i}.", config.image_width is not None
    return [
        Row(
            ours="blocks.modulation",
            pattern="1 s d -> s d",
            diffusers=block + "scale_shift_table",
            original=block + "modulation",
        ),
        *_attention_rows("attn1", "self_attn", rotated=True),
        *_attention_rows("attn2", "cross_attn", rotated=False),
        *(_image_branch_rows() if image else []),
        *norm_rows("blocks.cross_norm", block + "norm2", block + "norm3"),
        *linear_rows("blocks.mlp.up", block + "ffn.net.0.proj", block + "ffn.0"),
        *linear_rows("blocks.mlp.down", block + "ffn.net.2", block + "ffn.2"),
    ]


def _attention_rows(ours: str, original: str, rotated: bool) -> list[Row]:
    mine, theirs, authors = f"blocks.{ours}.", f"blocks.{{i}}.{ours}.", f"blocks.{{i}}.{original}."
    kernel, bias, sizes = (ROTATED_IN, ROTATED_BIAS, PAIRS) if rotated else (HEADS_IN, HEADS_IN_BIAS, {})
    rows = []
    for name in "qk":
        rows += linear_rows(f"{mine}{name}.linear", f"{theirs}to_{name}", authors + name, kernel, bias, sizes)
        rows.append(
            Row(
                ours=f"{mine}{name}.norm",
                pattern=bias,
                sizes=sizes,
                diffusers=f"{theirs}norm_{name}.weight",
                original=f"{authors}norm_{name}.weight",
            )
        )
    rows += linear_rows(f"{mine}v", f"{theirs}to_v", f"{authors}v", HEADS_IN, HEADS_IN_BIAS)
    return rows + linear_rows(f"{mine}o", f"{theirs}to_out.0", f"{authors}o", HEADS_OUT)


def _image_branch_rows() -> list[Row]:
    mine, theirs, authors = "blocks.attn2.", "blocks.{i}.attn2.", "blocks.{i}.cross_attn."
    return [
        *linear_rows(f"{mine}image_k.linear", f"{theirs}add_k_proj", f"{authors}k_img", HEADS_IN, HEADS_IN_BIAS),
        *linear_rows(f"{mine}image_v", f"{theirs}add_v_proj", f"{authors}v_img", HEADS_IN, HEADS_IN_BIAS),
        Row(
            ours=f"{mine}image_k.norm",
            pattern=HEADS_IN_BIAS,
            diffusers=f"{theirs}norm_added_k.weight",
            original=f"{authors}norm_k_img.weight",
        ),
    ]


def _image_rows(config: WanConfig) -> list[Row]:
    theirs = "condition_embedder.image_embedder."
    rows = [
        *norm_rows("image.norm1", theirs + "norm1", "img_emb.proj.0"),
        *linear_rows("image.mlp.up", theirs + "ff.net.0.proj", "img_emb.proj.1"),
        *linear_rows("image.mlp.down", theirs + "ff.net.2", "img_emb.proj.3"),
        *norm_rows("image.norm2", theirs + "norm2", "img_emb.proj.4"),
    ]
    if config.image_positions:
        rows.append(
            Row(
                ours="image.positions",
                pattern="1 n e -> n e",
                diffusers=theirs + "pos_embed",
                original="img_emb.emb_pos",
            )
        )
    return rows


def _patch_sizes(config: WanConfig) -> dict[str, int]:
    return dict(zip("tyx", config.patch, strict=True))
