"""The Wan 2.1 and 2.2 autoencoders against diffusers': whole, in chunks, in tiles, its gradients, its two layouts."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders import autoencoder_kl_wan
from flax import nnx

from convert.tables import assign
from convert.vae_wan import config_from_diffusers, config_to_diffusers, vae_wan_rows
from dit_jax.config import UserError
from dit_jax.models.vae_wan import AXES, PRESETS, WanVAE, WanVAEConfig
from dit_jax.models.vae_wan_blocks import FrameAttention
from dit_jax.parameters import named_leaves, with_leaves
from dit_jax.sharding import logical_axes

STATISTICS = {"z_dim": 4, "latents_mean": (0.1, -0.3, 0.2, 0.0), "latents_std": (2.0, 0.5, 1.5, 1.0)}
CONFIGS = {
    "four levels": WanVAEConfig(base_dim=4, num_res_blocks=1, **STATISTICS),
    "odd widths": WanVAEConfig(
        base_dim=12,
        decoder_base_dim=8,
        num_res_blocks=1,
        dim_mult=(1, 2, 3),
        attn_scales=(0.5,),
        temporal_downsample=(True, True),
        **STATISTICS,
    ),
    "patched": WanVAEConfig(
        base_dim=8,
        num_res_blocks=1,
        dim_mult=(1, 2),
        temporal_downsample=(True,),
        patch=2,
        in_channels=12,
        out_channels=12,
        **STATISTICS,
    ),
    "residual": WanVAEConfig(
        base_dim=6,
        decoder_base_dim=8,
        num_res_blocks=1,
        dim_mult=(1, 2, 2),
        temporal_downsample=(False, True),
        residual=True,
        patch=2,
        in_channels=12,
        out_channels=12,
        **STATISTICS,
    ),
    "residual, twice in time": WanVAEConfig(
        base_dim=4,
        num_res_blocks=2,
        dim_mult=(1, 2, 2, 2),
        temporal_downsample=(False, True, True),
        residual=True,
        patch=2,
        in_channels=12,
        out_channels=12,
        **STATISTICS,
    ),
}
# 5 latent frames after the first are two chunks of 2 and one left over.
CASES = [
    *(("four levels", None), ("four levels", 2), ("odd widths", None), ("patched", None), ("patched", 1)),
    *(("residual", None), ("residual", 1), ("residual, twice in time", None), ("residual, twice in time", 2)),
]
TOLERANCE = 1e-5


@cache
def torch_vae(name):
    """The model of diffusers with random weights of ordinary size everywhere."""
    config = {key: value for key, value in config_to_diffusers(CONFIGS[name]).items() if key != "_class_name"}
    vae = AutoencoderKLWan(**config).eval()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 if "gamma" in key else 0.1 if "bias" in key else parameter[0].numel() ** -0.5
        parameter.data = noise * scale + ("gamma" in key)
    return vae


@pytest.fixture(autouse=True)
def attention_that_takes_a_cache(monkeypatch):
    """The attention of diffusers between the encoder's blocks refuses the cache that its encoder hands it."""
    forward = autoencoder_kl_wan.WanAttentionBlock.forward
    monkeypatch.setattr(autoencoder_kl_wan.WanAttentionBlock, "forward", lambda self, x, **_: forward(self, x))


@cache
def our_vae(name):
    config = CONFIGS[name]
    return assign(abstract(config), vae_wan_rows(config), numpy_tensors(torch_vae(name)))


def abstract(config):
    return nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))


def numpy_tensors(vae):
    return {key: value.numpy() for key, value in vae.state_dict().items()}


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def channels_last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def video(name, latent_frames=6, rows=5, columns=3):
    config = CONFIGS[name]
    frames = 1 + (latent_frames - 1) * config.time_factor
    shape = (2, frames, rows * config.space_factor, columns * config.space_factor, 3)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def latents(frames=6, rows=5, columns=3):
    return np.random.default_rng(1).normal(size=(2, frames, rows, columns, 4)).astype(np.float32)


@cache
def torch_moments(name):
    # diffusers takes frames by fours whatever the model: 6 latents of 2 frames leave one pair over, so it gets 7.
    x = video(name, 6 + (CONFIGS[name].time_factor == 2))
    with torch.no_grad():
        posterior = torch_vae(name).encode(channels_first(x)).latent_dist
    return channels_last(posterior.mean)[:, :6], channels_last(posterior.logvar)[:, :6], x


