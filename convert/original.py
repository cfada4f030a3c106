"""The authors' layout of Wan 2.1: which file holds which component, and the diffusers configs that it implies.

A folder in this layout has one flat file of weights a component, one `config.json` (of the transformer) and a folder of
the tokenizer. What diffusers keeps in configs the authors keep in code, so a true release is described from its shapes
and from constants. A folder that we wrote also has `diffusers_configs.json`, which is then believed instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.components import Settings, class_in_index, read_json, usable_config, with_class
from convert.encoders import ORIGINAL_CLIP, canonical_clip_vision_key, clip_vision_settings, t5_settings
from convert.safetensors_files import WEIGHT_SUFFIXES, Tensor, read_tensors
from convert.vae_wan import config_to_diffusers
from convert.wan import wan_config, wan_original_settings, wan_settings
from dit_jax.config import UserError
from dit_jax.models.t5 import UMT5_XXL
from dit_jax.models.vae_wan import WanVAEConfig
from dit_jax.models.wan import WanConfig

CONFIGS = "diffusers_configs.json"
TRANSFORMER = "transformer"
TOKENIZER = "google/umt5-xxl"
# Component -> stem of its file; the transformer comes first.
STEMS = {
    TRANSFORMER: "diffusion_pytorch_model",
    "vae": "Wan2.1_VAE",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
}


def is_original(folder: Path) -> bool:
    """Whether a folder is in the authors' layout."""
    if any(_present(folder, name) for name in STEMS if name != TRANSFORMER):
        return True
    return _present(folder, TRANSFORMER) and "dim" in _read_config(folder)


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a component; "" is the transformer on its own."""
    name = name or TRANSFORMER
    tensors = read_tensors(folder, STEMS[name])
    if name != "image_encoder":
        return tensors
    # The file holds CLIP's text tower too, which Wan never reads.
    return {key: tensor for key, tensor in tensors.items() if canonical_clip_vision_key(key) is not None}


def describe(folder: Path) -> tuple[dict[str, Settings], dict[str, Path | bytes]]:
    """(component -> its diffusers config, place in a diffusers folder -> file or contents) of a folder in this layout.

    Raises UserError when the transformer is missing: without it the other files are no pipeline.
    """
    if not _present(folder, TRANSFORMER):
        raise UserError(f"{folder} lacks {STEMS[TRANSFORMER]}.safetensors, the transformer of the original Wan layout.")
    names = [name for name in STEMS if _present(folder, name)]
    configs = _written_configs(folder) or _implied_configs(folder, names)
    index = configs.get("model_index.json", {})
    settings = {
        _parent(place): with_class(config, class_in_index(index.get(_parent(place))) or "")
        for place, config in configs.items()
        if Path(place).name == "config.json"
    }
    if set(settings) != set(names) and set(settings) != {""}:
        raise UserError(f"{folder} has weights for {', '.join(names)}, but {CONFIGS} describes {', '.join(settings)}.")
    files: dict[str, Path | bytes] = {place: _json(config) for place, config in configs.items()}
    tokenizer = folder / TOKENIZER
    if tokenizer.is_dir():
        files |= {f"tokenizer/{file.name}": file for file in sorted(tokenizer.iterdir()) if file.is_file()}
    return settings, files


def side_files(settings: Mapping[str, Settings], files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """Everything but weights that a folder in this layout gets: the counterpart of `describe`."""
    place = TRANSFORMER if TRANSFORMER in settings else ""
    if place not in settings or settings[place].get("_class_name") != "WanTransformer3DModel":
        raise UserError(
            "the original layout exists for Wan pipelines and Wan transformers only; use --layout diffusers."
        )
    beyond = [name for name in settings if name not in (*STEMS, "")]
    if beyond:
        raise UserError(f"the original Wan layout has no place for {', '.join(beyond)}; use --layout diffusers.")
    out: dict[str, Path | bytes] = {"config.json": _json(wan_original_settings(wan_config(settings[place])))}
    configs: dict[str, Any] = {}
    for where, content in files.items():
        if _parent(where) == "tokenizer":
            out[f"{TOKENIZER}/{Path(where).name}"] = content
        elif where.endswith(".json"):
            configs[where] = json.loads(content) if isinstance(content, bytes) else read_json(content)
        else:
            out[where] = content
    return out | {CONFIGS: _json(configs)}


def _present(folder: Path, name: str) -> bool:
    return any((folder / f"{STEMS[name]}{suffix}").is_file() for suffix in WEIGHT_SUFFIXES)


def _parent(place: str) -> str:
    return place.rpartition("/")[0]


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _read_config(folder: Path) -> Settings:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _written_configs(folder: Path) -> dict[str, Any]:
    file = folder / CONFIGS
    configs = read_json(file) if file.is_file() else {}
    odd = [place for place, config in configs.items() if not isinstance(config, dict) or not _inside(place)]
    if odd:
        raise UserError(f"{file}: {odd[0]!r} should be the place of a config inside the folder; convert again.")
    return configs


def _inside(place: str) -> bool:
    return not Path(place).is_absolute() and ".." not in Path(place).parts


def _implied_configs(folder: Path, names: list[str]) -> dict[str, Any]:
    """Place in a diffusers folder -> config, for a true release."""
    tensors = {name: read(folder, name) for name in names if name != "vae"}
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} lacks config.json, which gives the transformer's heads; download it again.")
    with usable_config("WanModel", folder / "config.json"):
        config = wan_config(_read_config(folder))
    transformer = _transformer(config, tensors[TRANSFORMER])
    if names == [TRANSFORMER]:
        return {"config.json": transformer}
    configs: dict[str, Any] = {"transformer/config.json": transformer, "scheduler/scheduler_config.json": SCHEDULER}
    if "vae" in names:
        configs["vae/config.json"] = config_to_diffusers(WanVAEConfig())
    if "text_encoder" in names:
        configs["text_encoder/config.json"] = _umt5(tensors["text_encoder"])
    if "image_encoder" in names:
        configs["image_encoder/config.json"] = _clip_vision(tensors["image_encoder"])
        configs["image_processor/preprocessor_config.json"] = IMAGE_PROCESSOR
    configs["model_index.json"] = _model_index(configs)
    return configs


def _transformer(config: WanConfig, tensors: Mapping[str, Tensor]) -> Settings:
    """The authors' config leaves out what their code fixes; the shapes tell."""
    settings = wan_settings(config)
    settings["text_dim"] = _shape(tensors, "text_embedding.0.weight", "width", "text width")[1]
    settings["patch_size"] = list(_shape(tensors, "patch_embedding.weight", "width", "channels", "t", "y", "x")[2:])
    if "img_emb.proj.1.weight" in tensors:
        settings["image_dim"] = _shape(tensors, "img_emb.proj.1.weight", "hidden width", "image width")[1]
        settings["added_kv_proj_dim"] = config.width
    if "img_emb.emb_pos" in tensors:
        settings["pos_embed_seq_len"] = _shape(tensors, "img_emb.emb_pos", "1", "positions", "image width")[1]
    return settings


