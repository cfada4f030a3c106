"""The FLUX transformer's keys and configs, in diffusers' layout and in Black Forest Labs' own."""

from __future__ import annotations

from typing import Any

from convert.pruned import HEADS, MLP, kept, pruned_settings
from convert.tables import (
    HEADS_IN,
    HEADS_IN_BIAS,
    HEADS_OUT,
    LINEAR,
    PAIRS,
    ROTATED_BIAS,
    ROTATED_IN,
    Part,
    Row,
    linear_rows,
)
from dit_jax.config import UserError
from dit_jax.models.flux import FluxConfig

ROTATED_NORM = "(k two) -> (two k)"
PACK = 2  # pixels of latents along each side of a packed token


def flux_config(settings: dict[str, Any]) -> FluxConfig:
    """Our config from a diffusers `FluxTransformer2DModel` config; UserError for one that FLUX.1 is not."""
    heads, head_width = settings["num_attention_heads"], settings["attention_head_dim"]
    channels = settings["in_channels"]
    if settings.get("patch_size", 1) != 1 or channels % PACK**2 or settings.get("out_channels") not in (None, channels):
        raise UserError(
            f"expected a FLUX.1 text-to-image transformer (patch_size 1, as many channels out as in, a multiple of 4), "
            f"found patch_size {settings.get('patch_size', 1)}, channels {channels} to {settings.get('out_channels')}; "
            "fill, depth and control models are not supported."
        )
    pruned = kept(settings, _full(heads, head_width))
    return FluxConfig(
        double_blocks=settings["num_layers"],
        single_blocks=settings["num_single_layers"],
        width=heads * head_width,
        heads=pruned[HEADS],
        head_width=head_width,
        mlp_width=pruned[MLP],
        in_channels=channels // PACK**2,
        out_channels=channels // PACK**2,
        text_width=settings["joint_attention_dim"],
        pooled_width=settings["pooled_projection_dim"],
        guidance=settings["guidance_embeds"],
        rope_widths=tuple(settings.get("axes_dims_rope", (16, 56, 56))),
    )


def flux_settings(config: FluxConfig) -> dict[str, Any]:
    """The diffusers config of a model of ours; for a pruned model a superset of it (`convert/pruned.py`)."""
    full = _full(config.width // config.head_width, config.head_width)
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels * PACK**2,
        "out_channels": None,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "attention_head_dim": config.head_width,
        "num_attention_heads": full[HEADS],
        "joint_attention_dim": config.text_width,
        "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.guidance,
        "axes_dims_rope": list(config.rope_widths),
        **pruned_settings({HEADS: config.heads, MLP: config.mlp_width}, full),
    }


def _full(heads: int, head_width: int) -> dict[str, int]:
    """The sizes that diffusers' model has, whatever its config says."""
    return {HEADS: heads, MLP: 4 * heads * head_width}


def flux_rows(config: FluxConfig) -> list[Row]:
    """The table of a FLUX transformer."""
    packed = {"y": config.patch[1], "x": config.patch[2]}
    rows = [
        *linear_rows("patch", "x_embedder", "img_in", pattern="d (c y x) -> (y x c) d", sizes=packed),
        *linear_rows("text", "context_embedder", "txt_in"),
        *_embedding("time", "timestep_embedder", "time_in"),
        *_embedding("pooled", "text_embedder", "vector_in"),
        *(_embedding("guidance", "guidance_embedder", "guidance_in") if config.guidance else []),
        *_halves("out_scale", config, {"diffusers": 0, "original": 1}),
        *_halves("out_shift", config, {"diffusers": 1, "original": 0}),
        Row(
            ours="out.kernel",
            pattern="(c y x) d -> d (y x c)",
            sizes=packed,
            diffusers="proj_out.weight",
            original="final_layer.linear.weight",
        ),
        Row(
            ours="out.bias",
            pattern="(c y x) -> (y x c)",
            sizes=packed,
            diffusers="proj_out.bias",
            original="final_layer.linear.bias",
        ),
    ]
    return rows + _double_rows(config) + _single_rows(config)


