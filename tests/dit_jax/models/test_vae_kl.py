"""FLUX's autoencoder against diffusers' `AutoencoderKL`: whole, in tiles, in bf16, its gradients, its config."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TheirAutoencoderKL
from flax import nnx

from convert.tables import assign
from convert.vae_kl import config_from_diffusers, config_to_diffusers, vae_kl_rows
from dit_jax.config import UserError
from dit_jax.models.vae_kl import (
    AXES,
    FLUX_VAE,
    PRESETS,
    AutoencoderKL,
    AutoencoderKLConfig,
    FrameAttention,
    GroupNorm,
)
from dit_jax.parameters import Precision, cast, named_leaves
from dit_jax.sharding import logical_axes

SMALL = AutoencoderKLConfig(widths=(8, 16, 24), groups=4, z_dim=4, scaling_factor=0.6, shift_factor=-0.2)
CONFIGS = {
    "three levels": SMALL,
    "quant convs": replace(SMALL, widths=(32, 64), groups=32, blocks=1, quant_conv=True, post_quant_conv=True),
    "no attention": replace(SMALL, widths=(12, 12), groups=3, blocks=1, middle_attention=False, z_dim=3),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
TOLERANCE = 1e-5
# The config of black-forest-labs/FLUX.1-dev, as far as it says anything of the model.
PUBLISHED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def their_vae(config):
    return TheirAutoencoderKL(**{key: value for key, value in config_to_diffusers(config).items() if key[0] != "_"})


@cache
def torch_vae(name, dtype=torch.float32):
    """The model of diffusers with random weights of ordinary size everywhere."""
    vae = their_vae(CONFIGS[name]).eval()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in vae.named_parameters():
        is_scale = "norm" in key and "weight" in key
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * size + is_scale
    return vae.to(dtype)


@cache
def our_vae(name):
    config = CONFIGS[name]
    tensors = {key: value.numpy() for key, value in torch_vae(name).state_dict().items()}
    return assign(abstract(config), vae_kl_rows(config), tensors)


def abstract(config):
    return nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))


def channels_first(pictures):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(pictures)[:, 0], -1, 1)))


def channels_last(pictures):
    return np.moveaxis(pictures.detach().float().numpy(), 1, -1)[:, None]


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def pictures(name, rows=5, columns=3, batch=2):
    factor = CONFIGS[name].space_factor
    shape = (batch, 1, rows * factor, columns * factor, 3)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def latents(name, rows=5, columns=3, batch=2):
    shape = (batch, 1, rows, columns, CONFIGS[name].z_dim)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@cache
def torch_moments(name, dtype=torch.float32):
    with torch.no_grad():
        posterior = torch_vae(name, dtype).encode(channels_first(pictures(name)).to(dtype)).latent_dist
    # The log-variance before diffusers bounds it.
    return channels_last(posterior.mean), channels_last(posterior.parameters.chunk(2, dim=1)[1])


@cache
def torch_pictures(name, dtype=torch.float32):
    with torch.no_grad():
        return channels_last(torch_vae(name, dtype).decode(channels_first(latents(name)).to(dtype)).sample)


@EVERY
def test_encoder_is_diffusers(name):
    moments = jax.jit(AutoencoderKL.encode)(our_vae(name), pictures(name))
    for ours, theirs in zip(moments, torch_moments(name), strict=True):
        assert distance(ours, theirs) <= TOLERANCE


@EVERY
def test_decoder_is_diffusers(name):
    decoded = jax.jit(lambda vae, z: vae.decode(z, clip=False))(our_vae(name), latents(name))
    assert distance(decoded, torch_pictures(name)) <= TOLERANCE


def test_pictures_are_clipped_unless_told_otherwise():
    name = "three levels"
    expected = torch_pictures(name).clip(-1, 1)
    assert 0.01 < np.mean(np.abs(expected) == 1) < 0.9
    assert distance(jax.jit(AutoencoderKL.decode)(our_vae(name), latents(name)), expected) <= TOLERANCE


@pytest.mark.parametrize("chunk", [None, 1])
def test_frames_are_coded_each_alone(chunk):
    """The calls of the video autoencoder, a chunk and more than one frame, change nothing."""
    name = "three levels"
    x, z = (np.moveaxis(value, 0, 1) for value in (pictures(name), latents(name)))
    mean, _ = jax.jit(AutoencoderKL.encode, static_argnums=2)(our_vae(name), x, chunk)
    assert distance(np.moveaxis(mean, 0, 1), torch_moments(name)[0]) <= TOLERANCE
    decoded = jax.jit(AutoencoderKL.decode, static_argnums=2)(our_vae(name), z, chunk)
    assert distance(np.moveaxis(decoded, 0, 1), torch_pictures(name).clip(-1, 1)) <= TOLERANCE


def test_tiles_are_diffusers():
    """10×14 latents in tiles of 8 with an overlap of 2: two rows, three columns, edges of smaller sizes."""
    name = "quant convs"
    theirs, factor = torch_vae(name), CONFIGS[name].space_factor
    x, z = pictures(name, 10, 14), latents(name, 10, 14)
    try:
        theirs.enable_tiling()
        theirs.tile_sample_min_size, theirs.tile_latent_min_size = 8 * factor, 8
        with torch.no_grad():
            posterior = theirs.encode(channels_first(x)).latent_dist
            expected = channels_last(theirs.decode(channels_first(z)).sample).clip(-1, 1)
    finally:
        theirs.disable_tiling()
    mean, logvar = jax.jit(lambda vae, x: vae.encode_tiled(x, tile=8, overlap=2))(our_vae(name), x)
    assert distance(mean, channels_last(posterior.mean)) <= TOLERANCE
    assert distance(logvar, channels_last(posterior.parameters.chunk(2, dim=1)[1])) <= TOLERANCE
    decoded = jax.jit(lambda vae, z: vae.decode_tiled(z, tile=8, overlap=2))(our_vae(name), z)
    assert distance(decoded, expected) <= TOLERANCE
    assert distance(jax.jit(AutoencoderKL.decode)(our_vae(name), z), expected) > 1e-3  # tiles do change the numbers


def test_tiles_are_as_large_as_flux_has_them_in_diffusers():
    """128 latents, a quarter shared: whole below, cut above."""
    theirs = TheirAutoencoderKL(**config_to_diffusers(replace(SMALL, widths=(4,) * 4, blocks=1)))
    assert (theirs.tile_latent_min_size, theirs.tile_overlap_factor) == (128, 0.25)
    vae = abstract(replace(SMALL, widths=(4,) * 4, blocks=1))

    def program(rows, **tiles):
        z = jax.ShapeDtypeStruct((1, 1, rows, 1, 4), jnp.float32)
        return str(jax.make_jaxpr(lambda vae, z: vae.decode_tiled(z, **tiles))(vae, z))

    assert program(128) == program(128, tile=200, overlap=0)
    assert program(129) == program(129, tile=128, overlap=32) != program(129, tile=200, overlap=0)


def test_gradients_are_diffusers():
    name = "three levels"
    x, z, draw = pictures(name, 3, 2), latents(name, 3, 2), np.random.default_rng(2)
    pulls = [draw.normal(size=z.shape).astype(np.float32) for _ in range(2)]

    def loss(vae, x, z):
        moments = vae.encode(x)
        pulled = sum(jnp.sum(a * b) for a, b in zip(moments, pulls, strict=True))
        return pulled + jnp.sum(vae.decode(z, clip=False) ** 2)

    ours, dx, dz = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(our_vae(name), x, z)
    theirs = torch_vae(name)
    theirs.zero_grad()
    xt, zt = channels_first(x).requires_grad_(), channels_first(z).requires_grad_()
    moments = theirs.encode(xt).latent_dist.parameters.chunk(2, dim=1)
    pulled = sum((a * channels_first(b)).sum() for a, b in zip(moments, pulls, strict=True))
    (pulled + (theirs.decode(zt).sample ** 2).sum()).backward()
    assert distance(dx, channels_last(xt.grad)) <= TOLERANCE
    assert distance(dz, channels_last(zt.grad)) <= TOLERANCE
    parameters, leaves = dict(theirs.named_parameters()), dict(named_leaves(ours))
    whole = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in leaves.values()))
    for row in vae_kl_rows(CONFIGS[name]):
        expected = row.to_ours(parameters[row.diffusers].grad.numpy(), leaves[row.ours].shape, "diffusers")
        # What a norm or the softmax takes out again, as the bias of the keys, has a gradient of nothing but rounding.
        negligible = np.linalg.norm(expected) <= 1e-5 * whole
        assert negligible or distance(leaves[row.ours], expected) <= 2e-5, row.ours


def test_gradients_of_a_flat_picture_are_finite():
    """Every group of the first norm has next to no variance, away from the edges."""
    gradient = jax.jit(jax.grad(lambda x, vae: jnp.sum(vae.encode(x)[0])))
    assert np.isfinite(gradient(jnp.full((1, 1, 8, 8, 3), -1.0), our_vae("three levels"))).all()
    draw = np.random.default_rng(4).normal(size=(1, 1, 4, 4, 8)).astype(np.float32)
    of_zeros = jax.grad(lambda x: jnp.sum(GroupNorm(8, 4)(x) * draw))(jnp.zeros(draw.shape))
    # Without variance the norm is (x - mean) / sqrt(epsilon).
    grouped = draw.reshape(16, 4, 2)
    expected = (grouped - grouped.mean(axis=(0, 2), keepdims=True)).reshape(draw.shape) * 1e3
    assert distance(of_zeros, expected) <= TOLERANCE


def test_large_pictures_attend_a_column_at_a_time(monkeypatch):
    attention = FrameAttention(8, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5, 8))

    def value_and_gradient(x):
        return jax.jit(lambda x: (attention(x), jax.grad(lambda x: jnp.sum(jnp.sin(attention(x))))(x)))(x)

    at_once = value_and_gradient(x)
    monkeypatch.setattr("dit_jax.models.vae_kl._ATTENTION_BYTES", 0)
    assert "scan" in str(jax.make_jaxpr(attention)(x))
    for ours, expected in zip(value_and_gradient(x), at_once, strict=True):
        assert distance(ours, expected) <= 1e-6


def test_norms_are_in_fp32_whatever_comes_in():
    norm = GroupNorm(12, 3)
    rng = np.random.default_rng(3)
    scale, bias = rng.normal(size=(2, 12)).astype(np.float32)
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    x = jnp.asarray(rng.normal(loc=20, size=(2, 1, 5, 3, 12)), jnp.bfloat16)  # a mean that bf16 sums would not survive
    expected = torch.nn.functional.group_norm(
        channels_first(x.astype(jnp.float32)), 3, torch.from_numpy(scale), torch.from_numpy(bias), 1e-6
    )
    ours = jax.jit(norm)(x)
    assert ours.dtype == jnp.float32
    assert distance(ours, channels_last(expected)) <= TOLERANCE


@EVERY
def test_bf16_errs_no_more_than_torch_does(name):
    low = cast(our_vae(name), Precision(weights=jnp.bfloat16))
    mean, logvar = jax.jit(AutoencoderKL.encode)(low, pictures(name))
    decoded = jax.jit(lambda vae, z: vae.decode(z, clip=False))(low, latents(name))
    assert mean.dtype == decoded.dtype == jnp.bfloat16
    ours = np.concatenate([mean, logvar], axis=-1).astype(np.float32), decoded.astype(np.float32)
    exact = np.concatenate(torch_moments(name), axis=-1), torch_pictures(name)
    theirs = np.concatenate(torch_moments(name, torch.bfloat16), axis=-1), torch_pictures(name, torch.bfloat16)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert distance(a, c) <= 1.2 * distance(b, c)


@pytest.mark.parametrize("config", [*CONFIGS.values(), FLUX_VAE])
def test_every_leaf_has_one_row_of_axes(config):
    for path, leaf in named_leaves(abstract(config)):
        assert logical_axes(path, AXES) == (None,) * leaf.ndim, path


def test_latents_are_shifted_and_scaled():
    vae, z = our_vae("three levels"), latents("three levels")
    assert distance(vae.normalise(z), (z + 0.2) * 0.6) <= 1e-6
    assert distance(vae.denormalise(vae.normalise(z)), z) <= 1e-6
    assert vae.normalise(z.astype(jnp.bfloat16)).dtype == vae.denormalise(z.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_sizes_are_those_that_the_pipelines_ask_for():
    assert (FLUX_VAE.space_factor, FLUX_VAE.time_factor, FLUX_VAE.z_dim) == (8, 1, 16)
    assert PRESETS["flux-vae"] is FLUX_VAE


def test_bad_shapes_are_told():
    with pytest.raises(UserError, match="divisible by 4, found 8×10"):
        our_vae("three levels").encode(jnp.zeros((1, 1, 8, 10, 3)))
    with pytest.raises(UserError, match="divisible by 4, found 10×8"):
        our_vae("three levels").encode_tiled(jnp.zeros((1, 1, 10, 8, 3)))
    with pytest.raises(UserError, match="level of 10 channels, expected a multiple of its 4"):
        replace(SMALL, widths=(8, 10))


def test_the_config_of_flux_is_read_and_written():
    assert config_from_diffusers(PUBLISHED) == FLUX_VAE
    assert config_to_diffusers(FLUX_VAE) == PUBLISHED


@pytest.mark.parametrize("config", CONFIGS.values())
def test_config_goes_to_diffusers_and_back(config):
    assert config_from_diffusers(config_to_diffusers(config)) == config
    assert config_from_diffusers(dict(their_vae(config).config)) == config


def test_absent_settings_have_the_defaults_of_diffusers():
    assert config_from_diffusers({}) == config_from_diffusers(dict(TheirAutoencoderKL().config))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("act_fn", "gelu"),
        ("latents_mean", [0.0] * 16),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"] * 2),
        ("up_block_types", ("UpDecoderBlock2D",)),
    ],
)
def test_configs_of_other_forms_are_refused(setting, value):
    with pytest.raises(UserError, match=f"the VAE has {setting}"):
        config_from_diffusers(PUBLISHED | {setting: value})
