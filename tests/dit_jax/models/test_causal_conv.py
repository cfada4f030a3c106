"""The convolutions of `causal_conv` against XLA's 3-D one, and a clip in pieces against the clip whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_jax.models.causal_conv import CausalConv, HalvingTimeConv, causal_conv3d

SHIFTED = ((0, 1), (0, 1))


def three_dimensional(x, kernel, pads, stride):
    layout = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, stride, stride), ((0, 0), *pads), dimension_numbers=layout)


def distance(a, b):
    return np.linalg.norm(np.asarray(a - b, np.float64)) / np.linalg.norm(np.asarray(b, np.float64))


@pytest.mark.parametrize(
    ("kernel", "pads", "stride"),
    [((3, 3, 3, 5, 7), ((1, 1), (1, 1)), 1), ((1, 3, 3, 4, 3), SHIFTED, 2), ((2, 3, 1, 2, 4), ((1, 1), (0, 0)), 1)],
)
def test_frame_convolutions_and_their_gradients_are_those_of_one_3d_convolution(kernel, pads, stride):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(2, 6, 8, 10, kernel[3])), jnp.float32)
    weights = jnp.asarray(draw.normal(size=kernel), jnp.float32)

    def run(conv):
        y, pull = jax.vjp(lambda x, w: conv(x, w, pads, stride), x, weights)
        return y, *pull(jnp.sin(y))

    for ours, theirs in zip(jax.jit(run, static_argnums=0)(causal_conv3d), run(three_dimensional), strict=True):
        assert ours.shape == theirs.shape
        assert distance(ours, theirs) <= 1e-5


@pytest.mark.parametrize("size", [(3, 3, 3), (3, 1, 1), (1, 1, 1)])
def test_causal_conv_in_pieces(size):
    conv = CausalConv(4, 6, size, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 7, 5, 3, 4))
    whole, _ = conv(x)
    pieces, cache = [], None
    for start, stop in ((0, 1), (1, 2), (2, 7)):
        y, cache = conv(x[:, start:stop], cache)
        pieces.append(y)
    assert distance(jnp.concatenate(pieces, axis=1), whole) <= 1e-6
    later, _ = conv(x.at[:, 4:].set(9.0))
    np.testing.assert_array_equal(later[:, :4], whole[:, :4])


def test_halving_conv_in_pieces():
    conv = HalvingTimeConv(4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 5, 3, 4))
    whole, _ = conv(x)
    assert whole.shape == (2, 5, 5, 3, 4)
    np.testing.assert_array_equal(whole[:, 0], x[:, 0])
    pieces, cache = [], None
    for start, stop in ((0, 1), (1, 5), (5, 9)):
        y, cache = conv(x[:, start:stop], cache)
        pieces.append(y)
    assert distance(jnp.concatenate(pieces, axis=1), whole) <= 1e-6


def test_bfloat16_keeps_its_dtype_and_sums_the_kernel_gradient_in_fp32():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(1, 12, 16, 16, 4)), jnp.bfloat16)
    kernel = jnp.asarray(draw.normal(size=(3, 3, 3, 4, 4)), jnp.bfloat16)
    gradient = jax.grad(lambda x, k: jnp.sum(causal_conv3d(x, k).astype(jnp.float32) ** 2), argnums=1)
    low = gradient(x, kernel)
    assert low.dtype == jnp.bfloat16
    assert distance(low.astype(jnp.float32), gradient(x.astype(jnp.float32), kernel.astype(jnp.float32))) <= 1e-2
