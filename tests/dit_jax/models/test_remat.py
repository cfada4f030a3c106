"""Policies of recomputation: the same gradients, less and less memory; the host's memory where it is asked for."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_jax.config import UserError
from dit_jax.models.network import Conditioning, NetworkCall, layout, network
from dit_jax.models.remat import POLICIES, parse_remat
from dit_jax.models.wan import Wan, WanConfig
from dit_jax.parameters import Precision, cast
from dit_jax.sharding import make_mesh, replicated, shardings
from infer.chips import tpu_devices

CONFIG = WanConfig(blocks=6, width=48, heads=4, head_width=12, mlp_width=96, text_width=16)


def loss(model, latents, text, *, remat):
    t = jnp.full(len(latents), 400.0)
    call = NetworkCall(remat=remat)
    rows, _ = network(model, call, layout(latents, model.config.patch), t, Conditioning(text))
    return jnp.mean(jnp.square(rows))


@pytest.fixture(scope="module")
def inputs():
    model = jax.jit(lambda: Wan(CONFIG, nnx.Rngs(0)))()
    keys = jax.random.split(jax.random.key(1))
    return model, jax.random.normal(keys[0], (2, 3, 10, 14, 16)), jax.random.normal(keys[1], (2, 7, 16))


@pytest.fixture(scope="module")
def gradients(inputs):
    """Of each policy: gradients by leaf, and bytes of temporaries."""
    found = {}
    for policy in POLICIES:
        if policy != "offload":  # a CPU has no memory but the host's
            compiled = jax.jit(jax.grad(partial(loss, remat=policy))).lower(*inputs).compile()
            found[policy] = jax.tree.leaves(compiled(*inputs)), compiled.memory_analysis().temp_size_in_bytes
    return found


@pytest.mark.parametrize("policy", ["blocks", "attention", "matmuls"])
def test_gradients_are_those_without_recomputation(gradients, policy):
    for plain, again in zip(gradients["none"][0], gradients[policy][0], strict=True):
        np.testing.assert_allclose(again, plain, rtol=2e-4, atol=1e-6)


def test_what_is_kept_takes_memory(gradients):
    taken = {policy: size for policy, (_, size) in gradients.items()}
    assert taken["blocks"] < taken["attention"] < taken["matmuls"] < taken["none"]


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_offloading_moves_block_inputs_to_the_host_of_a_tpu():
    mesh = make_mesh({"fsdp": 4}, tpu_devices("v5e:2x2"))
    config = WanConfig(blocks=6, width=1024, heads=8, head_width=128, mlp_width=1024, text_width=128)
    model = cast(nnx.eval_shape(lambda: Wan(config, nnx.Rngs(0))), Precision(weights=jnp.bfloat16))
    from dit_jax.models.wan import AXES

    placed = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), model, shardings(model, AXES, mesh))
    latents = jax.ShapeDtypeStruct((1, 4, 64, 64, 16), jnp.float32, sharding=replicated(mesh))
    text = jax.ShapeDtypeStruct((1, 128, 128), jnp.float32, sharding=replicated(mesh))
    with jax.set_mesh(mesh):
        found = {
            policy: jax.jit(jax.grad(partial(loss, remat=policy))).lower(placed, latents, text).compile()
            for policy in ("blocks", "offload")
        }
    memory = {policy: compiled.memory_analysis() for policy, compiled in found.items()}
    inputs = 6 * 4096 * 1024 * 2 // 4  # bytes a chip of all blocks' inputs
    assert memory["offload"].host_temp_size_in_bytes >= 0.8 * inputs
    assert memory["blocks"].host_temp_size_in_bytes == 0


def test_an_unknown_policy_is_told():
    with pytest.raises(UserError, match="remat is 'full', expected one of none, blocks, attention, matmuls, offload"):
        parse_remat("full")
