"""CLIP's text tower: keys with and without `text_model.`, configs, and checkpoints there and back."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextConfig as TheirConfig
from transformers import CLIPTextModel

from convert.checkpoint import load_model, open_checkpoint
from convert.encoders import canonical_clip_text_key, clip_text_config, clip_text_prefixed, clip_text_settings
from convert.transfer import convert
from dit_jax.config import UserError
from dit_jax.models.clip_text import CLIP_L, CLIPText, CLIPTextConfig
from dit_jax.parameters import named_leaves

TINY = CLIPTextConfig(blocks=3, width=6, heads=2, mlp_width=7, vocab_size=11, positions=5, activation="quick_gelu")
WEIGHTS = "model.safetensors"


def saved(folder, dtype=torch.float32):
    """A tower that transformers itself saved."""
    model = CLIPTextModel(TheirConfig(**clip_text_settings(TINY)))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    model.to(dtype).save_pretrained(folder)
    return folder


def as_version_4(source, folder):
    """The same as transformers 4 saves it: prefixed keys, and the positions' numbers as some releases have them."""
    tensors = {f"text_model.{key}": tensor for key, tensor in load_file(source / WEIGHTS).items()}
    numbers = np.arange(TINY.positions)[None]
    settings = json.loads((source / "config.json").read_text()) | {"transformers_version": "4.43.3"}
    folder.mkdir()
    save_file(tensors | {"text_model.embeddings.position_ids": numbers}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def round_trip(source, tmp_path):
    """(native, diffusers again) of a checkpoint."""
    native, again = tmp_path / "native", tmp_path / "again"
    convert(open_checkpoint(source), native, "native")
    convert(open_checkpoint(native), again, "diffusers")
    return native, again


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_transformers_saves_survives(dtype, tmp_path):
    source = saved(tmp_path / "source", dtype)
    _, again = round_trip(source, tmp_path)
    assert_same_tensors(load_file(again / WEIGHTS), load_file(source / WEIGHTS))
    assert (again / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not any(key.startswith("text_model.") for key in load_file(source / WEIGHTS))


def test_what_version_4_saved_survives(tmp_path):
    source = as_version_4(saved(tmp_path / "version 5"), tmp_path / "source")
    _, again = round_trip(source, tmp_path)
    expected = load_file(source / WEIGHTS)
    del expected["text_model.embeddings.position_ids"]
    assert_same_tensors(load_file(again / WEIGHTS), expected)


def test_both_spellings_give_the_same_model(tmp_path):
    new = saved(tmp_path / "new")
    old = as_version_4(new, tmp_path / "old")
    expected = dict(named_leaves(load_model(new)))
    for name, leaf in named_leaves(load_model(old)):
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.parametrize("version", [4, 5])
def test_transformers_opens_what_we_write(version, tmp_path):
    source = saved(tmp_path / "new")
    reference = CLIPTextModel.from_pretrained(source).state_dict()
    _, again = round_trip(source if version == 5 else as_version_4(source, tmp_path / "old"), tmp_path)
    found, report = CLIPTextModel.from_pretrained(again, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in reference.items())


def test_keys_on_disk():
    key = "text_model.final_layer_norm.bias"
    assert canonical_clip_text_key(key) == canonical_clip_text_key("final_layer_norm.bias") == key
    beside = ("text_model.embeddings.position_ids", "embeddings.position_ids", "text_projection.weight", "logit_scale")
    for name in (*beside, "vision_model.embeddings.class_embedding", "visual_projection.weight"):
        assert canonical_clip_text_key(name) is None


def test_prefix_follows_the_version():
    assert clip_text_prefixed({}) and clip_text_prefixed({"transformers_version": "4.57.1"})
    assert not clip_text_prefixed({"transformers_version": "5.0.0"})


@pytest.mark.parametrize("config", [TINY, CLIP_L, replace(TINY, activation="gelu", epsilon=1e-6, end_token=10)])
def test_config_survives_both_directions(config, tmp_path):
    assert clip_text_config(clip_text_settings(config)) == config
    TheirConfig(**clip_text_settings(config)).save_pretrained(tmp_path)
    assert clip_text_config(json.loads((tmp_path / "config.json").read_text())) == config


def test_defaults_are_those_of_transformers():
    assert clip_text_config({}) == clip_text_config(TheirConfig().to_dict())


def test_the_preset_is_what_the_hub_has():
    """openai/clip-vit-large-patch14's text config, as FLUX's text_encoder/config.json has it."""
    settings = {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
        "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "projection_dim": 768, "vocab_size": 49408,
    }  # fmt: skip
    assert clip_text_config(settings) == CLIP_L


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "t5"}, "model_type: expected clip_text_model, found 't5'"),
        ({"hidden_act": "relu"}, "hidden_act: expected gelu or quick_gelu, found 'relu'"),
        ({"eos_token_id": [2, 5]}, r"eos_token_id: expected one integer, found \[2, 5\]"),
        ({"eos_token_id": None}, "eos_token_id: expected one integer, found None"),
    ],
)
def test_refuses_other_models(settings, message):
    with pytest.raises(UserError, match=message):
        clip_text_config(settings)


def test_the_model_is_ours(tmp_path):
    model = load_model(saved(tmp_path / "source"))
    assert isinstance(model, CLIPText) and model.config == TINY
