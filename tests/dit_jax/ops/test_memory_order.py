"""Slices of what a loop carries keep its memory order on TPU, and are left alone elsewhere."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from dit_jax.ops.memory_order import row_major
from dit_jax.sharding import make_mesh
from infer.chips import tpu_devices


def test_off_tpu_nothing_is_said_about_order():
    x = jnp.ones((2, 3))
    assert row_major(x) is x


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'dit-jax[dev]'"
)
def test_on_tpu_an_update_cannot_change_the_order_of_what_it_updates():
    """A transposed slice, which XLA would rather write in the slice's own order."""
    mesh = make_mesh({"data": 4}, tpu_devices("v5e-4"))
    with jax.set_mesh(mesh):
        text = jax.jit(lambda x: row_major(x.transpose(2, 0, 1))).lower(jax.ShapeDtypeStruct((3, 5, 7), "float32"))
    assert "@LayoutConstraint" in text.as_text()
    assert "dense<[2, 1, 0]> : tensor<3xindex>" in text.as_text()
