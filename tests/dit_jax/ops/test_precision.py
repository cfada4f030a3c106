"""What is computed in fp32 whatever comes in: norms, rotations, the velocity of a model in bf16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_jax.models.flux import Flux, FluxConfig
from dit_jax.models.network import Conditioning, NetworkCall, layout, network
from dit_jax.models.wan import Wan, WanConfig
from dit_jax.ops.norms import layer_norm, rms_norm
from dit_jax.ops.rope import rope_table, rotate
from dit_jax.parameters import Precision, cast

WAN = WanConfig(blocks=2, width=24, heads=2, head_width=12, mlp_width=32, text_width=8, in_channels=4, out_channels=4)
FLUX = FluxConfig(
    double_blocks=1, single_blocks=1, width=16, heads=2, head_width=8, mlp_width=24, in_channels=4, out_channels=4,
    text_width=8, pooled_width=5, rope_widths=(2, 2, 4),
)  # fmt: skip


def halves(*shape, mean=0.0, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) + mean, jnp.bfloat16)


def test_norms_of_bf16_are_those_of_the_exact_values():
    """Far from zero, where a mean or a difference that is rounded to bf16 is off by as much as what is normed."""
    x, scale, bias = halves(5, 3, 24, mean=30.0), halves(3, 24, seed=1), halves(3, 24, seed=2)
    exact, s, b = (np.asarray(each, np.float64) for each in (x, scale, bias))
    centred = exact - exact.mean(-1, keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    found = layer_norm(x, scale[0], bias[0])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, normed * s[0] + b[0], rtol=1e-4, atol=1e-4)
    for axes, of in (((-1,), s[0]), ((-2, -1), s)):
        for present in (1.0, 0.75):
            size = np.sqrt(np.square(exact).mean(axes, keepdims=True) * present + 1e-6)
            found = rms_norm(x, jnp.asarray(of, jnp.bfloat16), axes=axes, present=present)
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, exact / size * of, rtol=1e-5)


def test_rotations_of_bf16_are_rounded_once():
    positions = np.random.default_rng(3).integers(0, 60, (2, 7, 3)).astype(np.float32)
    x = halves(2, 7, 4, 12)
    found = rotate(x, rope_table(jnp.asarray(positions), (4, 4, 4)))
    frequencies = 1e4 ** -(np.arange(0, 4, 2) / 4)
    angles = (positions[..., None].astype(np.float64) * frequencies).reshape(2, 7, 1, 6)
    one, other = np.split(np.asarray(x, np.float64), 2, axis=-1)
    turned = np.concatenate(
        [one * np.cos(angles) - other * np.sin(angles), one * np.sin(angles) + other * np.cos(angles)], axis=-1
    )
    nearest = np.asarray(jnp.asarray(turned, jnp.float32).astype(jnp.bfloat16), np.float32)
    assert found.dtype == jnp.bfloat16
    assert np.mean(np.asarray(found, np.float32) != nearest) < 0.01


@pytest.mark.parametrize(("kind", "config", "frames"), [(Wan, WAN, 3), (Flux, FLUX, 1)])
def test_the_velocity_of_a_model_in_bf16_is_in_fp32(kind, config, frames):
    """Guidance takes the difference of two that are alike."""
    model = nnx.eval_shape(lambda: kind(config, nnx.Rngs(0)))
    half = cast(model, Precision(weights=jnp.bfloat16))
    told = Conditioning(jnp.zeros((2, 3, 8)), pooled=jnp.zeros((2, 5)), guidance=jnp.ones(2))
    tokens = layout(jnp.zeros((2, frames, 4, 6, 4)), config.patch)
    rows, _ = jax.eval_shape(lambda model: network(model, NetworkCall(), tokens, jnp.zeros(2), told), half)
    assert rows.dtype == jnp.float32 and half.out.kernel.dtype == jnp.bfloat16
