"""The configs of a pipeline whose authors publish weights alone: its index, its scheduler, how it reads an image."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from convert.components import Settings, class_name
from convert.wan import LOW_NOISE

# As in diffusers' folders of Wan 2.1; its authors use a shift of 5 for text to video and at 720p.
_WAN_SCHEDULER = {
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
_FLUX_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
_IMAGE_PROCESSOR = {
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
# Class of a text encoder -> that of its tokenizer, whose folder is named after the encoder's.
_TOKENIZERS = {
    "UMT5EncoderModel": "T5TokenizerFast",
    "T5EncoderModel": "T5TokenizerFast",
    "CLIPTextModel": "CLIPTokenizer",
}


def pipeline_configs(settings: Mapping[str, Settings], folders: Collection[str]) -> dict[str, Any]:
    """Place in a diffusers folder -> config, of everything but the components with weights.

    settings  component -> config, a transformer among them
    folders   the folders of other files that are there (tokenizers)
    """
    named = {name: class_name(config) for name, config in settings.items()}
    scheduler = _scheduler(settings)
    configs = {"scheduler/scheduler_config.json": scheduler}
    index: dict[str, Any] = {
        "_class_name": _pipeline(settings),
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    if LOW_NOISE in settings:
        index["boundary_ratio"] = 0.9 if _takes_image(settings) else 0.875
    if _has_residual_vae(settings):
        index["expand_timesteps"] = True
    for name, its_class in named.items():
        index[name] = ["diffusers" if "_class_name" in settings[name] else "transformers", its_class]
        tokenizer = name.replace("text_encoder", "tokenizer")
        if tokenizer in folders and its_class in _TOKENIZERS:
            index[tokenizer] = ["transformers", _TOKENIZERS[its_class]]
    if "image_encoder" in settings:
        configs["image_processor/preprocessor_config.json"] = _IMAGE_PROCESSOR
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    return configs | {"model_index.json": {"_class_name": index.pop("_class_name"), **dict(sorted(index.items()))}}


def _pipeline(settings: Mapping[str, Settings]) -> str:
    if class_name(settings["transformer"]) == "FluxTransformer2DModel":
        return "FluxPipeline"
    return "WanImageToVideoPipeline" if _takes_image(settings) else "WanPipeline"


def _takes_image(settings: Mapping[str, Settings]) -> bool:
    return settings["transformer"]["in_channels"] > settings["transformer"]["out_channels"]


def _has_residual_vae(settings: Mapping[str, Settings]) -> bool:
    """Of Wan 2.2's TI2V alone."""
    return bool(settings.get("vae", {}).get("is_residual"))


def _scheduler(settings: Mapping[str, Settings]) -> dict[str, Any]:
    transformer = settings["transformer"]
    if class_name(transformer) == "FluxTransformer2DModel":
        dev = bool(transformer["guidance_embeds"])
        return _FLUX_SCHEDULER | {"use_dynamic_shifting": dev, "shift": 3.0 if dev else 1.0}
    if LOW_NOISE in settings:
        return _WAN_SCHEDULER | {"flow_shift": 5.0 if _takes_image(settings) else 12.0}
    if transformer.get("pos_embed_seq_len"):
        return _WAN_SCHEDULER | {"flow_shift": 16.0}
    return _WAN_SCHEDULER | ({"flow_shift": 5.0} if _has_residual_vae(settings) else {})
