"""LoRA files of every style against diffusers and PEFT, and what is refused."""

import numpy as np
import pytest
import torch
from lora_models import (
    WRITERS,
    leaves,
    saved,
    write_diffusers,
)
from safetensors.numpy import load_file, save_file

from convert.lora import UnmatchedKeys, read_lora
from convert.tables import assign
from dit_jax.config import UserError

STYLES = pytest.mark.parametrize("style", list(WRITERS))


@STYLES
def test_wan_in_every_style_is_merged_as_diffusers_merges_it(lora_wan, tmp_path, style):
    file = WRITERS[style](tmp_path / "lora.safetensors", lora_wan.pairs())
    assert lora_wan.error(lora_wan.merged((file, 1.0)), lora_wan.fused(file)) <= 1e-5


def test_flux_is_merged_as_diffusers_merges_it(lora_flux, tmp_path):
    file = write_diffusers(tmp_path / "lora.safetensors", lora_flux.pairs())
    assert lora_flux.error(lora_flux.merged((file, 1.0)), lora_flux.fused(file)) <= 1e-5


@pytest.mark.parametrize("style", ["kohya", "comfyui"])
def test_flux_with_fused_projections_is_the_same_as_with_separate_ones(lora_flux, tmp_path, style):
    apart = write_diffusers(tmp_path / "diffusers.safetensors", lora_flux.pairs())
    fused_file = WRITERS[style](tmp_path / "fused.safetensors", lora_flux.pairs())
    assert lora_flux.error(lora_flux.merged((fused_file, 1.0)), lora_flux.merged((apart, 1.0))) <= 1e-6


def test_halves_that_the_authors_swap_are_swapped_back(lora_flux, tmp_path):
    rng = np.random.default_rng(0)
    down, shift, scale = rng.standard_normal((3, 24), np.float32), *rng.standard_normal((2, 24, 3), np.float32)
    files = []
    for name, key, halves in (
        ("a", "lora_unet_final_layer_adaLN_modulation_1", (shift, scale)),
        ("b", "transformer.norm_out.linear", (scale, shift)),
    ):
        pair = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": np.concatenate(halves)}
        files.append(saved(tmp_path / f"{name}.safetensors", pair))
    ours = lora_flux.merged((files[0], 1.0))
    assert lora_flux.error(ours, lora_flux.merged((files[1], 1.0))) <= 1e-6
    added = ours["out_shift.kernel"] - leaves(lora_flux.ours)["out_shift.kernel"]
    np.testing.assert_allclose(added, (shift @ down).T, atol=1e-5)


def test_several_loras_add_up_with_their_strengths(lora_flux, tmp_path):
    files = [WRITERS[s](tmp_path / s, lora_flux.pairs(seed)) for seed, s in enumerate(("kohya", "comfyui"))]
    files = [file.rename(file.with_suffix(".safetensors")) for file in files]
    base, both = leaves(lora_flux.ours), lora_flux.merged((files[0], 0.8), (files[1], -0.3))
    one, other = (lora_flux.merged((file, 1.0)) for file in files)
    expected = {name: base[name] + 0.8 * (one[name] - base[name]) - 0.3 * (other[name] - base[name]) for name in base}
    assert lora_flux.error(both, expected) <= 1e-5


def test_full_differences_of_weights_biases_norms_and_modulations(lora_wan, tmp_path):
    rng = np.random.default_rng(0)
    shapes = {
        "head.head.diff": (16, 24), "blocks.1.self_attn.q.diff_b": (24,), "blocks.2.self_attn.norm_k.diff": (24,),
        "blocks.0.norm3.diff": (24,), "blocks.0.norm3.diff_b": (24,), "blocks.1.diff_m": (1, 6, 24),
        "patch_embedding.diff": (24, 4, 1, 2, 2), "head.diff_m": (1, 2, 24),
    }  # fmt: skip
    added = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    ours = lora_wan.merged(
        (saved(tmp_path / "x.safetensors", {f"diffusion_model.{k}": v for k, v in added.items()}), 0.5)
    )
    keys = {
        "proj_out.weight": "head.head.diff", "blocks.1.attn1.to_q.bias": "blocks.1.self_attn.q.diff_b",
        "blocks.2.attn1.norm_k.weight": "blocks.2.self_attn.norm_k.diff",
        "blocks.0.norm2.weight": "blocks.0.norm3.diff",
        "blocks.0.norm2.bias": "blocks.0.norm3.diff_b", "blocks.1.scale_shift_table": "blocks.1.diff_m",
        "patch_embedding.weight": "patch_embedding.diff", "scale_shift_table": "head.diff_m",
    }  # fmt: skip
    tensors = lora_wan.make().state_dict()
    for name, key in keys.items():
        tensors[name] = tensors[name] + 0.5 * torch.tensor(added[key])
    assert lora_wan.error(ours, lora_wan.leaves(tensors)) <= 1e-6


