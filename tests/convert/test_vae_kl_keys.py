"""The table of FLUX's autoencoder: the authors' keys by diffusers' own converter, there and back, every size."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TheirAutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from flax import nnx

from convert.checkpoint import load_model, open_checkpoint
from convert.components import component_of
from convert.tables import assign
from convert.vae_kl import config_to_diffusers, vae_kl_rows
from dit_jax.config import UserError
from dit_jax.models.vae_kl import FLUX_VAE, AutoencoderKL, AutoencoderKLConfig
from dit_jax.parameters import named_leaves

CONFIGS = [
    AutoencoderKLConfig(widths=(4, 8, 12), blocks=2, groups=2, z_dim=3),
    AutoencoderKLConfig(widths=(6, 4), blocks=1, groups=2, z_dim=2, quant_conv=True, post_quant_conv=True),
    AutoencoderKLConfig(widths=(4, 4), blocks=1, groups=2, z_dim=2, middle_attention=False),
]


def their_vae(config):
    return TheirAutoencoderKL(**{key: value for key, value in config_to_diffusers(config).items() if key[0] != "_"})


def abstract(config):
    return nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))


def random_model(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract(config))


def written(model, layout):
    leaves, rows = dict(named_leaves(model)), vae_kl_rows(model.config)
    return {row.key(layout): row.to_outside(leaves[row.ours], layout) for row in rows}


def shapes(layout, config):
    sizes = {name: leaf.shape for name, leaf in named_leaves(abstract(config))}
    return {row.key(layout): row.outside_shape(sizes[row.ours], layout) for row in vae_kl_rows(config)}


@pytest.mark.parametrize("config", CONFIGS)
def test_original_keys_are_those_that_diffusers_converts(config):
    model = random_model(config)
    original = {key: torch.from_numpy(tensor) for key, tensor in written(model, "original").items()}
    converted = convert_ldm_vae_checkpoint(original, config_to_diffusers(config))
    expected = written(model, "diffusers")
    assert converted.keys() == expected.keys() == their_vae(config).state_dict().keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(converted[key].numpy(), tensor, err_msg=key)


def test_original_keys_are_spelled_as_the_authors_spell_them():
    """What that converter would let through under another name, in the spelling of `ae.safetensors`."""
    found = shapes("original", FLUX_VAE)
    assert len(found) == 244
    assert (
        found.items()
        >= {
            "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
            "encoder.down.2.downsample.conv.bias": (512,),
            "encoder.down.3.block.1.norm2.bias": (512,),
            "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
            "encoder.mid.block_2.conv1.weight": (512, 512, 3, 3),
            "encoder.norm_out.weight": (512,),
            "encoder.conv_out.weight": (32, 512, 3, 3),
            "decoder.conv_in.weight": (512, 16, 3, 3),
            "decoder.mid.attn_1.norm.weight": (512,),
            "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
            "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
            "decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
            "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
            "decoder.up.3.block.0.conv1.weight": (512, 512, 3, 3),
            "decoder.norm_out.bias": (128,),
            "decoder.conv_out.weight": (3, 128, 3, 3),
        }.items()
    )
    assert not [key for key in found if "quant" in key or "up.0.upsample" in key or "down.3.downsample" in key]


def test_the_published_size_is_that_of_diffusers():
    with torch.device("meta"):
        theirs = their_vae(FLUX_VAE)
    assert shapes("diffusers", FLUX_VAE) == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert sum(leaf.size for _, leaf in named_leaves(abstract(FLUX_VAE))) == 83_819_683


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back_bit_for_bit(config, layout):
    model = random_model(config)
    again = dict(named_leaves(assign(abstract(config), vae_kl_rows(config), written(model, layout), layout)))
    for name, leaf in named_leaves(model):
        np.testing.assert_array_equal(again[name], leaf, err_msg=name)


def test_a_folder_of_diffusers_is_read(tmp_path):
    theirs = their_vae(CONFIGS[0])
    theirs.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]})
    )
    model = load_model(open_checkpoint(tmp_path), "vae")
    assert isinstance(model, AutoencoderKL) and model.config == CONFIGS[0]
    for key, tensor in written(jax.tree.map(np.asarray, model), "diffusers").items():
        np.testing.assert_array_equal(tensor, theirs.state_dict()[key].numpy(), err_msg=key)


def test_a_config_that_makes_no_model_is_told(tmp_path):
    settings = config_to_diffusers(FLUX_VAE)
    with pytest.raises(UserError, match="multiple of its 48 norm groups"):
        component_of(settings | {"norm_num_groups": 48}, tmp_path)
    with pytest.raises(UserError, match="cannot be used"):
        component_of(settings | {"block_out_channels": None}, tmp_path)
