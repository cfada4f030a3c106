"""Wan against diffusers' WanTransformer3DModel, with random weights everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

from convert.tables import assign
from convert.wan import wan_config, wan_rows, wan_settings
from dit_jax.models.network import Conditioning, NetworkCall, TokenTimesteps, layout, network, unlayout
from dit_jax.models.wan import FP32_LEAVES, PRESETS, Wan, WanConfig
from dit_jax.parameters import Precision, cast, named_leaves

TINY = dict(
    patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=16, in_channels=5, out_channels=5, text_dim=11,
    freq_dim=24, ffn_dim=37, num_layers=3, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)  # fmt: skip
IMAGE = TINY | dict(in_channels=9, image_dim=13, added_kv_proj_dim=48)


def torch_model(settings, seed=0):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**settings).eval()
    for parameter in model.parameters():
        spread = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn_like(parameter) * spread + (parameter.ndim == 1) * (parameter.data == 1)
    return model


def jax_model(reference):
    config = wan_config(dict(reference.config))
    abstract = nnx.eval_shape(lambda: Wan(config, nnx.Rngs(0)))
    return assign(abstract, wan_rows(config), {k: v.numpy() for k, v in reference.state_dict().items()})


def inputs(settings, text_tokens=7):
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((2, 3, 6, 10, settings["in_channels"]), np.float32)
    text = rng.standard_normal((2, text_tokens, settings["text_dim"]), np.float32)
    image = rng.standard_normal((2, 4, settings["image_dim"]), np.float32) if "image_dim" in settings else None
    return latents, np.array([999.0, 271.0], np.float32), text, image


def run_torch(model, latents, t, text, image, dtype=torch.float32):
    channels_first = torch.tensor(latents).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        out = model(
            channels_first.to(dtype), torch.tensor(t), torch.tensor(text).to(dtype),
            None if image is None else torch.tensor(image).to(dtype),
        ).sample  # fmt: skip
    return out.permute(0, 2, 3, 4, 1).float().numpy()


def run_jax(model, latents, t, text, image, call=NetworkCall()):
    @jax.jit
    def run(model, latents, t, conditioning):
        rows, _ = network(model, call, layout(latents, model.config.patch), t, conditioning)
        return unlayout(rows, latents.shape, model.config.patch)

    return np.asarray(run(model, latents, t, Conditioning(text, image)))


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("settings", [TINY, IMAGE], ids=["t2v", "i2v"])
def test_equals_diffusers(settings):
    reference = torch_model(settings)
    text_tokens = 512 if settings is IMAGE else 7
    expected = run_torch(reference, *inputs(settings, text_tokens))
    assert relative(run_jax(jax_model(reference), *inputs(settings, text_tokens)), expected) <= 1e-5


def own_timesteps(tokens=3 * 3 * 5, values=3):
    """Timesteps of each token [2, N], as three values a row and which of them each token has."""
    rng = np.random.default_rng(4)
    distinct = rng.uniform(0, 999, (2, values)).astype(np.float32)
    which = rng.integers(0, values, (2, tokens)).astype(np.int32)
    return np.take_along_axis(distinct, which, axis=1), TokenTimesteps(distinct, which)


@pytest.mark.parametrize("settings", [TINY, IMAGE], ids=["t2v", "i2v"])
def test_tokens_with_their_own_timesteps_equal_diffusers(settings):
    reference = torch_model(settings)
    latents, _, text, image = inputs(settings, 512 if settings is IMAGE else 7)
    each, told = own_timesteps()
    expected = run_torch(reference, latents, each, text, image)
    assert relative(run_jax(jax_model(reference), latents, told, text, image), expected) <= 1e-5
    assert relative(run_jax(jax_model(reference), latents, told.values[:, 0], text, image), expected) > 1e-2


def test_no_modulation_of_every_token_is_held():
    """Six vectors a token would be; what a second timestep costs is less than two."""
    config = WanConfig(
        blocks=2, width=96, heads=3, head_width=32, mlp_width=100, in_channels=5, out_channels=5, text_width=11
    )
    model = nnx.eval_shape(lambda: Wan(config, nnx.Rngs(0)))
    rows, tokens = 2, 5 * 32 * 32

    def given(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def memory(t):
        def run(model, latents, t, text):
            return network(model, NetworkCall(), layout(latents, config.patch), t, Conditioning(text))[0]

        lowered = jax.jit(run).lower(model, given(rows, 5, 64, 64, 5), t, given(rows, 7, 11))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    each = TokenTimesteps(given(rows, 2), given(rows, tokens, dtype=jnp.int32))
    vector_a_token = 4 * rows * tokens * config.width
    assert memory(each) - memory(given(rows)) < 2 * vector_a_token


def parameters(shapes):
    return sum(int(np.prod(shape)) for shape in shapes)


@pytest.mark.parametrize(
    ("name", "channels", "settings"),
    [
        ("wan2.2-t2v-a14b", 16, {}),
        ("wan2.2-i2v-a14b", 16, dict(in_channels=36)),
        (
            "wan2.2-ti2v-5b",
            48,
            dict(in_channels=48, num_attention_heads=24, ffn_dim=14336, num_layers=30),
        ),
    ],
)
def test_presets_of_wan_2_2_are_as_published(name, channels, settings):
    """Settings of the published configs, which otherwise are diffusers' defaults with text of width 4096."""
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**dict(text_dim=4096, out_channels=channels) | settings)
    assert wan_config(dict(theirs.config)) == PRESETS[name]
    ours = nnx.eval_shape(lambda: Wan(PRESETS[name], nnx.Rngs(0)))
    assert parameters(leaf.shape for _, leaf in named_leaves(ours)) == parameters(p.shape for p in theirs.parameters())


