"""Small checkpoints of every kind with random weights, made from our tables: configs, tensors, files of any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save_file

from convert.components import Component, component_of
from convert.encoders import ORIGINAL_CLIP, clip_text_settings, clip_vision_settings, t5_settings
from convert.flux import flux_settings
from convert.leaves import Leaf, tensors_from_leaves
from convert.tables import contiguous
from convert.vae_kl import config_to_diffusers as vae_kl_settings
from convert.vae_wan import config_to_diffusers as vae_wan_settings
from convert.wan import wan_settings
from dit_jax.models.clip import CLIPVisionConfig
from dit_jax.models.clip_text import HIGHEST_ID, CLIPTextConfig
from dit_jax.models.flux import FluxConfig
from dit_jax.models.t5 import T5Config
from dit_jax.models.vae_kl import AutoencoderKLConfig
from dit_jax.models.vae_wan import WanVAEConfig
from dit_jax.models.wan import WanConfig

WAN = WanConfig(
    blocks=2, width=256, heads=2, head_width=128, mlp_width=20, in_channels=16, out_channels=16, text_width=12,
    time_frequencies=16,
)  # fmt: skip
WAN_IMAGE = WanConfig(
    blocks=1, width=256, heads=2, head_width=128, mlp_width=20, in_channels=36, out_channels=16, text_width=12,
    time_frequencies=16, image_width=80,
)  # fmt: skip
FLUX_DEV = FluxConfig(
    double_blocks=1, single_blocks=2, width=256, heads=2, head_width=128, mlp_width=1024, text_width=12, pooled_width=64
)
FLUX_SCHNELL = FluxConfig(
    double_blocks=2, single_blocks=1, width=128, heads=1, head_width=128, mlp_width=512, text_width=12, pooled_width=64,
    guidance=False,
)  # fmt: skip
T5_SIZES = dict(vocab_size=13, width=12, heads=3, head_width=2, mlp_width=5, blocks=2)
# Every one is told by its shapes alone.
SETTINGS = {
    "wan": wan_settings(WAN),
    "wan-image": wan_settings(WAN_IMAGE),
    "flux-dev": flux_settings(FLUX_DEV),
    "flux-schnell": flux_settings(FLUX_SCHNELL),
    "wan-vae": vae_wan_settings(WanVAEConfig(base_dim=4)),
    "flux-vae": vae_kl_settings(AutoencoderKLConfig(widths=(32, 64), blocks=1)),
    "umt5": t5_settings(T5Config(**T5_SIZES)),
    "clip-vision": clip_vision_settings(
        CLIPVisionConfig(
            blocks=2, width=80, heads=1, mlp_width=7, patch=2, image_size=6, projection=4,
            activation=ORIGINAL_CLIP.activation, epsilon=ORIGINAL_CLIP.epsilon,
        )
    ),
    "t5": t5_settings(T5Config(**T5_SIZES, per_block_bias=False)),
    "clip-text": clip_text_settings(
        CLIPTextConfig(
            blocks=2, width=64, heads=1, mlp_width=7, vocab_size=11, positions=5, end_token=HIGHEST_ID,
            activation="quick_gelu",
        )
    ),
}  # fmt: skip
# The names of components whose authors take them from transformers, keys and all.
OF_TRANSFORMERS = ("t5", "clip-text")
WAN_PIPELINE = {"transformer": "wan", "vae": "wan-vae", "text_encoder": "umt5"}
FLUX_PIPELINE = {"transformer": "flux-dev", "vae": "flux-vae", "text_encoder": "clip-text", "text_encoder_2": "t5"}


def component(name: str) -> Component:
    return component_of(SETTINGS[name], Path(name))


def tensors(
    name: str, layout: Literal["diffusers", "original"] = "original", dtype=np.float32
) -> dict[str, np.ndarray]:
    """The tensors, under a layout's keys, of one model of random weights of ordinary size."""
    described, rng = component(name), np.random.default_rng(0)
    layout = "diffusers" if name in OF_TRANSFORMERS else layout
    stacked = {row.ours for row in described.rows if "{i}" in row.diffusers}
    leaves = {
        path: _leaf(rng.standard_normal(shape, np.float32).astype(dtype), path in stacked)
        for path, shape in described.shapes.items()
    }
    return {out.key: contiguous(out.read()) for out in tensors_from_leaves(leaves, described.rows, layout)}


def _leaf(array: np.ndarray, stacked: bool) -> Leaf:
    return Leaf(array.shape, array.dtype, stacked, lambda block: array if block is None else array[block])


def single_file(file: Path, name: str, dtype=np.float32, prefix: str = "") -> Path:
    """A file of the authors with nothing beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + key: array for key, array in tensors(name, dtype=dtype).items()}, file)
    return file


def model_folder(folder: Path, name: str, dtype=np.float32) -> Path:
    """A lone model of diffusers or transformers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SETTINGS[name]))
    save_file(tensors(name, "diffusers", dtype), folder / f"{component(name).stem}.safetensors")
    return folder


def pipeline_folder(folder: Path, parts: dict[str, str], dtype=np.float32) -> Path:
    """A pipeline of diffusers: component -> name of its settings."""
    index = {}
    for place, name in parts.items():
        model_folder(folder / place, name, dtype)
        library = "diffusers" if "_class_name" in SETTINGS[name] else "transformers"
        index[place] = [library, component(name).class_name]
    for tokenizer in [place.replace("text_encoder", "tokenizer") for place in parts if "text_encoder" in place]:
        (folder / tokenizer).mkdir()
        (folder / tokenizer / "tokenizer.json").write_text('{"of": "' + tokenizer + '"}')
        index[tokenizer] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Tiny", **index}))
    return folder