@cache
def torch_video(name):
    with torch.no_grad():
        return channels_last(torch_vae(name).decode(channels_first(latents())).sample)


@pytest.mark.parametrize(("name", "chunk"), CASES)
def test_encoder_is_diffusers_whole_and_in_chunks(name, chunk):
    *expected, x = torch_moments(name)
    frames = 1 + 5 * CONFIGS[name].time_factor
    moments = jax.jit(WanVAE.encode, static_argnums=2)(our_vae(name), x[:, :frames], chunk)
    for ours, theirs in zip(moments, expected, strict=True):
        assert distance(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize(("name", "chunk"), CASES)
def test_decoder_is_diffusers_whole_and_in_chunks(name, chunk):
    decoded = jax.jit(WanVAE.decode, static_argnums=2)(our_vae(name), latents(), chunk)
    assert distance(decoded, torch_video(name)) <= TOLERANCE
    assert 0.01 < np.mean(np.abs(torch_video(name)) == 1) < 0.9  # the clip is seen, and more than the clip


@pytest.mark.parametrize("name", ["patched", "residual"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_a_picture_is_the_first_frame_of_a_clip(name, chunk):
    mean, _, x = torch_moments(name)
    encoded, _ = jax.jit(WanVAE.encode, static_argnums=2)(our_vae(name), x[:, :1], chunk)
    decoded = jax.jit(WanVAE.decode, static_argnums=2)(our_vae(name), latents()[:, :1], chunk)
    assert distance(encoded, mean[:, :1]) <= TOLERANCE
    assert distance(decoded, torch_video(name)[:, :1]) <= TOLERANCE


@pytest.mark.parametrize("name", ["patched", "residual"])
def test_tiles_are_diffusers(name):
    """6×7 latents in tiles of 4 with an overlap of 1: two rows, three columns, edges of smaller sizes."""
    theirs, space = torch_vae(name), CONFIGS[name].space_factor
    x, z = video(name, 3, 6, 7), latents(2, 6, 7)
    try:
        with torch.no_grad():
            folded = space // 2  # its encoder counts folded pixels, its decoder whole ones
            theirs.enable_tiling(4 * folded, 4 * folded, 3 * folded, 3 * folded)
            posterior = theirs.encode(channels_first(x)).latent_dist
            theirs.enable_tiling(4 * space, 4 * space, 3 * space, 3 * space)
            expected = channels_last(theirs.decode(channels_first(z)).sample)
    finally:
        theirs.disable_tiling()
    mean, logvar = jax.jit(lambda vae, x: vae.encode_tiled(x, tile=4, overlap=1, chunk=None))(our_vae(name), x)
    assert distance(mean, channels_last(posterior.mean)) <= TOLERANCE
    assert distance(logvar, channels_last(posterior.logvar)) <= TOLERANCE
    decoded = jax.jit(lambda vae, z: vae.decode_tiled(z, tile=4, overlap=1, chunk=None))(our_vae(name), z)
    assert distance(decoded, expected) <= TOLERANCE
    whole = jax.jit(WanVAE.decode)(our_vae(name), z)
    assert distance(whole, expected) > 1e-3  # tiles do change the numbers


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_tiles_are_as_large_as_diffusers_has_them(name):
    """256 pixels, a quarter shared, are 32 latents of Wan 2.1 and 16 of 2.2: whole below, cut above."""
    config = replace(PRESETS[name], base_dim=4, decoder_base_dim=None)
    theirs = AutoencoderKLWan(**{key: value for key, value in config_to_diffusers(config).items() if key[0] != "_"})
    pixels = theirs.spatial_compression_ratio
    size, stride = theirs.tile_sample_min_height // pixels, theirs.tile_sample_stride_height // pixels

    def program(rows, **tiles):
        z = jax.ShapeDtypeStruct((1, 1, rows, 1, config.z_dim), jnp.float32)
        return str(jax.make_jaxpr(lambda vae, z: vae.decode_tiled(z, **tiles))(abstract(config), z))

    assert program(size) == program(size, tile=200, overlap=0)
    cut = program(size + 1)
    assert cut == program(size + 1, tile=size, overlap=size - stride) != program(size + 1, tile=200, overlap=0)


def test_a_picture_that_fits_in_a_tile_is_not_cut():
    z = latents(1)
    tiled = jax.make_jaxpr(lambda vae, z: vae.decode_tiled(z, tile=5, overlap=2))(our_vae("patched"), z)
    whole = jax.make_jaxpr(lambda vae, z: vae.decode(z, chunk=1))(our_vae("patched"), z)
    assert len(tiled.eqns) == len(whole.eqns)
    with pytest.raises(UserError, match="overlap is 5"):
        our_vae("patched").decode_tiled(z, tile=5, overlap=5)


def gradients(name, chunk):
    x, z, draw = video(name, 3, 2, 1), latents(3, 2, 1), np.random.default_rng(2)
    pulls = [jnp.asarray(draw.normal(size=z.shape), jnp.float32) for _ in range(2)]

    def loss(vae, x, z):
        moments = vae.encode(x, chunk)
        return sum(jnp.sum(a * b) for a, b in zip(moments, pulls, strict=True)) + jnp.sum(vae.decode(z, chunk) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(our_vae(name), x, z), (x, z, pulls)


def test_gradients_are_diffusers_whole_and_in_chunks():
    name = "patched"
    (ours, dx, dz), (x, z, pulls) = gradients(name, None)
    theirs = torch_vae(name)
    theirs.zero_grad()
    xt, zt = channels_first(x).requires_grad_(), channels_first(z).requires_grad_()
    posterior = theirs.encode(xt).latent_dist
    loss = (posterior.mean * channels_first(pulls[0])).sum() + (posterior.logvar * channels_first(pulls[1])).sum()
    (loss + (theirs.decode(zt).sample ** 2).sum()).backward()
    assert distance(dx, channels_last(xt.grad)) <= TOLERANCE
    assert distance(dz, channels_last(zt.grad)) <= TOLERANCE
    parameters, leaves = dict(theirs.named_parameters()), dict(named_leaves(ours))
    for row in vae_wan_rows(CONFIGS[name]):
        expected = row.to_ours(parameters[row.diffusers].grad.numpy(), leaves[row.ours].shape, "diffusers")
        assert distance(leaves[row.ours], expected) <= 2e-5, row.ours
    for whole, chunked in zip(jax.tree.leaves(ours), jax.tree.leaves(gradients(name, 1)[0][0]), strict=True):
        assert distance(chunked, whole) <= TOLERANCE


def test_gradient_of_a_zero_picture_is_finite():
    values = dict(named_leaves(our_vae("patched")))
    # Without biases it is zero all the way.
    values = {name: leaf * (not name.endswith("bias")) for name, leaf in values.items()}
    vae = with_leaves(our_vae("patched"), values)
    gradient = jax.jit(jax.grad(lambda x, vae: jnp.sum(vae.encode(x)[0])))(jnp.zeros((1, 1, 8, 8, 3)), vae)
    assert np.isfinite(gradient).all()


def test_large_frames_attend_one_at_a_time(monkeypatch):
    attention = FrameAttention(8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5, 8))
    at_once = attention(x)[0]
    monkeypatch.setattr("dit_jax.models.vae_wan_blocks._ATTENTION_BYTES", 0)
    assert "scan" in str(jax.make_jaxpr(attention)(x))
    assert distance(attention(x)[0], at_once) <= 1e-6


def test_the_program_of_chunks_does_not_grow_with_the_clip():
    vae = our_vae("patched")
    decoders = [jax.make_jaxpr(lambda z: vae.decode(z, 1))(latents(frames)) for frames in (4, 9)]
    assert len({len(str(program).splitlines()) for program in decoders}) == 1


def test_memory_of_chunks_does_not_grow_with_the_clip():
    """By no more than the video itself, twice: what the decoder holds is of a chunk, however long the clip."""
    vae = our_vae("patched")

    def memory(frames, chunk):
        return jax.jit(lambda z: vae.decode(z, chunk)).lower(latents(frames)).compile().memory_analysis()

    def growth(chunk):
        short, long = memory(4, chunk), memory(12, chunk)
        video = long.output_size_in_bytes - short.output_size_in_bytes
        return (long.temp_size_in_bytes - short.temp_size_in_bytes) / video

    assert growth(1) <= 2 < growth(None)


def test_bfloat16_model_runs_in_bfloat16():
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), our_vae("patched"))
    decoded = jax.jit(WanVAE.decode, static_argnums=2)(low, latents(), 1)
    assert decoded.dtype == jnp.bfloat16
    assert distance(decoded.astype(jnp.float32), torch_video("patched")) <= 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_every_leaf_has_one_row_of_axes(name):
    for path, leaf in named_leaves(abstract(CONFIGS[name])):
        assert logical_axes(path, AXES) == (None,) * leaf.ndim, path


def test_latents_are_normalised_per_channel():
    vae, z = our_vae("patched"), latents()
    expected = (z - np.float32(STATISTICS["latents_mean"])) / np.float32(STATISTICS["latents_std"])
    assert distance(vae.normalise(z), expected) <= 1e-6
    assert distance(vae.denormalise(vae.normalise(z)), z) <= 1e-6


def test_bad_shapes_are_told():
    vae = our_vae("four levels")
    with pytest.raises(UserError, match=r"1 \+ 4k frames, found 12; use 9"):
        vae.encode(jnp.zeros((1, 12, 8, 8, 3)))
    with pytest.raises(UserError, match="divisible by 8, found 8×12"):
        vae.encode(jnp.zeros((1, 1, 8, 12, 3)))
    with pytest.raises(UserError, match="latents_mean has 16 values, expected z_dim = 4"):
        WanVAEConfig(z_dim=4)
    with pytest.raises(UserError, match="temporal_downsample has 3"):
        WanVAEConfig(dim_mult=(1, 2))


def test_original_keys_are_those_that_diffusers_converts():
    config = WanVAEConfig(base_dim=4)
    rows = vae_wan_rows(config)
    fields = {key: value for key, value in config_to_diffusers(config).items() if key != "_class_name"}
    theirs = numpy_tensors(AutoencoderKLWan(**fields))
    original = {row.original: theirs[row.diffusers] for row in rows}
    converted = convert_wan_vae_to_diffusers(dict(original))
    assert converted.keys() == theirs.keys()
    assert all(converted[key] is theirs[key] for key in theirs)
    from_original = assign(abstract(config), rows, original, "original")
    from_diffusers = assign(abstract(config), rows, theirs, "diffusers")
    jax.tree.map(np.testing.assert_array_equal, from_original, from_diffusers)


@pytest.mark.parametrize("config", [*CONFIGS.values(), *PRESETS.values()])
def test_config_goes_to_diffusers_and_back(config):
    assert config_from_diffusers(config_to_diffusers(config)) == config


def test_config_defaults_are_diffusers():
    assert config_from_diffusers({}) == WanVAEConfig()
    published = dict(AutoencoderKLWan(base_dim=4).config) | {"base_dim": 96}
    assert config_from_diffusers(published) == WanVAEConfig()


def test_published_sizes_of_wan_2_2():
    config = PRESETS["wan2.2"]
    assert (config.time_factor, config.space_factor, config.z_dim) == (4, 16, 48)
    fields = {key: value for key, value in config_to_diffusers(config).items() if key != "_class_name"}
    with torch.device("meta"):
        theirs = AutoencoderKLWan(**fields)
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    ours = {name: leaf.shape for name, leaf in named_leaves(abstract(config))}
    rows = vae_wan_rows(config)
    assert {row.diffusers: row.outside_shape(ours[row.ours], "diffusers") for row in rows} == shapes
    assert {row.ours for row in rows} == ours.keys()


def test_original_keys_of_wan_2_2_nest_by_levels():
    """Against the authors' names, spelt out for one level of each kind."""
    config = CONFIGS["residual"]
    keys = {row.original: row.diffusers for row in vae_wan_rows(config)}
    assert len(keys) == len(vae_wan_rows(config))
    down, up = "encoder.downsamples.1.downsamples.", "decoder.upsamples.0.upsamples."
    assert keys[f"{down}0.residual.2.weight"] == "encoder.down_blocks.1.resnets.0.conv1.weight"
    assert keys[f"{down}0.shortcut.bias"] == "encoder.down_blocks.1.resnets.0.conv_shortcut.bias"
    assert keys[f"{down}1.resample.1.weight"] == "encoder.down_blocks.1.downsampler.resample.1.weight"
    assert keys[f"{down}1.time_conv.bias"] == "encoder.down_blocks.1.downsampler.time_conv.bias"
    assert keys[f"{up}1.residual.6.weight"] == "decoder.up_blocks.0.resnets.1.conv2.weight"
    assert keys[f"{up}2.time_conv.weight"] == "decoder.up_blocks.0.upsampler.time_conv.weight"
    assert keys["decoder.middle.1.to_qkv.weight"] == "decoder.mid_block.attentions.0.to_qkv.weight"
