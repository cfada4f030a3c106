"""The precision of linear maps: on TPU and GPU an fp32 product is one only where that is asked for."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dit_jax.methods.patch_adapters import LowRank, ResidualBlock
from dit_jax.ops.linear import Linear, LinearGeneral

X = jnp.ones((2, 5, 6))
MAPS = {
    "linear": lambda rngs: Linear(6, 4, rngs=rngs),
    "general": lambda rngs: LinearGeneral(6, (3, 2), rngs=rngs),
}


def lowered(module, *arguments) -> str:
    return jax.jit(lambda module, *arguments: module(*arguments)).lower(module, *arguments).as_text()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")])
def test_weights_of_fp32_are_multiplied_in_fp32(name, dtype, precision):
    module = jax.tree.map(lambda leaf: leaf.astype(dtype), MAPS[name](nnx.Rngs(0)))
    for x in (X, X.astype(jnp.bfloat16)):
        assert f"precision = [{precision}, {precision}]" in lowered(module, x)
        assert module(x).dtype == dtype


def test_so_are_the_products_of_patch_adapters():
    text = lowered(ResidualBlock(6, 3, 4, nnx.Rngs(0)), jnp.ones((2, 1, 4, 4, 6)), jnp.float32(3))
    assert text.count("[HIGHEST, HIGHEST]") == 2 and "#stablehlo<precision HIGHEST>" in text
    assert "DEFAULT" not in text
    added = LowRank(1, 6, 4, 2)
    assert "DEFAULT" not in lowered(added, X[None])
    assert "HIGHEST" not in lowered(added, X[None].astype(jnp.bfloat16))
