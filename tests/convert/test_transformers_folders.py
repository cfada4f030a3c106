"""Lone folders of transformers, with the keys' prefix of older versions or without, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from convert.checkpoint import open_checkpoint
from convert.summary import summarise
from convert.transfer import convert

T5_SIZES = dict(vocab_size=13, d_model=12, d_kv=2, d_ff=5, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
CLIP_SIZES = dict(hidden_size=12, intermediate_size=7, num_hidden_layers=2, num_attention_heads=3)
VISION = CLIPVisionConfig(**CLIP_SIZES, image_size=6, patch_size=2, projection_dim=5)
MODELS = {
    "T5EncoderModel": lambda: T5EncoderModel(T5Config(**T5_SIZES)),
    "UMT5EncoderModel": lambda: UMT5EncoderModel(UMT5Config(**T5_SIZES)),
    "CLIPTextModel": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_SIZES, vocab_size=11, max_position_embeddings=5)),
    "CLIPVisionModel": lambda: CLIPVisionModel(VISION),
    "CLIPVisionModelWithProjection": lambda: CLIPVisionModelWithProjection(VISION),
}
PREFIXES = {"CLIPTextModel": "text_model.", "CLIPVisionModel": "vision_model."}


def saved(folder: Path, name: str, dtype) -> Path:
    model, generator = MODELS[name](), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(folder)
    return folder


def as_version_4(folder: Path, prefix: str) -> None:
    """With the prefix that transformers 5 leaves out."""
    file = folder / "model.safetensors"
    save_file({prefix + key: array for key, array in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.57.1"}))


def round_trip(source: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(source), tmp_path / "native", "native")
    convert(open_checkpoint(tmp_path / "native"), tmp_path / "again", "diffusers")
    expected, found = load_file(source / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype, key
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    assert (tmp_path / "again" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_todays_transformers(name, dtype, tmp_path):
    source = saved(tmp_path / "source", name, dtype)
    round_trip(source, tmp_path)
    again = type(MODELS[name]()).from_pretrained(tmp_path / "again").state_dict()
    stored = type(MODELS[name]()).from_pretrained(source).state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in stored.items())


@pytest.mark.parametrize("name", PREFIXES)
def test_a_folder_of_an_older_transformers_keeps_its_prefix(name, tmp_path):
    source = saved(tmp_path / "source", name, torch.float32)
    as_version_4(source, PREFIXES[name])
    round_trip(source, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_inspect_tells_the_class(name, tmp_path):
    summary = summarise(open_checkpoint(saved(tmp_path / "source", name, torch.bfloat16)))
    assert (summary.kind, summary.layout, summary.dtypes) == (name, "diffusers", ["bfloat16"])
    assert summary.variant == "2 blocks of width 12"
