"""FLUX's table: every key of Black Forest Labs against diffusers' own converter, and all ways there and back."""

import types

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.numpy import load_file

from convert.checkpoint import load_model, open_checkpoint
from convert.components import component_of
from convert.flux import flux_config, flux_rows
from convert.leaves import leaves_from_tensors, tensors_from_leaves
from convert.safetensors_files import Tensor
from convert.transfer import convert
from dit_jax.config import UserError
from dit_jax.models.flux import FLUX_DEV, FLUX_SCHNELL, Flux
from dit_jax.parameters import named_leaves

DEV = dict(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=3,
    joint_attention_dim=10, pooled_projection_dim=14, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
)  # fmt: skip
SCHNELL = DEV | {"guidance_embeds": False, "num_layers": 1}
MODELS = pytest.mark.parametrize("settings", [DEV, SCHNELL], ids=["dev", "schnell"])
WIDTH, HIDDEN = 24, 96
WEIGHTS = "diffusion_pytorch_model.safetensors"


def original_shapes(settings):
    """Keys and shapes of a Black Forest Labs file (those of flux1-dev.safetensors, at our sizes)."""

    def linear(name, inputs, outputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes = linear("img_in", 16, WIDTH) | linear("txt_in", 10, WIDTH) | linear("final_layer.linear", WIDTH, 16)
    shapes |= linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    for name, inputs in (("time_in", 256), ("vector_in", 14), ("guidance_in", 256)):
        if name != "guidance_in" or settings["guidance_embeds"]:
            shapes |= linear(f"{name}.in_layer", inputs, WIDTH) | linear(f"{name}.out_layer", WIDTH, WIDTH)
    for block in (f"double_blocks.{i}.{stream}" for i in range(settings["num_layers"]) for stream in ("img", "txt")):
        shapes |= linear(f"{block}_mod.lin", WIDTH, 6 * WIDTH) | linear(f"{block}_attn.qkv", WIDTH, 3 * WIDTH)
        shapes |= linear(f"{block}_attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}_mlp.0", WIDTH, HIDDEN) | linear(f"{block}_mlp.2", HIDDEN, WIDTH)
        shapes |= {f"{block}_attn.norm.{name}_norm.scale": (8,) for name in ("query", "key")}
    for block in (f"single_blocks.{i}" for i in range(settings["num_single_layers"])):
        shapes |= linear(f"{block}.modulation.lin", WIDTH, 3 * WIDTH)
        shapes |= linear(f"{block}.linear1", WIDTH, 3 * WIDTH + HIDDEN)
        shapes |= linear(f"{block}.linear2", WIDTH + HIDDEN, WIDTH)
        shapes |= {f"{block}.norm.{name}_norm.scale": (8,) for name in ("query", "key")}
    return shapes


def original_tensors(settings, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        key: rng.standard_normal(shape, np.float32).astype(dtype) for key, shape in original_shapes(settings).items()
    }


def with_width(function, width):
    """diffusers' converter, which has FLUX's true width written into it, for another width."""
    constants = function.__code__.co_consts
    assert constants.count(3072) == 1
    code = function.__code__.replace(co_consts=tuple(width if value == 3072 else value for value in constants))
    return types.FunctionType(code, function.__globals__)


def by_diffusers(tensors):
    """Diffusers' tensors of Black Forest Labs' ones, as diffusers itself converts them."""
    checkpoint = {key: torch.tensor(tensor) for key, tensor in tensors.items()}
    converted = with_width(convert_flux_transformer_checkpoint_to_diffusers, WIDTH)(checkpoint)
    assert not checkpoint, "keys that diffusers does not read"
    return {key: tensor.numpy() for key, tensor in converted.items()}


def component(settings, tmp_path):
    return component_of({"_class_name": "FluxTransformer2DModel"} | settings, tmp_path)


def leaves_of(tensors, flux, layout, tmp_path):
    on_disk = {
        key: Tensor(key=key, file=tmp_path, dtype=tensor.dtype, shape=tensor.shape, read=lambda tensor=tensor: tensor)
        for key, tensor in tensors.items()
    }
    return leaves_from_tensors(on_disk, flux.rows, flux.shapes, layout, tmp_path)


def tensors_of(leaves, flux, layout):
    return {out.key: out.read() for out in tensors_from_leaves(leaves, flux.rows_to_write(layout), layout)}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert found[key].tobytes() == tensor.tobytes(), key


@MODELS
def test_original_to_diffusers_is_what_diffusers_makes_of_it(settings, tmp_path):
    flux, tensors = component(settings, tmp_path), original_tensors(settings)
    leaves = leaves_of(tensors, flux, "original", tmp_path)
    assert_same_tensors(tensors_of(leaves, flux, "diffusers"), by_diffusers(tensors))


@MODELS
def test_diffusers_to_original_undoes_what_diffusers_makes_of_it(settings, tmp_path):
    flux, tensors = component(settings, tmp_path), original_tensors(settings)
    leaves = leaves_of(by_diffusers(tensors), flux, "diffusers", tmp_path)
    assert_same_tensors(tensors_of(leaves, flux, "original"), tensors)


@MODELS
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_there_and_back_bit_for_bit(layout, dtype, settings, tmp_path):
    flux, tensors = component(settings, tmp_path), original_tensors(settings, dtype)
    if layout == "diffusers":
        tensors = tensors_of(leaves_of(tensors, flux, "original", tmp_path), flux, "diffusers")
    leaves = leaves_of(tensors, flux, layout, tmp_path)
    assert_same_tensors(tensors_of(leaves, flux, layout), tensors)


@MODELS
def test_both_layouts_give_the_same_leaves(settings, tmp_path):
    flux, tensors = component(settings, tmp_path), original_tensors(settings)
    one = leaves_of(tensors, flux, "original", tmp_path)
    other = leaves_of(by_diffusers(tensors), flux, "diffusers", tmp_path)
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf.block(None), other[name].block(None), err_msg=name)