def _umt5(tensors: Mapping[str, Tensor]) -> Settings:
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


def _clip_vision(tensors: Mapping[str, Tensor]) -> Settings:
    width, channels, patch, _ = _shape(tensors, "visual.patch_embedding.weight", "width", "channels", "y", "x")
    positions = _shape(tensors, "visual.pos_embedding", "1", "positions", "width")[1]
    config = replace(
        ORIGINAL_CLIP,
        width=width,
        heads=width * ORIGINAL_CLIP.heads // ORIGINAL_CLIP.width,  # no shape tells the width of a head
        mlp_width=_shape(tensors, "visual.transformer.0.mlp.0.weight", "hidden width", "width")[0],
        blocks=_depth(tensors, "visual.transformer."),
        channels=channels,
        patch=patch,
        image_size=round((positions - 1) ** 0.5) * patch,
        projection=_shape(tensors, "visual.head", "width", "projection")[1],
    )
    return clip_vision_settings(config)


def _shape(tensors: Mapping[str, Tensor], key: str, *axes: str) -> tuple[int, ...]:
    """The shape of a tensor, one size for each of the names `axes`."""
    if key not in tensors:
        where = next((tensor.file for tensor in tensors.values()), "the file")
        raise UserError(f"{where} lacks {key}; expected the original Wan layout; download the weights again.")
    shape = tensors[key].shape
    if len(shape) != len(axes) or 0 in shape:
        raise UserError(
            f"{tensors[key].file}: {key} has shape {shape}, expected ({', '.join(axes)}), none of them 0; "
            "download the weights again."
        )
    return shape


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    numbers = (re.match(rf"{re.escape(prefix)}(\d+)\.", key) for key in tensors)
    return len({number[1] for number in numbers if number})


def _model_index(configs: Mapping[str, Any]) -> dict[str, Any]:
    with_image = "image_encoder/config.json" in configs
    index: dict[str, Any] = {"_class_name": "WanImageToVideoPipeline" if with_image else "WanPipeline"}
    if with_image:
        index["image_encoder"] = ["transformers", configs["image_encoder/config.json"]["architectures"][0]]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    index["scheduler"] = ["diffusers", SCHEDULER["_class_name"]]
    if "text_encoder/config.json" in configs:
        index |= {
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "T5TokenizerFast"],
        }
    index["transformer"] = ["diffusers", "WanTransformer3DModel"]
    if "vae/config.json" in configs:
        index["vae"] = ["diffusers", "AutoencoderKLWan"]
    return index


# The published settings for 480p; at 720p the authors use a shift of 5.
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "solver_order": 2,
    "solver_type": "bh2",
    "prediction_type": "flow_prediction",
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
