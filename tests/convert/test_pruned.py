"""Pruned models: against diffusers' full models whose pruned heads and neurons are zeroed, and there and back."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from convert.checkpoint import load_model, open_checkpoint
from convert.flux import flux_config, flux_settings
from convert.transfer import convert, write_model
from convert.wan import wan_config, wan_settings
from dit_jax.config import UserError
from dit_jax.models.flux import FLUX_SCHNELL
from dit_jax.models.network import Conditioning, NetworkCall, layout, network, unlayout
from dit_jax.models.wan import WAN_1_3B
from dit_jax.parameters import named_leaves

HEADS, KEPT, WIDTH, MLP = 5, 3, 8, 23
WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=WIDTH, in_channels=4, out_channels=4,
    text_dim=11, freq_dim=24, ffn_dim=37, num_layers=3, image_dim=13, added_kv_proj_dim=HEADS * WIDTH,
)  # fmt: skip
FLUX = dict(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=WIDTH, num_attention_heads=HEADS,
    joint_attention_dim=10, pooled_projection_dim=14, guidance_embeds=False, axes_dims_rope=(2, 2, 4),
)  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        spread = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn_like(parameter) * spread + (parameter.ndim == 1) * (parameter.data == 1)
    return model.eval()


def axis_of(key):
    """(what a tensor of a block is cut by, the axis of it), None for what pruning leaves alone."""
    name = key.split("blocks.")[-1].split(".", 1)[-1].removesuffix(".weight").removesuffix(".bias")
    rows = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
    if "blocks." not in key:
        return None
    if name.startswith("attn") and name.split(".")[1] in rows:
        return "heads", 0
    if name.startswith("attn") and name.split(".")[1] in ("norm_q", "norm_k", "norm_added_k"):
        return "norms", 0
    if name in ("attn1.to_out.0", "attn2.to_out.0", "attn.to_out.0", "attn.to_add_out"):
        return None if key.endswith("bias") else ("heads", 1)
    if name.endswith("net.0.proj") or name == "proj_mlp":
        return "mlp", 0
    if name.endswith("net.2"):
        return None if key.endswith("bias") else ("mlp", 1)
    if name == "proj_out":
        return None if key.endswith("bias") else ("fused", 1)
    return None


class Choice:
    """Which heads and neurons every block keeps, another set in each."""

    def __init__(self, heads, kept_heads, neurons, kept_neurons):
        self.sizes = heads, kept_heads, neurons, kept_neurons

    def indices(self, block, what):
        rng = np.random.default_rng(block)
        heads, kept_heads, neurons, kept_neurons = self.sizes
        kept = np.sort(rng.permutation(heads)[:kept_heads])
        channels = (kept[:, None] * WIDTH + np.arange(WIDTH)).reshape(-1)
        kept = np.sort(rng.permutation(neurons)[:kept_neurons])
        fused = np.concatenate([channels, heads * WIDTH + kept])
        return torch.tensor({"heads": channels, "norms": channels, "mlp": kept, "fused": fused}[what])

    def apply(self, tensors, across_heads):
        """(the tensors of the pruned model, those of the full one with zeros in place of what was pruned)."""
        pruned, masked = {}, {}
        for key, tensor in tensors.items():
            pruned[key], masked[key] = tensor, tensor
            cut = axis_of(key)
            if cut is None or (cut[0] == "norms" and not across_heads):
                continue
            what, axis = cut
            kept = self.indices(int(key.split("blocks.")[1].split(".")[0]), what)
            pruned[key] = tensor.index_select(axis, kept).contiguous()
            keep = torch.zeros(tensor.shape[axis]).index_fill(0, kept, 1.0)
            masked[key] = tensor * (keep[:, None] if axis == 0 and tensor.ndim == 2 else keep)
        return pruned, masked


def saved(folder, settings, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS)
    return folder


def settings_of(model, **pruned):
    """What diffusers would write of a model, and what is kept."""
    settings = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    return {"_class_name": type(model).__name__} | settings | ({"pruned": pruned} if pruned else {})


def ours(model, latents, t, conditioning):
    @jax.jit
    def run(model, latents, t, conditioning):
        rows, _ = network(model, NetworkCall(), layout(latents, model.config.patch), t, conditioning)
        return unlayout(rows, latents.shape, model.config.patch)

    return np.asarray(run(model, latents, t, conditioning))


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def wan_outputs(reference, model):
    rng = np.random.default_rng(1)
    latents, t = rng.standard_normal((2, 2, 6, 4, 4), np.float32), np.array([999.0, 271.0], np.float32)
    text, image = rng.standard_normal((2, 512, 11), np.float32), rng.standard_normal((2, 4, 13), np.float32)
    with torch.no_grad():
        told = (torch.tensor(x) for x in (t, text, image))
        expected = reference(torch.tensor(latents).permute(0, 4, 1, 2, 3), *told).sample.permute(0, 2, 3, 4, 1).numpy()
    return ours(model, latents, t, Conditioning(text, image)), expected


def flux_outputs(reference, model):
    rng = np.random.default_rng(1)
    latents, t = rng.standard_normal((2, 1, 6, 4, 4), np.float32), np.array([937.5, 250.0], np.float32)
    text, pooled = rng.standard_normal((2, 5, 10), np.float32), rng.standard_normal((2, 14), np.float32)
    packed = torch.tensor(latents)[:, 0].reshape(2, 3, 2, 2, 2, 4).permute(0, 1, 3, 5, 2, 4).reshape(2, 6, 16)
    ids = torch.tensor([[0, y, x] for y in range(3) for x in range(2)])
    with torch.no_grad():
        found = reference(
            packed, torch.tensor(text), torch.tensor(pooled), torch.tensor(t / 1000), ids, torch.zeros(5, 3)
        ).sample
    expected = found.reshape(2, 3, 2, 4, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(2, 1, 6, 4, 4).numpy()
    return ours(model, latents, t, Conditioning(text, pooled=pooled)), expected


def pruned_wan(folder, norm_counts_pruned=True):
    """(folder of the pruned model, diffusers' full model with zeros)."""
    model = randomised(WanTransformer3DModel(**WAN))
    tensors, masked = Choice(HEADS, KEPT, 37, MLP).apply(model.state_dict(), across_heads=True)
    model.load_state_dict(masked)
    settings = settings_of(model, heads=KEPT, norm_counts_pruned=norm_counts_pruned) | {"ffn_dim": MLP}
    return saved(folder, settings, tensors), model


def pruned_flux(folder):
    model = randomised(FluxTransformer2DModel(**FLUX))
    tensors, masked = Choice(HEADS, KEPT, 4 * HEADS * WIDTH, 71).apply(model.state_dict(), across_heads=False)
    model.load_state_dict(masked)
    return saved(folder, settings_of(model, heads=KEPT, mlp_width=71), tensors), model


def test_a_pruned_wan_equals_the_full_one_with_zeros(tmp_path):
    folder, reference = pruned_wan(tmp_path / "pruned")
    model = load_model(folder)
    assert (model.config.heads, model.config.mlp_width, model.config.width) == (KEPT, MLP, HEADS * WIDTH)
    found, expected = wan_outputs(reference, model)
    assert relative(found, expected) <= 1e-5


def test_the_norm_over_kept_heads_alone_differs_by_a_factor(tmp_path):
    folder, reference = pruned_wan(tmp_path / "pruned", norm_counts_pruned=False)
    found, unscaled = wan_outputs(reference, load_model(folder))
    for name, parameter in reference.named_parameters():
        if ".norm_q" in name or ".norm_k" in name or ".norm_added_k" in name:
            parameter.data *= (KEPT / HEADS) ** 0.5
    assert relative(found, unscaled) > 1e-3
    assert relative(*wan_outputs(reference, load_model(folder))) <= 1e-5


def test_a_pruned_flux_equals_the_full_one_with_zeros(tmp_path):
    folder, reference = pruned_flux(tmp_path / "pruned")
    model = load_model(folder)
    assert (model.config.heads, model.config.mlp_width, model.config.width) == (KEPT, 71, HEADS * WIDTH)
    found, expected = flux_outputs(reference, model)
    assert relative(found, expected) <= 1e-5


def test_zero_heads_stand_for_a_block_that_keeps_fewer(tmp_path):
    """The stacked form holds as many heads in every block; one of zeros changes nothing where the norm counts them."""
    folder, _ = pruned_wan(tmp_path / "pruned")
    tensors = load_file(folder / WEIGHTS)
    settings = json.loads((folder / "config.json").read_text())
    wider = {}
    for key, tensor in tensors.items():
        what, axis = axis_of(key) or ("", 0)
        zeros = torch.zeros([WIDTH if i == axis else size for i, size in enumerate(tensor.shape)])
        wider[key] = torch.cat([tensor, zeros], axis) if what in ("heads", "norms") else tensor
    settings["pruned"]["heads"] = KEPT + 1
    other = saved(tmp_path / "wider", settings, wider)
    reference = randomised(WanTransformer3DModel(**WAN))
    one, two = (wan_outputs(reference, load_model(place))[0] for place in (folder, other))
    assert relative(one, two) <= 1e-6


@pytest.mark.parametrize("make", [pruned_wan, pruned_flux])
def test_there_and_back_bit_for_bit(make, tmp_path):
    source, _ = make(tmp_path / "source")
    convert(open_checkpoint(source), tmp_path / "native", "native")
    convert(open_checkpoint(tmp_path / "native"), tmp_path / "again", "diffusers")
    assert (tmp_path / "again" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    expected, found = load_file(source / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    one, two = (dict(named_leaves(load_model(place))) for place in (source, tmp_path / "native"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_diffusers_opens_a_wan_with_fewer_neurons(tmp_path):
    tensors, _ = Choice(HEADS, HEADS, 37, MLP).apply(randomised(WanTransformer3DModel(**WAN)).state_dict(), True)
    narrow = randomised(WanTransformer3DModel(**WAN | {"ffn_dim": MLP}))
    source = saved(tmp_path / "source", settings_of(narrow), tensors)
    convert(open_checkpoint(source), tmp_path / "native", "native")
    model = load_model(tmp_path / "native")
    write_model(tmp_path / "diffusers", model, wan_settings(model.config))
    assert "pruned" not in json.loads((tmp_path / "diffusers" / "config.json").read_text())
    reference, report = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers", output_loading_info=True)
    assert not any(report.values()) and reference.config.ffn_dim == MLP
    found, expected = wan_outputs(reference.eval(), model)
    assert relative(found, expected) <= 1e-5


@pytest.mark.parametrize("make", [pruned_wan, pruned_flux])
def test_diffusers_refuses_what_it_cannot_represent(make, tmp_path):
    folder, reference = make(tmp_path / "source")
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size"):
        type(reference).from_pretrained(folder)


CONFIGS = [
    (wan_config, wan_settings, replace(WAN_1_3B, heads=8, mlp_width=6272)),
    (wan_config, wan_settings, replace(WAN_1_3B, heads=8, norm_counts_pruned=True)),
    (wan_config, wan_settings, replace(WAN_1_3B, mlp_width=6272)),
    (flux_config, flux_settings, replace(FLUX_SCHNELL, heads=17)),
    (flux_config, flux_settings, replace(FLUX_SCHNELL, mlp_width=8576)),
]


@pytest.mark.parametrize(("read", "write", "config"), CONFIGS)
def test_a_pruned_config_survives_as_json(read, write, config):
    assert read(json.loads(json.dumps(write(config)))) == config


@pytest.mark.parametrize(
    ("pruned", "message"),
    [
        ({"heads": 0}, "heads 0, expected a whole number from 1 to 5"),
        ({"heads": HEADS + 1}, "heads 6, expected a whole number from 1 to 5"),
        ({"heads": 2.5}, "heads 2.5, expected a whole number"),
        ({"heads": True}, "heads True, expected a whole number"),
        ({"norm_counts_pruned": 1}, "norm_counts_pruned 1, expected true or false"),
        ({"ffn": 3}, "names 'ffn', expected some of heads, norm_counts_pruned"),
        ([3], r"pruned is \[3\], expected an object"),
        ({"heads": 4}, r"has shape \(24, 40\), expected \(32, 40\)"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_sentence(pruned, message, tmp_path):
    folder, _ = pruned_wan(tmp_path / "pruned")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"pruned": pruned}))
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [pruned_wan, pruned_flux])
def test_the_original_layout_refuses_what_is_pruned(tmp_path, make):
    folder, _ = make(tmp_path / "pruned")
    with pytest.raises(UserError, match=r"no place for what .* keeps of a full model"):
        convert(open_checkpoint(folder), tmp_path / "original", "original")
    assert not (tmp_path / "original").exists()