def test_remat_changes_nothing():
    model = jax_model(torch_model(TINY))
    plain = run_jax(model, *inputs(TINY))
    np.testing.assert_allclose(run_jax(model, *inputs(TINY), call=NetworkCall(remat="blocks")), plain, atol=1e-6)


def test_config_survives_both_directions():
    config = wan_config(dict(WanTransformer3DModel(**IMAGE).config))
    assert wan_config(wan_settings(config)) == config


@pytest.mark.parametrize("settings", [TINY, IMAGE], ids=["t2v", "i2v"])
def test_bf16_is_as_good_as_pytorchs(settings):
    """The error that bf16 brings is at most 1.2 times that of the PyTorch model, whose own fp32 modules are ours."""
    given = inputs(settings, 512 if settings is IMAGE else 7)
    for seed in range(2):
        reference = torch_model(settings, seed)
        exact = run_torch(reference, *given)
        model = cast(jax_model(reference), Precision(weights=jnp.bfloat16, exact=FP32_LEAVES))
        ours = relative(run_jax(model, *given), exact)
        for name, module in reference.named_parameters():
            keep = any(part in WanTransformer3DModel._keep_in_fp32_modules for part in name.split("."))
            module.data = module.data.to(torch.float32 if keep else torch.bfloat16)
        theirs = relative(run_torch(reference, *given, dtype=torch.bfloat16), exact)
        assert 1e-4 < ours <= 1.2 * theirs


def test_the_policy_keeps_modulation_in_fp32():
    config = wan_config(dict(WanTransformer3DModel(**IMAGE).config))
    model = nnx.eval_shape(lambda: Wan(config, nnx.Rngs(0)))
    kept = {
        name
        for name, leaf in named_leaves(cast(model, Precision(weights=jnp.bfloat16, exact=FP32_LEAVES)))
        if leaf.dtype == jnp.float32
    }
    assert kept == {
        "modulation", "blocks.modulation", "blocks.cross_norm.scale", "blocks.cross_norm.bias",
        "time.up.kernel", "time.up.bias", "time.down.kernel", "time.down.bias",
        "image.norm1.scale", "image.norm1.bias", "image.norm2.scale", "image.norm2.bias",
    }  # fmt: skip


@pytest.mark.parametrize("change", ["key", "shape", "extra"])
def test_a_wrong_checkpoint_is_refused_by_name(change):
    reference = torch_model(TINY)
    tensors = {k: v.numpy() for k, v in reference.state_dict().items()}
    name = "blocks.1.ffn.net.2.weight"
    if change == "key":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:-1]
    else:
        name = "blocks.9.stray"
        tensors[name] = np.zeros(3, np.float32)
    config = wan_config(dict(reference.config))
    with pytest.raises((KeyError, ValueError), match=name.replace(".", r"\.")):
        assign(nnx.eval_shape(lambda: Wan(config, nnx.Rngs(0))), wan_rows(config), tensors)
