"""Small pipelines with random weights of ordinary size, saved by diffusers and transformers themselves."""

import contextlib
import json
import os
import resource
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def largest_file():
    """A context in which no file may exceed a number of bytes: to the code under test, a disk that fills up."""

    @contextlib.contextmanager
    def limited(size: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def _randomised(model, torch, dtype=None):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype or torch.float32)


def _transformer(torch, image):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, text_dim=24, freq_dim=16, ffn_dim=40,
        in_channels=36 if image else 16, out_channels=16, num_layers=3,
        image_dim=80 if image else None, added_kv_proj_dim=24 if image else None,
    )  # fmt: skip
    return _randomised(model, torch, torch.bfloat16)


def _vae(torch):
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 4, 4])
    return _randomised(model, torch)


def _text_encoder(torch):
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=37, d_model=24, d_ff=20, d_kv=6, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu"
    )  # fmt: skip
    return _randomised(UMT5EncoderModel(config), torch, torch.float16)


def _image_encoder(torch, projection):
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=80, intermediate_size=44, num_hidden_layers=2, num_attention_heads=1, image_size=28, patch_size=14,
        hidden_act="gelu", projection_dim=10,
    )  # fmt: skip
    return _randomised((CLIPVisionModelWithProjection if projection else CLIPVisionModel)(config), torch)


def _save(folder: Path, *, image: bool, projection: bool = False) -> Path:
    import torch

    _transformer(torch, image).save_pretrained(folder / "transformer")
    _vae(torch).save_pretrained(folder / "vae")
    _text_encoder(torch).save_pretrained(folder / "text_encoder")
    index = {
        "_class_name": "WanImageToVideoPipeline" if image else "WanPipeline",
        "_diffusers_version": "0.42.1",
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "boundary_ratio": None,
    }
    if image:
        model = _image_encoder(torch, projection)
        model.save_pretrained(folder / "image_encoder")
        index["image_encoder"] = ["transformers", type(model).__name__]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
        (folder / "image_processor").mkdir()
        (folder / "image_processor" / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 28}}')
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"flow_shift":   3.0}\n')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "tokenizer" / "spiece.model").write_bytes(bytes(range(256)))
    (folder / "generation_defaults.json").write_text('{"steps": 5}')
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def text_pipeline(tmp_path_factory) -> Path:
    """A text-to-video pipeline: transformer in bf16, text encoder in fp16, VAE in fp32."""
    return _save(tmp_path_factory.mktemp("text-to-video"), image=False)


@pytest.fixture(scope="session")
def image_pipeline(tmp_path_factory) -> Path:
    """An image-to-video pipeline whose CLIP has no projection."""
    return _save(tmp_path_factory.mktemp("image-to-video"), image=True)


@pytest.fixture(scope="session")
def projecting_pipeline(tmp_path_factory) -> Path:
    """An image-to-video pipeline whose CLIP has its projection, as the authors' file has."""
    return _save(tmp_path_factory.mktemp("projecting"), image=True, projection=True)


@pytest.fixture(scope="session")
def lora_flux(tmp_path_factory):
    """A tiny FLUX transformer that LoRAs are merged into, in diffusers and here."""
    import lora_models

    folder = tmp_path_factory.mktemp("lora-flux")
    return lora_models.Tiny(folder, lora_models.flux_model, lora_models.FLUX_MODULES, lora_models.FluxPipeline)


@pytest.fixture(scope="session")
def lora_wan(tmp_path_factory):
    """A tiny Wan transformer that LoRAs are merged into, in diffusers and here."""
    import lora_models

    folder = tmp_path_factory.mktemp("lora-wan")
    return lora_models.Tiny(folder, lora_models.wan_model, lora_models.WAN_MODULES, lora_models.WanPipeline)


@pytest.fixture(scope="session")
def lora_wan_image(tmp_path_factory):
    """As `lora_wan`, of an image-to-video model."""
    import lora_models

    folder = tmp_path_factory.mktemp("lora-wan-image")
    return lora_models.Tiny(folder, lora_models.wan_image_model, lora_models.WAN_MODULES, lora_models.WanPipeline)
