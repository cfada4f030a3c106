"""The training step: what it minimises, what it keeps, and that a mesh changes nothing but where things are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dit_jax.config import UserError
from dit_jax.parameters import with_leaves
from train.step import (
    TrainState,
    adam,
    batch_sharding,
    build_step,
    init_state,
    leaf_sharding,
    matrix_axes,
    muon,
    params_of,
    schedule,
    spread,
    training_mesh,
)


class Line(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 2)))
        self.bias = nnx.Param(jnp.zeros(2))

    def __call__(self, x):
        return x @ self.kernel[...] + self.bias[...]


def squares(model, batch, key):
    error = jnp.mean(jnp.square(model(batch["x"]) - batch["y"]))
    return error, {"noise": jax.random.normal(key)}


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": (x @ rng.normal(size=(3, 2)) + 1).astype(np.float32)}


def test_a_step_is_one_of_plain_gradient_descent(batch):
    optimizer, mesh = optax.sgd(0.1), training_mesh()
    state = init_state(Line(), optimizer, mesh)
    state, metrics = build_step(Line(), squares, optimizer, mesh, ema_decay=0.5)(state, batch, jax.random.key(0))
    error = batch["x"] @ np.ones((3, 2)) - batch["y"]
    gradient = 2 * batch["x"].T @ error / error.size
    np.testing.assert_allclose(state.params["kernel"], 1 - 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-5)
    # The mean's memory is short at first: decay (1 + 0) / (10 + 0), whatever the final one.
    np.testing.assert_allclose(state.ema["kernel"], 0.1 + 0.9 * np.asarray(state.params["kernel"]), rtol=1e-5)
    assert int(state.step) == 1


def test_the_loss_falls_and_every_step_has_its_own_key(batch):
    optimizer, mesh = adam(0.1), training_mesh()
    state = init_state(Line(), optimizer, mesh)
    step = build_step(Line(), squares, optimizer, mesh)
    losses, noises = [], set()
    for _ in range(40):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
        noises.add(float(metrics["noise"]))
    assert losses[-1] < losses[0] / 20
    assert len(noises) == 40


def test_clipping_bounds_the_gradient(batch):
    optimizer, mesh = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), training_mesh()
    state = init_state(Line(), optimizer, mesh)
    before = {name: np.asarray(leaf) for name, leaf in state.params.items()}
    huge = {"x": batch["x"], "y": batch["y"] * 1e3}
    state, metrics = build_step(Line(), squares, optimizer, mesh)(state, huge, jax.random.key(0))
    moved = np.sqrt(sum(np.sum((np.asarray(state.params[name]) - before[name]) ** 2) for name in before))
    assert float(metrics["gradient_norm"]) > 100
    np.testing.assert_allclose(moved, 1.0, rtol=1e-4)


def test_rebuild_is_the_inverse_of_params_of():
    model = Line()
    model.kernel.set_value(jnp.arange(6.0).reshape(3, 2))
    again = with_leaves(nnx.eval_shape(Line), params_of(model))
    np.testing.assert_array_equal(again.kernel[...], model.kernel[...])


def test_weights_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"kernel has the wrong shape: expected \(3, 2\), found \(4, 2\)"):
        with_leaves(nnx.eval_shape(Line), {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)})


def test_state_is_a_tree_of_arrays():
    state = init_state(Line(), muon(1e-3, 1e-3), training_mesh())
    assert isinstance(state, TrainState)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


def test_muon_sees_matrices_and_convolutions():
    leaves = {
        "blocks.attn1.q.linear.kernel": (2, 8, 4, 2),
        "blocks.attn1.o.kernel": (2, 4, 2, 8),
        "blocks.mlp.up.kernel": (2, 8, 16),
        "down.1.conv.kernel": (3, 3, 4, 8),
        "conv1.kernel": (3, 3, 3, 4, 8),
        "time.up.kernel": (8, 8),
        "blocks.attn1.q.norm": (2, 4, 2),
    }
    found = matrix_axes({name: jnp.zeros(shape) for name, shape in leaves.items()})
    assert found["time.up.kernel"] is None
    assert found["blocks.attn1.q.norm"] is None
    sizes = {}
    for name, axes in found.items():
        if axes is not None:
            inputs, outputs = (np.atleast_1d(side) for side in axes)
            sizes[name] = tuple(int(np.prod([leaves[name][axis] for axis in side])) for side in (inputs, outputs))
    assert sizes == {
        "blocks.attn1.q.linear.kernel": (8, 8),
        "blocks.attn1.o.kernel": (8, 8),
        "blocks.mlp.up.kernel": (8, 16),
        "down.1.conv.kernel": (36, 8),
        "conv1.kernel": (108, 8),
    }


def test_the_schedule_warms_up_holds_and_decays():
    rate = schedule(1.0, 100, warmup=10, decay=20)
    values = [float(rate(step)) for step in (0, 10, 50, 79, 90, 100)]
    np.testing.assert_allclose(values, [0.1, 1, 1, 1, 0.51, 0.02], rtol=1e-5)


def test_large_leaves_are_split_over_fsdp_and_small_ones_are_not():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    assert tuple(leaf_sharding(mesh, jnp.zeros((7, 128, 256))).spec) == (None, None, "fsdp")
    assert tuple(leaf_sharding(mesh, jnp.zeros((512, 3, 129))).spec) == ("fsdp", None, None)
    assert tuple(leaf_sharding(mesh, jnp.zeros((8, 8))).spec) == (None, None)
    assert tuple(leaf_sharding(mesh, jnp.zeros((151, 151))).spec) == (None, None)
    assert tuple(batch_sharding(mesh).spec) == (("data", "fsdp"),)


def test_each_device_updates_a_share_of_a_stack():
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "fsdp"))
    assert tuple(spread(mesh, jnp.zeros((8, 64, 64))).spec) == (("data", "fsdp"),)
    assert tuple(spread(mesh, jnp.zeros((7, 128, 256))).spec) == (None, None, "fsdp")
    assert tuple(spread(mesh, jnp.zeros((512, 256))).spec) == ("fsdp", None)


def test_a_batch_that_the_mesh_does_not_divide_is_told(batch):
    mesh = jax.sharding.AbstractMesh((3, 1), ("data", "fsdp"))
    step = build_step(Line(), squares, adam(0.1), mesh)
    with pytest.raises(UserError, match="batch of 8 does not divide over 3 devices"):
        step(None, batch, jax.random.key(0))


def test_too_few_devices_is_told():
    with pytest.raises(UserError, match=r"needs 4096 devices, found \d+"):
        training_mesh(data=64, fsdp=64)
