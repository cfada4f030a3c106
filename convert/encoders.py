"""Keys and configs of the text and image encoders, in transformers' layout and in Wan's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from convert.tables import HEADS_IN, HEADS_IN_BIAS, HEADS_OUT, LINEAR, SAME, Part, Row, linear_rows, norm_rows
from dit_jax.config import UserError
from dit_jax.models.clip import VIT_H, CLIPVisionConfig, TowerConfig
from dit_jax.models.clip_text import CLIPTextConfig
from dit_jax.models.t5 import T5Config

ORIGINAL_CLIP = replace(VIT_H, projection=1024)
"""The image tower of the file that Wan's authors publish, which has no config beside it (their UMT5 is UMT5_XXL)."""

PATCH_IN = "d c y x -> (y x c) d"
OTHER_TOWER = ("textual.", "text_model.", "text_projection.", "log_scale", "logit_scale")
BESIDE_TEXT = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")

# What transformers takes for a key that config.json leaves out.
_T5_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128, "d_model": 512, "num_heads": 8, "d_kv": 64, "d_ff": 2048, "num_layers": 6,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}  # fmt: skip
_UMT5_DEFAULTS = _T5_DEFAULTS | {
    "vocab_size": 250112, "num_heads": 6, "d_ff": 1024, "num_layers": 8, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_CLIP_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}  # fmt: skip


def t5_config(settings: dict[str, Any]) -> T5Config:
    """Our config from transformers' (`model_type` umt5 or t5). Raises UserError for another type or an ungated MLP."""
    defaults = {"umt5": _UMT5_DEFAULTS, "t5": _T5_DEFAULTS}.get(settings.get("model_type", ""))
    if defaults is None:
        found = settings.get("model_type")
        raise UserError(f"model_type: expected umt5 or t5, found {found!r}; use a T5 text encoder.")
    settings = defaults | settings
    if settings["feed_forward_proj"] != "gated-gelu":
        found = settings["feed_forward_proj"]
        raise UserError(f"feed_forward_proj: expected gated-gelu, found {found!r}; use UMT5 or T5 v1.1.")
    return T5Config(
        vocab_size=settings["vocab_size"],
        width=settings["d_model"],
        heads=settings["num_heads"],
        head_width=settings["d_kv"],
        mlp_width=settings["d_ff"],
        blocks=settings["num_layers"],
        relative_buckets=settings["relative_attention_num_buckets"],
        relative_distance=settings["relative_attention_max_distance"],
        epsilon=settings["layer_norm_epsilon"],
        per_block_bias=settings["model_type"] == "umt5",
    )


def t5_settings(config: T5Config) -> dict[str, Any]:
    """The transformers config of an encoder of ours."""
    return {
        "architectures": ["UMT5EncoderModel" if config.per_block_bias else "T5EncoderModel"],
        "model_type": "umt5" if config.per_block_bias else "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "num_heads": config.heads,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "num_layers": config.blocks,
        "num_decoder_layers": config.blocks,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "layer_norm_epsilon": config.epsilon,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "use_cache": True,
    }


def t5_rows(config: T5Config) -> list[Row]:
    """The table of a UMT5 or T5 encoder."""
    theirs = "encoder.block.{i}.layer."
    rows = [
        Row(ours="tokens", diffusers="shared.weight", original="token_embedding.weight"),
        Row(ours="norm", diffusers="encoder.final_layer_norm.weight", original="norm.weight"),
        _bias_row(config),
    ]
    for name in "qkvo":
        pattern = HEADS_OUT if name == "o" else HEADS_IN
        rows.append(_kernel(f"attention.{name}", f"{theirs}0.SelfAttention.{name}", f"attn.{name}", pattern))
    for ours, outside, original in (("gate", "wi_0", "gate.0"), ("up", "wi_1", "fc1"), ("down", "wo", "fc2")):
        rows.append(_kernel(f"mlp.{ours}", f"{theirs}1.DenseReluDense.{outside}", f"ffn.{original}", LINEAR))
    for layer, name in enumerate(("norm1", "norm2")):
        original = f"blocks.{{i}}.{name}.weight"
        rows.append(Row(ours=f"blocks.{name}", diffusers=f"{theirs}{layer}.layer_norm.weight", original=original))
    return rows


def canonical_t5_key(key: str) -> str | None:
    """The table's key for a key on disk, in either layout; None for one to leave out.

    The token embedding may stand twice in a file: two keys with one canonical key hold the same tensor. Left out is
    what ComfyUI's files hold besides: the tokenizer as bytes, and a number that only CLIP has a use for.
    """
    if key in ("spiece_model", "logit_scale"):
        return None
    return "shared.weight" if key == "encoder.embed_tokens.weight" else key


