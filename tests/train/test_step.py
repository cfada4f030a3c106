"""The training step: what it minimises, what it keeps, and that a mesh changes nothing but where things are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dit_jax.config import UserError
from dit_jax.models.wan import Wan, WanConfig
from dit_jax.parameters import with_leaves
from train.optimizers import adam, by_module, clipped, constant, cosine, matrix_axes, muon, schedule
from train.placement import longest_axis, rows_sharding, training_mesh, update_sharding, weight_shardings
from train.step import Plan, TrainState, TrainStep, Update, alone, params_of, place_of


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
    step = TrainStep(Line(), alone(squares, optimizer, ema_decay=0.5), mesh)
    state, metrics = step(step.init(Line()), batch, jax.random.key(0))
    error = batch["x"] @ np.ones((3, 2)) - batch["y"]
    gradient = 2 * batch["x"].T @ error / error.size
    np.testing.assert_allclose(state.params["kernel"], 1 - 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-5)
    # The mean's memory is short at first: decay (1 + 0) / (10 + 0), whatever the final one.
    np.testing.assert_allclose(state.ema["kernel"], 0.1 + 0.9 * np.asarray(state.params["kernel"]), rtol=1e-5)
    assert int(state.step) == 1


def test_the_mean_of_the_weights_forgets_as_fast_as_it_is_told_once_its_memory_is_long(batch):
    step = TrainStep(Line(), alone(squares, optax.sgd(0.1), ema_decay=0.27), training_mesh())
    state = step.init(Line())
    expected, decays = {name: np.asarray(leaf) for name, leaf in state.params.items()}, (1 / 10, 2 / 11, 3 / 12, 0.27)
    for decay in (*decays, 0.27):
        state, _ = step(state, batch, jax.random.key(0))
        expected = {
            name: decay * before + (1 - decay) * np.asarray(state.params[name]) for name, before in expected.items()
        }
        for name, mean in expected.items():
            np.testing.assert_allclose(state.ema[name], mean, rtol=1e-5, atol=1e-7)


def test_the_state_is_updated_in_place(batch):
    step = TrainStep(Line(), alone(squares, adam(0.1)), training_mesh())
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
    found = step.trace(shapes).lower().compile().memory_analysis()
    state = jax.tree.leaves(step.abstract_state())
    assert found.alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in state)


def test_the_loss_falls_and_every_step_has_its_own_key(batch):
    optimizer, mesh = adam(0.1), training_mesh()
    step = TrainStep(Line(), alone(squares, optimizer), mesh)
    state = step.init(Line())
    losses, noises = [], set()
    for _ in range(40):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
        noises.add(float(metrics["noise"]))
    assert losses[-1] < losses[0] / 20
    assert len(noises) == 40


def test_clipping_bounds_the_gradient(batch):
    optimizer, mesh = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), training_mesh()
    step = TrainStep(Line(), alone(squares, optimizer), mesh)
    state = step.init(Line())
    before = {name: np.asarray(leaf) for name, leaf in state.params.items()}
    huge = {"x": batch["x"], "y": batch["y"] * 1e3}
    state, metrics = step(state, huge, jax.random.key(0))
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
    state = TrainStep(Line(), alone(squares, muon(1e-3, 1e-3)), training_mesh()).init(Line())
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


def spec(sharding):
    return tuple(sharding.spec)


def test_large_leaves_without_a_table_are_split_over_fsdp_and_small_ones_are_not():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    assert spec(longest_axis((7, 128, 256), mesh)) == (None, None, "fsdp")
    assert spec(longest_axis((512, 3, 129), mesh)) == ("fsdp", None, None)
    assert spec(longest_axis((8, 8), mesh)) == (None, None)
    assert spec(longest_axis((151, 151), mesh)) == (None, None)


def test_a_models_table_places_its_weights_under_any_name():
    mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))
    config = WanConfig(blocks=2, width=64, heads=8, head_width=8, mlp_width=96, text_width=16)
    wan = nnx.eval_shape(lambda: Wan(config, nnx.Rngs(0)))
    placed = weight_shardings({"student": wan, "line": nnx.eval_shape(Line)}, mesh)
    assert spec(placed["student.blocks.attn1.q.linear.kernel"]) == (None, "fsdp", "tensor", None)
    assert spec(placed["student.blocks.mlp.down.kernel"]) == (None, "tensor", "fsdp")
    assert spec(placed["line.kernel"]) == (None, None)


def test_a_mesh_that_cuts_heads_of_a_student_is_told():
    """Its teacher has 40, which tensor=8 divides."""
    mesh = jax.sharding.AbstractMesh((8,), ("tensor",))
    config = WanConfig(blocks=2, width=80, heads=28, head_width=2, mlp_width=96, text_width=16)
    student = nnx.eval_shape(lambda: Wan(config, nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"28 heads \(blocks.* do not divide over tensor=8: choose a size of tensor"):
        weight_shardings({"student": student}, mesh)


def test_each_device_updates_a_share_of_a_stack_that_all_hold():
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "fsdp"))
    whole, split = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((None,), ("fsdp",))
    )
    assert spec(update_sharding(whole, (8, 64, 64))) == (("data", "fsdp"),)
    assert spec(update_sharding(whole, (7, 128, 256))) == (None,)
    assert spec(update_sharding(whole, (512, 256))) == (None,)
    assert spec(update_sharding(split, (8, 64, 64))) == ("fsdp",)


def test_a_batch_that_the_mesh_does_not_divide_is_told():
    mesh = jax.sharding.AbstractMesh((3, 1), ("data", "fsdp"))
    with pytest.raises(UserError, match="batch of 8 does not divide over data=3: choose a multiple of 3"):
        rows_sharding(mesh, 8)


def test_rows_that_fsdp_does_not_divide_leave_it_the_tokens():
    mesh = jax.sharding.AbstractMesh((2, 16), ("data", "fsdp"))
    assert spec(rows_sharding(mesh, 4)) == (None, "data")
    assert spec(rows_sharding(mesh, 32)) == (None, ("data", "fsdp"))


def test_microbatches_give_the_gradient_of_the_whole_batch(batch):
    mesh, states = training_mesh(), []
    for count in (1, 4):
        update = Update(loss=plain_squares, optimizer=optax.sgd(0.1), microbatches=count)
        step = TrainStep(Line(), Plan(updates=(update,)), mesh)
        state, metrics = step(step.init(Line()), batch, jax.random.key(0))
        states.append((state.params["kernel"], metrics["loss"], metrics["gradient_norm"]))
    for whole, parts in zip(*states, strict=True):
        np.testing.assert_allclose(whole, parts, rtol=1e-5)


def plain_squares(trained, frozen, batch, key):
    return jnp.mean(jnp.square(trained(batch["x"]) - batch["y"])), {}


def test_microbatches_that_do_not_divide_are_told(batch):
    update = Update(loss=plain_squares, optimizer=optax.sgd(0.1), microbatches=3)
    step = TrainStep(Line(), Plan(updates=(update,)), training_mesh())
    with pytest.raises(UserError, match="batch of 8 does not divide into the 3 microbatches"):
        step(step.init(Line()), batch, jax.random.key(0))


def test_modules_have_learning_rates_of_their_own_and_frozen_ones_stay(batch):
    """Two lines in a row, one learning ten times as fast, on what a third adds that nothing trains."""

    def loss(trained, frozen, batch, key):
        y = trained["slow"](batch["x"]) + trained["fast"](batch["x"]) + frozen["still"](batch["x"])
        return jnp.mean(jnp.square(y - batch["y"])), {}

    optimizer = by_module({"slow": optax.sgd(0.01), "fast": optax.sgd(0.1)})
    plan = Plan(updates=(Update(loss=loss, optimizer=optimizer),), averaged=("fast",))
    trained = {"slow": Line(), "fast": Line()}
    step = TrainStep(trained, plan, training_mesh(), {"still": Line()})
    state, _ = step(step.init(trained), batch, jax.random.key(0))
    moved = {name: np.asarray(state.params[f"{name}.kernel"]) - 1 for name in trained}
    np.testing.assert_allclose(moved["fast"], 10 * moved["slow"], rtol=1e-4)
    assert np.abs(moved["fast"]).max() > 0.01
    assert set(state.ema) == {"fast.kernel", "fast.bias"}
    np.testing.assert_array_equal(step.frozen["still"].kernel[...], 1)


def test_two_updates_take_turns_on_rows_of_their_own(batch):
    """Three turns of one module, each on its own rows, then one of the other, which sees what the turns made."""

    def first(trained, frozen, batch, key):
        return jnp.mean(jnp.square(trained["a"](batch["x"]) - batch["y"])), {"drawn": jax.random.normal(key)}

    def second(trained, frozen, batch, key):
        return jnp.mean(jnp.square(trained["b"](batch["x"]) - frozen["a"](batch["x"]))), {}

    plan = Plan(
        updates=(
            Update(loss=first, optimizer=optax.sgd(0.1), trains=("a",), turns=3),
            Update(loss=second, optimizer=optax.sgd(0.1), trains=("b",)),
        )
    )
    trained = {"a": Line(), "b": Line()}
    step = TrainStep(trained, plan, training_mesh())
    state, metrics = step(step.init(trained), batch, jax.random.key(0))
    a, b = np.ones((3, 2)), np.ones((3, 2))
    bias, losses = np.zeros(2), []
    for x, y in zip(batch["x"].reshape(4, 2, 3)[:3], batch["y"].reshape(4, 2, 2)[:3], strict=True):
        error = 2 * (x @ a + bias - y) / y.size
        losses.append(np.mean(np.square(x @ a + bias - y)))
        a, bias = a - 0.1 * x.T @ error, bias - 0.1 * error.sum(0)
    x = batch["x"].reshape(4, 2, 3)[3]
    b = b - 0.1 * x.T @ (2 * (x @ b - x @ a - bias) / 4)
    np.testing.assert_allclose(state.params["a.kernel"], a, rtol=1e-4)
    np.testing.assert_allclose(state.params["b.kernel"], b, rtol=1e-4)
    assert {"a_loss", "b_loss", "a_gradient_norm", "b_gradient_norm"} <= set(metrics)
    # What turns report is their mean, and each has a key of its own.
    np.testing.assert_allclose(metrics["a_loss"], np.mean(losses), rtol=1e-4)
    of_step = jax.random.fold_in(jax.random.key(0), 0)
    drawn = [jax.random.normal(jax.random.fold_in(of_step, place_of(0, turn))) for turn in range(3)]
    np.testing.assert_allclose(metrics["a_drawn"], np.mean(drawn), rtol=1e-5)
    assert len(set(map(float, drawn))) == 3


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_turn_without_a_number_shows_in_what_is_reported(broken):
    """Whichever of a step's turns it is: weights stay as they are from then on, which nobody may overlook."""
    batch = {"x": np.ones((3, 3), np.float32), "y": np.zeros((3, 2), np.float32)}
    batch["x"][broken] = np.inf

    def loss(trained, frozen, batch, key):
        return jnp.mean(jnp.square(trained["a"](batch["x"]) - batch["y"])), {"loss_data": jnp.mean(batch["x"])}

    plan = Plan(updates=(Update(loss=loss, optimizer=optax.sgd(0.1), trains=("a",), turns=3),))
    step = TrainStep({"a": Line()}, plan, training_mesh())
    state, metrics = step(step.init({"a": Line()}), batch, jax.random.key(0))
    assert not state.sound and not np.isfinite(metrics["loss"]) and not np.isfinite(metrics["loss_data"])