def test_peft_files_with_names_biases_convolutions_and_a_config_beside_them(lora_wan, tmp_path):
    import peft

    model = lora_wan.make()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "patch_embedding"], lora_bias=True)
    wrapped = peft.get_peft_model(model, config)
    randomise_adapters(wrapped)
    wrapped.save_pretrained(tmp_path)
    tensors = wrapped.merge_and_unload().state_dict()
    expected = leaves(
        assign(lora_wan.component.abstract, lora_wan.component.rows, {k: v.numpy() for k, v in tensors.items()})
    )
    assert lora_wan.error(lora_wan.merged((tmp_path, 1.0)), expected) <= 1e-5
    named = {
        key.replace("base_model.model.", "transformer.").replace(".weight", ".default.weight"): value
        for key, value in load_file(tmp_path / "adapter_model.safetensors").items()
        if key.endswith("weight")
    }
    alphas = {key.split(".lora_A")[0] + ".alpha": np.float32(5) for key in named if "lora_A" in key}
    other = saved(tmp_path / "named.safetensors", named | alphas)
    kernels = [name for name in expected if name.endswith("kernel")]
    found = lora_wan.merged((other, 1.0))
    assert max(np.abs(found[name] - expected[name]).max() for name in kernels) <= 1e-6


def randomise_adapters(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def test_rank_stabilised_alphas(lora_wan, tmp_path):
    import peft

    wrapped = peft.get_peft_model(
        lora_wan.make(), peft.LoraConfig(r=4, lora_alpha=3, target_modules=["to_v"], use_rslora=True)
    )
    randomise_adapters(wrapped)
    wrapped.save_pretrained(tmp_path)
    tensors = wrapped.merge_and_unload().state_dict()
    expected = leaves(
        assign(lora_wan.component.abstract, lora_wan.component.rows, {k: v.numpy() for k, v in tensors.items()})
    )
    assert lora_wan.error(lora_wan.merged((tmp_path, 1.0)), expected) <= 1e-5


DOWN, UP = "diffusion_model.blocks.0.ffn.0.lora_down.weight", "diffusion_model.blocks.0.ffn.0.lora_up.weight"
GOOD = {DOWN: np.ones((2, 24), np.float32), UP: np.ones((20, 2), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({DOWN: GOOD[DOWN]}, "expected a pair of down and up"),
        ({DOWN.replace("lora_down.weight", "alpha"): np.float32(1)}, "expected a pair of down and up"),
        (GOOD | {DOWN: np.ones((3, 24), np.float32)}, "expected (rank, inputs) and (outputs, rank)"),
        (GOOD | {DOWN: np.ones((2, 23), np.float32)}, f"{DOWN} has shape (2, 23), expected (2, 24)"),
        (GOOD | {UP: np.ones((21, 2), np.float32)}, f"{UP} has shape (21, 2), expected (20, 2)"),
        (GOOD | {DOWN: np.full((2, 24), np.nan, np.float32)}, f"{DOWN} holds NaN"),
        (GOOD | {UP: np.full((20, 2), np.inf, np.float16)}, f"{UP} holds NaN or infinite"),
        (GOOD | {UP: np.ones((20, 2), np.int32)}, "expected floats"),
        (GOOD | {DOWN.replace("lora_down.weight", "alpha"): np.ones(2, np.float32)}, "expected one number"),
        (GOOD | {DOWN.replace("lora_down.weight", "alpha"): np.float32(np.nan)}, "holds NaN"),
        (GOOD | {DOWN.replace("lora_down", "lora_A"): GOOD[DOWN]}, "are one thing"),
        (GOOD | {k.replace("diffusion_model.", "transformer."): v for k, v in GOOD.items()}, "are one thing"),
        (GOOD | {"lora_unet_blocks_0_ffn_0" + k[30:]: v for k, v in GOOD.items()}, "is there under two names"),
        (GOOD | {"diffusion_model.blocks.0.ffn.0.dora_scale": np.ones((1, 24), np.float32)}, "is a DoRA"),
        ({"lora_unet_blocks_0_ffn_0.hada_w1_a": np.ones((2, 2), np.float32)}, "is a LoHa"),
        ({"lora_unet_blocks_0_ffn_0.lokr_w1": np.ones((2, 2), np.float32)}, "is a LoKr"),
        (GOOD | {"double_blocks.0.img_attn.norm.query_norm.scale": np.ones(8, np.float32)}, "is a control LoRA"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("allow_unmatched", [False, True])
def test_what_is_refused_in_one_sentence(lora_wan, tmp_path, tensors, message, allow_unmatched):
    file = saved(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(UserError) as error:
        lora_wan.merged((file, 1.0), allow_unmatched=allow_unmatched)
    assert message in str(error.value) and "lora.safetensors" in str(error.value)


def test_keys_that_match_no_layer_are_an_error_that_lists_ten(lora_wan, tmp_path):
    odd = {f"diffusion_model.blocks.{3 + n}.ffn.0.lora_down.weight": GOOD[DOWN] for n in range(12)}
    file = saved(tmp_path / "lora.safetensors", GOOD | odd)
    with pytest.raises(UserError, match="12 keys match no layer") as error:
        lora_wan.merged((file, 1.0))
    assert str(error.value).count("diffusion_model.") == 10 and "and 2 more" in str(error.value)
    with pytest.warns(UnmatchedKeys, match="12 keys match no layer"):
        opened, parts = read_lora(file, lora_wan.targets, allow_unmatched=True)
    assert sorted(opened.unmatched) == sorted(odd) and sorted(parts["transformer"]) == ["blocks.mlp.up.kernel"]


MISFIT = {
    "diffusion_model.patch_embedding.diff": np.ones((24, 9, 1, 2, 2), np.float32),
    "diffusion_model.patch_embedding.diff_b": np.ones(24, np.float32),
    "diffusion_model.blocks.1.ffn.0.lora_down.weight": np.ones((2, 23), np.float32),
    "diffusion_model.blocks.1.ffn.0.lora_up.weight": np.ones((20, 2), np.float32),
}


def test_layers_of_other_shapes_are_an_error_that_names_the_way_round_it(lora_wan, tmp_path):
    file = saved(tmp_path / "lora.safetensors", GOOD | MISFIT)
    with pytest.raises(UserError) as error:
        lora_wan.merged((file, 1.0))
    assert "2 layers do not fit (diffusion_model." in str(error.value)
    assert "patch_embedding.diff has shape (24, 9, 1, 2, 2), expected (24, 4, 1, 2, 2)" in str(error.value)
    assert "blocks.1.ffn.0.lora_down.weight has shape (2, 23), expected (2, 24)" in str(error.value)
    assert "pass --allow-unmatched" in str(error.value)


def test_layers_of_other_shapes_may_be_left_out_whole(lora_wan, tmp_path):
    file = saved(tmp_path / "lora.safetensors", GOOD | MISFIT)
    with pytest.warns(UnmatchedKeys, match=r"2 layers do not fit \(.*patch_embedding\.diff has.*; they are left out"):
        found = lora_wan.merged((file, 1.0), allow_unmatched=True)
    expected = lora_wan.merged((saved(tmp_path / "good.safetensors", GOOD), 1.0))
    assert all((found[name] == expected[name]).all() for name in expected)


def test_layers_of_other_shapes_and_keys_of_none_are_left_out_together(lora_wan, tmp_path):
    odd = {"diffusion_model.blocks.9.ffn.0.lora_down.weight": GOOD[DOWN]}
    file = saved(tmp_path / "lora.safetensors", GOOD | MISFIT | odd)
    with pytest.raises(UserError, match=r"1 keys match no layer \(.*blocks\.9.*\) and 2 layers do not fit"):
        lora_wan.merged((file, 1.0))
    with pytest.warns(UnmatchedKeys, match=r"1 keys match no layer \(.*blocks\.9.*\) and 2 layers do not fit"):
        opened, parts = read_lora(file, lora_wan.targets, allow_unmatched=True)
    assert opened.unmatched == list(odd) and sorted(parts["transformer"]) == ["blocks.mlp.up.kernel"]


def test_a_file_of_another_model_is_refused_even_where_keys_may_be_left_out(lora_wan, tmp_path):
    file = saved(
        tmp_path / "x.safetensors", {"unet.down.0.lora_A.weight": GOOD[DOWN], "unet.down.0.lora_B.weight": GOOD[UP]}
    )
    with pytest.raises(UserError, match=r"2 keys match no layer.*use another LoRA"):
        lora_wan.merged((file, 1.0), allow_unmatched=True)


@pytest.mark.parametrize("name", ["missing.safetensors", "empty"])
def test_no_file(lora_wan, tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected"):
        lora_wan.merged((tmp_path / name, 1.0))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "should be a JSON object"),
        ('{"transformer.lora_alpha": Infinity}', "should hold numbers below"),
        ('{"transformer.lora_alpha": 1%s}' % ("0" * 400), "should hold numbers below"),
        ('{"transformer.lora_alpha": "8"}', "should hold numbers below"),
        ('{"transformer.alpha_pattern": [4]}', "should hold numbers below"),
        ('{"transformer.alpha_pattern": {"(a+)+$": 4}}', "expected names of modules"),
        ('{"transformer.use_dora": true}', "describes a DoRA"),
    ],
)
def test_damaged_metadata_is_one_sentence(lora_wan, tmp_path, metadata, message):
    file = tmp_path / "lora.safetensors"
    save_file(GOOD, file, {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError) as error:
        lora_wan.merged((file, 1.0))
    assert message in str(error.value) and "lora.safetensors" in str(error.value)


def test_a_torch_file_is_read_too(lora_wan, tmp_path):
    torch.save({key: torch.tensor(value) for key, value in GOOD.items()}, tmp_path / "lora.pt")
    expected = lora_wan.merged((saved(tmp_path / "lora.safetensors", GOOD), 1.0))
    found = lora_wan.merged((tmp_path / "lora.pt", 1.0))
    assert all((found[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize("length", [0, 4, 30, 200, -1])
def test_a_truncated_file_is_one_sentence(lora_wan, tmp_path, length):
    file = saved(tmp_path / "lora.safetensors", GOOD)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=r"lora\.safetensors is (truncated|damaged)"):
        lora_wan.merged((file, 1.0))
