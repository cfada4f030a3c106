"""Rotation of queries and keys: as complex numbers have it, and the form that it takes on TPU."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.ops.norms import rms_norm
from dit_jax.ops.rope import Rope, _rotated_whole, rope_table, rotate
from dit_jax.sharding import make_mesh
from infer.chips import tpu_devices

WIDTH = 12


def operands(dtype):
    """Five tokens of three heads, of two samples, and a rotation table of theirs."""
    rng = np.random.default_rng(0)
    positions = jnp.asarray(rng.integers(0, 30, (2, 5, 3)))
    return jnp.asarray(rng.standard_normal((2, 5, 3, WIDTH)), dtype), rope_table(positions, (4, 4, 4))


@pytest.mark.parametrize("rotation", [rotate, _rotated_whole])
def test_a_pair_of_channels_is_a_complex_number_turned(rotation):
    x, rope = operands(jnp.float32)
    pairs = np.asarray(x[..., : WIDTH // 2], np.complex128) + 1j * np.asarray(x[..., WIDTH // 2 :])
    turned = pairs * (np.asarray(rope.cos, np.complex128) + 1j * np.asarray(rope.sin))[:, :, None]
    np.testing.assert_allclose(rotation(x, rope), np.concatenate([turned.real, turned.imag], -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_forms_give_the_same_numbers_and_gradients(dtype):
    x, rope = operands(dtype)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)

    def found(rotation):
        loss = jax.grad(lambda x: jnp.sum(rotation(x, rope).astype(jnp.float32) * weights))
        return rotation(x, rope), loss(x)

    limit = 1e-6 if dtype == jnp.float32 else 1e-2  # of the gradient, whose two parts are rounded before their sum
    for ours, theirs in zip(found(_rotated_whole), found(rotate), strict=True):
        np.testing.assert_allclose(*(np.asarray(each, np.float32) for each in (ours, theirs)), rtol=limit, atol=limit)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'dit-jax[dev]'"
)
def test_on_tpu_no_halves_of_heads_are_written_and_nothing_in_fp32():
    """Of queries, from their projection to what the attention kernel takes."""
    mesh = make_mesh({"data": 4}, tpu_devices("v5e-4"))

    def queries(x_BND, kernel_DHK, scale_HK, cos, sin):
        projected = jnp.tensordot(x_BND, kernel_DHK, axes=1)
        normed = rms_norm(projected, scale_HK, axes=(-2, -1)).astype(projected.dtype)
        return rotate(normed, Rope(cos, sin)).transpose(0, 2, 1, 3)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 2048, 512), (512, 8, 128), (8, 128))]
    angles = jax.ShapeDtypeStruct((1, 2048, 64), jnp.float32)
    with jax.set_mesh(mesh):
        text = jax.jit(queries).lower(*shapes, angles, angles).compile().as_text()
    written = re.findall(r"= \(?(\w+)\[([\d,]+)\]", text.partition("\nENTRY")[2])
    shapes = {(dtype, tuple(sorted(map(int, sizes.split(","))))) for dtype, sizes in written}
    assert ("bf16", (1, 8, 128, 2048)) in shapes
    assert not shapes & {("bf16", (1, 8, 64, 2048)), ("f32", (1, 8, 128, 2048))}