def test_backbones_compute_in_their_dtype_and_weights_stay_in_fp32():
    seen = {}

    def loss(trained, frozen, batch, key):
        seen["student"] = trained["student"].blocks.mlp.up.kernel[...].dtype
        seen["exact"] = trained["student"].time.up.kernel[...].dtype
        seen["teacher"] = frozen["teacher"].blocks.mlp.up.kernel[...].dtype
        return jnp.mean(jnp.square(trained["student"].out.kernel[...].astype(jnp.float32))), {}

    config = WanConfig(blocks=2, width=16, heads=2, head_width=8, mlp_width=24, text_width=16)
    wan = Wan(config, nnx.Rngs(0))
    plan = Plan(updates=(Update(loss=loss, optimizer=adam(0.1)),), dtype=jnp.bfloat16)
    step = TrainStep({"student": wan}, plan, training_mesh(), {"teacher": wan})
    state, _ = step(step.init({"student": wan}), {"x": np.zeros((1, 1), np.float32)}, jax.random.key(0))
    assert seen == {"student": jnp.bfloat16, "exact": jnp.float32, "teacher": jnp.bfloat16}
    held = [*state.params.values(), *state.ema.values(), *jax.tree.leaves(state.opt_state)]
    assert {leaf.dtype for leaf in held if leaf.ndim} == {np.dtype(np.float32)}