def clip_vision_config(settings: dict[str, Any]) -> CLIPVisionConfig:
    """Our config from transformers' CLIPVisionConfig; `architectures` tells whether the projection is there.

    Raises UserError for another model, activation or an oblong image or patch.
    """
    if settings.get("model_type", "clip_vision_model") != "clip_vision_model":
        found = settings["model_type"]
        raise UserError(f"model_type: expected clip_vision_model, found {found!r}; use a CLIP image encoder.")
    settings = _CLIP_DEFAULTS | settings
    for name in ("image_size", "patch_size"):
        if not isinstance(settings[name], int):
            raise UserError(f"{name}: expected one integer, found {settings[name]!r}; use a CLIP of square images.")
    return CLIPVisionConfig(
        **_tower_sizes(settings),
        patch=settings["patch_size"],
        image_size=settings["image_size"],
        channels=settings["num_channels"],
        projection=settings["projection_dim"] if _projects(settings) else None,
    )


def clip_vision_settings(config: CLIPVisionConfig) -> dict[str, Any]:
    """The transformers config of an image tower of ours."""
    return {
        "architectures": ["CLIPVisionModelWithProjection" if config.projection else "CLIPVisionModel"],
        "model_type": "clip_vision_model",
        **_tower_settings(config),
        "patch_size": config.patch,
        "image_size": config.image_size,
        "num_channels": config.channels,
        "projection_dim": config.projection or _CLIP_DEFAULTS["projection_dim"],
    }


def clip_vision_rows(config: CLIPVisionConfig, prefixed: bool = True) -> list[Row]:
    """The table of a CLIP image tower; `prefixed`: whether transformers' keys start with `vision_model.`.

    Every version of transformers reads the prefix. Version 5 writes a tower without projection without it:
    `clip_vision_prefixed` tells which form a checkpoint has.
    """
    theirs = "vision_model." if prefixed else ""
    rows = [
        Row(
            ours="patch.kernel",
            pattern=PATCH_IN,
            diffusers=theirs + "embeddings.patch_embedding.weight",
            original="visual.patch_embedding.weight",
            sizes={"y": config.patch, "x": config.patch},
        ),
        Row(
            ours="class_token",
            diffusers=theirs + "embeddings.class_embedding",
            original="visual.cls_embedding",
            patterns={"original": "1 1 d -> d"},
        ),
        Row(
            ours="positions",
            diffusers=theirs + "embeddings.position_embedding.weight",
            original="visual.pos_embedding",
            patterns={"original": "1 n d -> n d"},
        ),
        *norm_rows("norm_in", theirs + "pre_layrnorm", "visual.pre_norm"),
        *norm_rows("norm_out", theirs + "post_layernorm", "visual.post_norm"),
        *_clip_block_rows(config, theirs + "encoder.layers.{i}."),
    ]
    if config.projection:
        rows.append(
            Row(
                ours="projection.kernel",
                pattern=LINEAR,
                diffusers="visual_projection.weight",
                original="visual.head",
                patterns={"original": SAME},
            )
        )
    return rows


def clip_vision_prefixed(settings: dict[str, Any]) -> bool:
    """Whether the transformers that wrote this config writes the tower's keys with `vision_model.`."""
    return _projects(settings) or _before_version_5(settings)


def canonical_clip_vision_key(key: str) -> str | None:
    """The (prefixed) table's key for a key on disk, in either layout; None for one to leave out.

    Left out are buffers and the text tower of a whole CLIP.
    """
    if key.endswith("position_ids") or key.startswith(OTHER_TOWER):
        return None
    return key if key.startswith(("vision_model.", "visual.", "visual_projection.")) else f"vision_model.{key}"


def clip_text_config(settings: dict[str, Any]) -> CLIPTextConfig:
    """Our config from transformers' CLIPTextConfig.

    Raises UserError for another model or activation, or for several tokens that end a text.
    """
    if settings.get("model_type", "clip_text_model") != "clip_text_model":
        found = settings["model_type"]
        raise UserError(f"model_type: expected clip_text_model, found {found!r}; use a CLIP text encoder.")
    settings = _CLIP_TEXT_DEFAULTS | settings
    end = settings["eos_token_id"]
    if not isinstance(end, int):
        raise UserError(f"eos_token_id: expected one integer, found {end!r}; use a CLIP text encoder.")
    return CLIPTextConfig(
        **_tower_sizes(settings),
        vocab_size=settings["vocab_size"],
        positions=settings["max_position_embeddings"],
        end_token=end,
    )