def _double_rows(config: FluxConfig) -> list[Row]:
    mine, theirs, authors = "double.", "transformer_blocks.{i}.", "double_blocks.{i}."
    inner = config.heads * config.head_width
    rows = []
    for ours, suffix, short, joint in (("image", "", "img", ""), ("text", "_context", "txt", "added_")):
        stream, attn = f"{mine}{ours}.", f"{theirs}attn."
        projections = {name: f"{attn}add_{name}_proj" if joint else f"{attn}to_{name}" for name in "qkv"}
        rows += [
            *linear_rows(f"{stream}modulation.linear", f"{theirs}norm1{suffix}.linear", f"{authors}{short}_mod.lin"),
            *_qkv_rows(f"{stream}attn.", projections, f"{authors}{short}_attn.qkv", inner, 3 * inner),
            *_norm_rows(f"{stream}attn.", f"{attn}norm_{joint}", f"{authors}{short}_attn.norm."),
            *linear_rows(
                f"{stream}attn.o",
                f"{attn}to_add_out" if joint else f"{attn}to_out.0",
                f"{authors}{short}_attn.proj",
                HEADS_OUT,
                sizes={"h": config.heads},
            ),
            *linear_rows(f"{stream}mlp.up", f"{theirs}ff{suffix}.net.0.proj", f"{authors}{short}_mlp.0"),
            *linear_rows(f"{stream}mlp.down", f"{theirs}ff{suffix}.net.2", f"{authors}{short}_mlp.2"),
        ]
    return rows


def _single_rows(config: FluxConfig) -> list[Row]:
    mine, theirs, authors = "single.", "single_transformer_blocks.{i}.", "single_blocks.{i}."
    inner, hidden = config.heads * config.head_width, config.mlp_width
    fused, joined = 3 * inner + hidden, inner + hidden
    up, down = Part(3 * inner, fused, fused), Part(inner, joined, joined, axis=1)
    out = Part(0, inner, joined, axis=1)
    projections = {name: f"{theirs}attn.to_{name}" for name in "qkv"}
    return [
        *linear_rows(f"{mine}modulation.linear", f"{theirs}norm.linear", f"{authors}modulation.lin"),
        *_qkv_rows(f"{mine}attn.", projections, f"{authors}linear1", inner, fused),
        *_norm_rows(f"{mine}attn.", f"{theirs}attn.norm_", f"{authors}norm."),
        *linear_rows(f"{mine}mlp.up", f"{theirs}proj_mlp", f"{authors}linear1", parts={"original": up}),
        Row(
            ours=f"{mine}attn.o.kernel",
            pattern=HEADS_OUT,
            sizes={"h": config.heads},
            diffusers=f"{theirs}proj_out.weight",
            original=f"{authors}linear2.weight",
            parts={"diffusers": out, "original": out},
        ),
        Row(
            ours=f"{mine}mlp.down.kernel",
            pattern=LINEAR,
            diffusers=f"{theirs}proj_out.weight",
            original=f"{authors}linear2.weight",
            parts={"diffusers": down, "original": down},
        ),
        Row(ours=f"{mine}mlp.down.bias", diffusers=f"{theirs}proj_out.bias", original=f"{authors}linear2.bias"),
    ]


def _qkv_rows(ours: str, theirs: dict[str, str], fused: str, inner: int, total: int) -> list[Row]:
    rows = []
    for place, (name, key) in enumerate(theirs.items()):
        part = {"original": Part(place * inner, (place + 1) * inner, total)}
        if name == "v":
            rows += linear_rows(f"{ours}v", key, fused, HEADS_IN, HEADS_IN_BIAS, parts=part)
        else:
            rows += linear_rows(f"{ours}{name}.linear", key, fused, ROTATED_IN, ROTATED_BIAS, PAIRS, part)
    return rows


def _norm_rows(ours: str, theirs: str, authors: str) -> list[Row]:
    return [
        Row(
            ours=f"{ours}{name}.norm",
            pattern=ROTATED_NORM,
            sizes=PAIRS,
            diffusers=f"{theirs}{name}.weight",
            original=f"{authors}{long}_norm.scale",
        )
        for name, long in (("q", "query"), ("k", "key"))
    ]


def _embedding(ours: str, theirs: str, authors: str) -> list[Row]:
    return [
        *linear_rows(f"{ours}.up", f"time_text_embed.{theirs}.linear_1", f"{authors}.in_layer"),
        *linear_rows(f"{ours}.down", f"time_text_embed.{theirs}.linear_2", f"{authors}.out_layer"),
    ]


def _halves(ours: str, config: FluxConfig, order: dict[str, int]) -> list[Row]:
    """Scale and shift of the last norm are fused, and in another order by the authors than by diffusers."""
    width = config.width
    parts = {layout: Part(half * width, (half + 1) * width, 2 * width) for layout, half in order.items()}
    return linear_rows(ours, "norm_out.linear", "final_layer.adaLN_modulation.1", parts=parts)