def test_a_step_that_is_not_finite_changes_nothing_nor_does_any_after_it(batch):
    step = TrainStep(Line(), alone(squares, adam(0.1)), training_mesh())
    state, _ = step(step.init(Line()), batch, jax.random.key(0))
    before = jax.tree.map(np.asarray, state)
    state, metrics = step(state, {**batch, "y": batch["y"] * np.nan}, jax.random.key(0))
    state, _ = step(state, batch, jax.random.key(0))
    assert np.isnan(metrics["loss"]) and not state.sound
    for left, right in zip(jax.tree.leaves(before[:4]), jax.tree.leaves(state[:4]), strict=True):
        np.testing.assert_array_equal(left, right)


def test_rates_that_do_not_warm_up_begin_at_their_peak():
    assert cosine(1.0, 100, warmup=0)(0) == cosine(1.0, 1, warmup=20)(0) == constant(1.0, warmup=0)(0) == 1
    assert [float(constant(1.0, warmup=4)(step)) for step in (0, 2, 4, 50)] == [0, 0.5, 1, 1]


def test_gradients_are_clipped_where_there_is_a_norm():
    weights, gradient = {"x": np.zeros(2, np.float32)}, {"x": np.array([3, 4], np.float32)}
    for norm, expected in ((1.0, [0.6, 0.8]), (0.0, [3, 4])):
        optimizer = clipped(norm)
        np.testing.assert_allclose(optimizer.update(gradient, optimizer.init(weights))[0]["x"], expected, rtol=1e-6)


def test_the_cosine_warms_up_and_ends_at_nothing():
    rate = cosine(1.0, 100, warmup=10)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 5, 10, 55, 100)], [0, 0.5, 1, 0.5, 0], atol=1e-6)


def test_too_few_devices_is_told():
    with pytest.raises(UserError, match=r"needs 4096 devices, found \d+"):
        training_mesh("data=64,fsdp=64")