def clip_text_settings(config: CLIPTextConfig) -> dict[str, Any]:
    """The transformers config of a text tower of ours."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **_tower_settings(config),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.positions,
        "eos_token_id": config.end_token,
    }


def clip_text_rows(config: CLIPTextConfig, prefixed: bool = True) -> list[Row]:
    """The table of a CLIP text tower; `prefixed`: whether transformers' keys start with `text_model.`.

    Every version of transformers reads the prefix, version 5 writes none: `clip_text_prefixed` tells which form a
    checkpoint has. FLUX's authors take the tower from transformers, and have no layout of their own.
    """
    theirs = "text_model." if prefixed else ""
    rows = [
        Row(ours="tokens", diffusers=theirs + "embeddings.token_embedding.weight"),
        Row(ours="positions", diffusers=theirs + "embeddings.position_embedding.weight"),
        *norm_rows("norm", theirs + "final_layer_norm", ""),
        *_clip_block_rows(config, theirs + "encoder.layers.{i}."),
    ]
    return [replace(row, original="", parts={}) for row in rows]


def clip_text_prefixed(settings: dict[str, Any]) -> bool:
    """Whether the transformers that wrote this config writes the tower's keys with `text_model.`."""
    return _before_version_5(settings)


def canonical_clip_text_key(key: str) -> str | None:
    """The (prefixed) table's key for a key on disk; None for buffers and the rest of a whole CLIP."""
    if key.endswith("position_ids") or key.startswith(BESIDE_TEXT):
        return None
    return key if key.startswith("text_model.") else f"text_model.{key}"


def _tower_sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of our `TowerConfig`."""
    if settings["hidden_act"] not in ("gelu", "quick_gelu"):
        found = settings["hidden_act"]
        raise UserError(f"hidden_act: expected gelu or quick_gelu, found {found!r}; use a CLIP encoder.")
    return {
        "blocks": settings["num_hidden_layers"],
        "width": settings["hidden_size"],
        "heads": settings["num_attention_heads"],
        "mlp_width": settings["intermediate_size"],
        "activation": settings["hidden_act"],
        "epsilon": settings["layer_norm_eps"],
    }


def _tower_settings(config: TowerConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.blocks,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": config.activation,
        "layer_norm_eps": config.epsilon,
        "attention_dropout": 0.0,
    }


def _before_version_5(settings: dict[str, Any]) -> bool:
    version = str(settings.get("transformers_version", "4")).split(".")[0]
    return not version.isdigit() or int(version) < 5


def _projects(settings: dict[str, Any]) -> bool:
    return "CLIPVisionModelWithProjection" in (settings.get("architectures") or [])


def _bias_row(config: T5Config) -> Row:
    key = "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"
    if config.per_block_bias:
        return Row(ours="blocks.bias.table", diffusers=key, original="blocks.{i}.pos_embedding.embedding.weight")
    return Row(ours="bias.table", diffusers=key.replace("{i}", "0"), original="pos_embedding.embedding.weight")


def _kernel(ours: str, diffusers: str, original: str, pattern: str) -> Row:
    return Row(
        ours=f"blocks.{ours}.kernel",
        pattern=pattern,
        diffusers=f"{diffusers}.weight",
        original=f"blocks.{{i}}.{original}.weight",
    )


def _clip_block_rows(config: TowerConfig, theirs: str) -> list[Row]:
    authors, width = "visual.transformer.{i}.", config.width
    rows = []
    for index, name in enumerate("qkv"):
        fused = {"original": Part(index * width, (index + 1) * width, 3 * width)}
        ours, outside, original = f"blocks.attention.{name}", f"{theirs}self_attn.{name}_proj", f"{authors}attn.to_qkv"
        rows += linear_rows(ours, outside, original, HEADS_IN, HEADS_IN_BIAS, parts=fused)
    return [
        *rows,
        *linear_rows("blocks.attention.o", f"{theirs}self_attn.out_proj", f"{authors}attn.proj", HEADS_OUT),
        *linear_rows("blocks.up", f"{theirs}mlp.fc1", f"{authors}mlp.0"),
        *linear_rows("blocks.down", f"{theirs}mlp.fc2", f"{authors}mlp.2"),
        *norm_rows("blocks.norm1", f"{theirs}layer_norm1", f"{authors}norm1"),
        *norm_rows("blocks.norm2", f"{theirs}layer_norm2", f"{authors}norm2"),
    ]
