"""LoRAs in any style written as diffusers' own, which diffusers opens, and what the commands say of them."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from lora_models import (
    FLUX_MODULES,
    WRITERS,
    leaves,
    random_lora,
    random_pairs,
    saved,
    write_comfyui,
    write_kohya,
)
from safetensors.numpy import load_file

from convert import cli, example_lora
from convert.lora import read_lora
from convert.lora_backbones import is_lora, recognise
from convert.lora_export import convert_lora, write_lora
from dit_jax.config import UserError
from dit_jax.lora import Adapter, merged

STYLES = pytest.mark.parametrize("style", list(WRITERS))
WEIGHTS = "pytorch_lora_weights.safetensors"
JOINED = {"single.attn.o.kernel", "single.mlp.down.kernel"}  # diffusers has them in one matrix


@STYLES
def test_diffusers_opens_an_exported_lora_of_flux(lora_flux, tmp_path, style):
    file = WRITERS[style](tmp_path / "lora.safetensors", lora_flux.pairs())
    exported = convert_lora(file, tmp_path / "out")
    expected = lora_flux.merged((file, 1.0))
    assert lora_flux.error(lora_flux.fused(tmp_path / "out"), expected) <= 1e-5
    again = lora_flux.merged((exported, 1.0))
    assert lora_flux.error(again, expected) <= 1e-6


@STYLES
def test_diffusers_opens_an_exported_lora_of_wan(lora_wan, tmp_path, style):
    file = WRITERS[style](tmp_path / "lora.safetensors", lora_wan.pairs())
    convert_lora(file, tmp_path / "out")
    assert lora_wan.error(lora_wan.fused(tmp_path / "out"), lora_wan.merged((file, 1.0))) <= 1e-5


def test_factors_keep_their_values_and_dtypes(lora_flux, tmp_path):
    pairs = random_pairs(lora_flux.make(), FLUX_MODULES)
    halved = {name: pair._replace(down=pair.down.astype(np.float16)) for name, pair in pairs.items()}
    tensors = load_file(convert_lora(write_kohya(tmp_path / "x.safetensors", halved), tmp_path / "out"))
    pair = halved["single_blocks.2.linear1"]
    key = "transformer.single_transformer_blocks.2.attn.to_k.lora_"
    np.testing.assert_array_equal(tensors[f"{key}A.weight"], pair.down)
    np.testing.assert_array_equal(tensors[f"{key}B.weight"], pair.up[24:48])
    assert tensors[f"{key}A.weight"].dtype == np.float16 and tensors[f"{key}B.weight"].dtype == np.float32


def test_the_authors_halves_are_swapped_in_the_exported_file(lora_flux, tmp_path):
    rng, key = np.random.default_rng(0), "lora_unet_final_layer_adaLN_modulation_1"
    pair = {"down": rng.standard_normal((3, 24), np.float32), "up": rng.standard_normal((48, 3), np.float32)}
    file = saved(tmp_path / "x.safetensors", {f"{key}.lora_{role}.weight": value for role, value in pair.items()})
    tensors = load_file(convert_lora(file, tmp_path / "out"))
    up = np.concatenate([pair["up"][24:], pair["up"][:24]])
    np.testing.assert_array_equal(tensors["transformer.norm_out.linear.lora_B.weight"], up)


def test_biases_and_full_matrices_are_exported_as_diffusers_has_them(lora_wan, tmp_path):
    rng, pairs = np.random.default_rng(0), lora_wan.pairs()
    tensors = load_file(write_comfyui(tmp_path / "x.safetensors", pairs))
    tensors["diffusion_model.blocks.1.ffn.0.diff_b"] = rng.standard_normal(20, np.float32)
    tensors["diffusion_model.head.head.diff"] = rng.standard_normal((16, 24), np.float32)
    tensors["diffusion_model.blocks.1.norm3.diff"] = np.zeros(24, np.float32)
    file = saved(tmp_path / "x.safetensors", tensors)
    convert_lora(file, tmp_path / "out")
    assert lora_wan.error(lora_wan.fused(tmp_path / "out"), lora_wan.merged((file, 1.0))) <= 1e-5


def test_what_diffusers_has_no_place_for_is_refused_and_nothing_is_left(lora_wan, tmp_path):
    tensors = load_file(write_comfyui(tmp_path / "x.safetensors", lora_wan.pairs()))
    file = saved(tmp_path / "x.safetensors", tensors | {"diffusion_model.blocks.1.norm3.diff": np.ones(24, np.float32)})
    with pytest.raises(UserError, match=r"have no place for diffusion_model\.blocks\.1\.norm3\.diff"):
        convert_lora(file, tmp_path / "out")
    broken = "diffusion_model.blocks.1.ffn.0.lora_B.weight"
    saved(file, tensors | {broken: tensors[broken] * np.float32(np.nan)})
    with pytest.raises(UserError, match="holds NaN"):
        convert_lora(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def block_pairs(adapter):
    """(down, up, scale) of every block that has any, without the ranks in which down is zero."""
    pairs = []
    for down, up, scale in zip(adapter.down, adapter.up, adapter.alpha / adapter.rank, strict=True):
        used = down.reshape(-1, len(up)).any(axis=0)
        pairs.append((down[..., used], up[used], scale) if used.any() else None)
    return pairs


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.asarray(one).dtype == np.asarray(other).dtype


@pytest.mark.parametrize("model", ["lora_wan", "lora_wan_image", "lora_flux"])
def test_adapters_of_our_leaves_are_written_as_diffusers_opens_them_and_read_again(model, request, tmp_path):
    tiny = request.getfixturevalue(model)
    lora = random_lora(tiny.component.abstract)
    opened, found = read_lora(write_lora({"transformer": lora}, tiny.targets, tmp_path / "out"), tiny.targets)
    assert opened.styles == ["diffusers"] and not opened.unmatched
    assert found["transformer"].keys() == lora.keys()
    assert any("image_k" in name for name in lora) == (model == "lora_wan_image")
    for name, adapter in found["transformer"].items():
        assert_same(block_pairs(adapter), block_pairs(lora[name]))
        if name not in JOINED:
            assert_same(adapter, lora[name])
    expected = leaves(merged(tiny.ours, [(lora, 1.0)]))
    assert tiny.error(leaves(merged(tiny.ours, [(found["transformer"], 1.0)])), expected) <= 1e-6
    assert tiny.error(tiny.fused(tmp_path / "out"), expected) <= 1e-5


def test_leaves_of_one_matrix_share_a_pair_whatever_their_ranks_and_scales(lora_flux, tmp_path):
    lora = {name: adapter for name, adapter in random_lora(lora_flux.component.abstract).items() if name in JOINED}
    name, ranks = "single.mlp.down.kernel", {leaf: adapter.rank for leaf, adapter in lora.items()}
    lora[name] = replace(lora[name], alpha=lora[name].alpha * np.float32(1.7))
    file = write_lora({"transformer": lora}, lora_flux.targets, tmp_path / "out")
    expected = leaves(merged(lora_flux.ours, [(lora, 1.0)]))
    assert lora_flux.error(lora_flux.fused(tmp_path / "out"), expected) <= 1e-5
    shapes = {key: tensor.shape for key, tensor in load_file(file).items()}
    both = [block for block in range(3) if all(adapter.alpha[block] for adapter in lora.values())]
    assert both
    for block in both:
        rank = int(sum(each[block] for each in ranks.values()))
        key = f"transformer.single_transformer_blocks.{block}.proj_out.lora_"
        assert (shapes[f"{key}A.weight"], shapes[f"{key}B.weight"]) == ((rank, 24 + 96), (24, rank))


def test_a_leaf_outside_the_blocks_and_a_convolution_are_written_too(lora_wan, tmp_path):
    rng = np.random.default_rng(0)

    def adapter(inputs, outputs):
        down, up = rng.standard_normal((inputs, 3), np.float32), rng.standard_normal((3, outputs), np.float32)
        return Adapter(stacked=False, down=down, up=up, alpha=np.float32(1.5), rank=np.float32(3))

    lora = {"patch.kernel": adapter(16, 24), "out.kernel": adapter(24, 16)}
    file = write_lora({"transformer": lora}, lora_wan.targets, tmp_path / "out")
    found = read_lora(file, lora_wan.targets)[1]["transformer"]
    for name in lora:
        assert_same(found[name], lora[name])
    assert lora_wan.error(lora_wan.fused(tmp_path / "out"), leaves(merged(lora_wan.ours, [(lora, 1.0)]))) <= 1e-5


def test_an_adapter_that_diffusers_has_no_place_for_is_refused_and_nothing_is_left(lora_wan, tmp_path):
    lora, out = random_lora(lora_wan.component.abstract), tmp_path / "out"
    bias = {"blocks.mlp.up.bias": Adapter(stacked=True, full=np.ones((3, 20), np.float32))}
    kernel = {"blocks.mlp.up.kernel": replace(lora["blocks.mlp.up.kernel"], full=np.ones((3, 24, 20), np.float32))}
    for odd in (bias, kernel, {"double.o.kernel": lora["blocks.mlp.up.kernel"]}):
        with pytest.raises(UserError, match="have no place for what is added to"):
            write_lora({"transformer": lora | odd}, lora_wan.targets, out)
    assert not list(tmp_path.iterdir())
    write_lora({"transformer": lora}, lora_wan.targets, out)
    with pytest.raises(UserError, match="exists"):
        write_lora({"transformer": lora}, lora_wan.targets, out)
    write_lora({"transformer": lora}, lora_wan.targets, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == [WEIGHTS]


def test_a_file_is_told_from_its_keys(lora_wan, tmp_path):
    pair = {"x.lora_A.weight": np.ones((1, 3), np.float32), "x.lora_B.weight": np.ones((3, 1), np.float32)}
    file = saved(tmp_path / "x.safetensors", pair)
    assert is_lora(file)
    with pytest.raises(UserError, match="is no LoRA of Wan or FLUX: none of its keys names a layer"):
        recognise(file)
    lora_wan.make().save_pretrained(tmp_path / "model")
    assert not is_lora(tmp_path / "model") and not is_lora(tmp_path / "model" / "diffusion_pytorch_model.safetensors")


def test_what_inspect_says_of_keys_that_it_does_not_know(lora_wan, tmp_path, capsys):
    tensors = load_file(write_comfyui(tmp_path / "x.safetensors", lora_wan.pairs()))
    odd = {"diffusion_model.blocks.0.nothing.lora_A.weight": np.ones((1, 24), np.float32)}
    assert run("inspect", saved(tmp_path / "x.safetensors", tensors | odd)) == 0
    assert "1 keys match no layer: diffusion_model.blocks.0.nothing" in capsys.readouterr().out
    assert run("to-torch", tmp_path / "x.safetensors", tmp_path / "out") == 2
    assert "1 keys match no layer" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run("to-torch", tmp_path / "x.safetensors", tmp_path / "out", "--allow-unmatched") == 0
    assert "warning: " in capsys.readouterr().err and (tmp_path / "out" / WEIGHTS).is_file()


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_the_command_converts_and_inspects_a_lora(lora_flux, tmp_path, capsys):
    pairs = lora_flux.pairs()
    file = write_kohya(tmp_path / "style.safetensors", pairs)
    assert run("inspect", file) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"{file}: LoRA of FLUX in kohya style, rank ") and "alpha" in line
    assert run("to-torch", file, tmp_path / "out") == 0
    assert run("to-torch", file, tmp_path / "out") == 2
    assert run("to-torch", file, tmp_path / "out", "--overwrite") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WEIGHTS]
    capsys.readouterr()
    assert run("inspect", tmp_path / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["backbone"], found["styles"]) == ("LoRA", "FLUX", ["diffusers"])
    assert set(found["ranks"]) == {len(pair.down) for pair in pairs.values()}
    assert set(found["alphas"]) == {pair.alpha for pair in pairs.values()}
    assert found["layers"] == {"transformer": sum(len(pair.modules) for pair in pairs.values())}
    assert found["unmatched"] == [] and found["dtypes"] == ["float32"]


@pytest.mark.parametrize("arguments", [("to-jax",), ("to-torch", "--layout", "original")])
def test_a_lora_has_no_other_form(lora_wan, tmp_path, capsys, arguments):
    file = write_kohya(tmp_path / "x.safetensors", lora_wan.pairs())
    assert run(*arguments, file, tmp_path / "out") == 2
    assert "is a LoRA: expected `dit-convert to-torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_example_is_a_lora_of_its_model(lora_wan, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    lora_wan.make().save_pretrained(tmp_path / "model" / "transformer")
    (tmp_path / "model" / "model_index.json").write_text('{"transformer": ["diffusers", "WanTransformer3DModel"]}')
    file = tmp_path / "example.safetensors"
    for style in ("kohya", "comfyui"):
        assert example_lora.main([str(tmp_path / "model"), str(file), "--style", style]) == 0
        found = lora_wan.merged((file, 1.0))
        convert_lora(file, tmp_path / style)
        assert lora_wan.error(found, lora_wan.fused(tmp_path / style)) <= 1e-5
        assert example_lora.main([str(tmp_path / "model"), str(file)]) == 2
        file.unlink()
    assert "exists" in capsys.readouterr().err