def test_the_authors_put_shift_before_scale(tmp_path):
    flux, tensors = component(DEV, tmp_path), original_tensors(DEV)
    leaves = leaves_of(tensors, flux, "original", tmp_path)
    shift, scale = np.split(tensors["final_layer.adaLN_modulation.1.weight"].T, 2, axis=1)
    np.testing.assert_array_equal(leaves["out_shift.kernel"].block(None), shift)
    np.testing.assert_array_equal(leaves["out_scale.kernel"].block(None), scale)


def test_a_checkpoint_of_diffusers_survives_on_disk(tmp_path):
    source, native, again = tmp_path / "source", tmp_path / "native", tmp_path / "again"
    model = FluxTransformer2DModel(**DEV)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    model.to(torch.bfloat16).save_pretrained(source)
    convert(open_checkpoint(source), native, "native")
    convert(open_checkpoint(native), again, "diffusers")
    assert_same_tensors(load_file(again / WEIGHTS), load_file(source / WEIGHTS))
    assert (again / "config.json").read_bytes() == (source / "config.json").read_bytes()
    found, report = FluxTransformer2DModel.from_pretrained(again, output_loading_info=True, torch_dtype=torch.bfloat16)
    assert not any(report.values())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in found.state_dict().items())
    ours = load_model(native)
    assert isinstance(ours, Flux) and {leaf.dtype.name for _, leaf in named_leaves(ours)} == {"bfloat16"}


@MODELS
def test_diffusers_has_the_same_keys_and_shapes(settings):
    theirs = FluxTransformer2DModel(**settings).state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    assert {key: tensor.shape for key, tensor in by_diffusers(original_tensors(settings)).items()} == expected


@pytest.mark.parametrize(("config", "guidance"), [(FLUX_DEV, True), (FLUX_SCHNELL, False)])
def test_published_configs(config, guidance):
    """transformer/config.json on the hub; that of schnell leaves out `axes_dims_rope`."""
    settings = {
        "_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "guidance_embeds": guidance,
        "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19,
        "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768,
    }  # fmt: skip
    assert flux_config(settings) == config
    assert len(flux_rows(config)) == len({row.ours for row in flux_rows(config)})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"patch_size": 2}, "patch_size 2"),
        ({"in_channels": 384, "out_channels": 64}, "384 to 64"),
        ({"in_channels": 6}, "6 to"),
    ],
)
def test_other_fluxes_are_refused(change, found, tmp_path):
    with pytest.raises(UserError, match=f"expected a FLUX.1 text-to-image transformer.*found.*{found}"):
        component(DEV | change, tmp_path)


def test_a_config_without_a_size_is_refused(tmp_path):
    settings = {key: value for key, value in DEV.items() if key != "num_single_layers"}
    with pytest.raises(UserError, match="the config of FluxTransformer2DModel lacks 'num_single_layers'"):
        component(settings, tmp_path)
