"""Blocks ranked by what leaving them out costs, against every set of blocks and against models that lack the block."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.methods.routing import top_gates
from train.block_ranking import BIAS, RANKING, Ranked, logits_of, ranked_blocks
from train.losses import mean_square, noised, predicted
from train.models import Source
from train.placement import training_mesh
from train.recipe import POSITION, Driven, abstract_batch
from train.recipes import pare_stage2
from train.step import TrainStep


def costs(gates):
    """What blocks are worth alone, and 1 and 2 for each other: either can go, not both."""
    worth = np.array([9.0, 1, 1.5, 5, 2, 4, 3, 9])
    return float(np.sum(worth * (1 - gates)) + 10 * (1 - gates[1]) * (1 - gates[2]))


def test_the_cheapest_block_goes_next_given_those_that_are_gone():
    order, errors = ranked_blocks(costs, blocks=8, least=4)
    assert order[:4] == [1, 4, 6, 5] and errors == [1, 3, 6, 10]
    assert order[4:6] == [3, 2] and set(order[6:]) == {0, 7}
    every, more = ranked_blocks(costs, blocks=8, least=2)
    assert every[:6] == [1, 4, 6, 5, 3, 2] and more == [1, 3, 6, 10, 15, 26.5]
    assert ranked_blocks(costs, blocks=8, least=8) == ([1, 2, 4, 6, 5, 3, *{0, 7}], [])


@pytest.mark.parametrize("least", range(2, 9))
def test_the_router_leaves_them_out_in_that_order(least):
    order, _ = ranked_blocks(costs, blocks=8, least=2)
    logits = logits_of(order)
    assert logits.dtype == np.float32 and np.abs(logits).max() == 1
    gates = np.asarray(top_gates(jnp.asarray(logits)[None], jnp.asarray(least)))[0]
    assert set(np.flatnonzero(gates == 0)) == set(order[: 8 - least])


class Still(Driven):
    """A step that does nothing."""

    def __call__(self, state, batch, key):
        return state, {}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """A student of demo-wan that has lost its way a little, ranked on random latents."""
    out = tmp_path_factory.mktemp("run")
    settings = pare_stage2.VARIANTS["demo"] | {"student": "demo-wan", "out": str(out), "batch": 2, "size": "64x64"}
    config = pare_stage2.Config(**settings, frames=5, least=7)
    source = Source("demo-wan", training_mesh("fsdp=1"))
    training = pare_stage2.training(config, source)
    step = TrainStep(training.trained, training.plan, source.mesh, training.frozen)
    state = step.init(training.trained)
    rng = np.random.default_rng(0)
    params = {
        name: array * (1 + 0.1 * rng.standard_normal(array.shape, np.float32)) if "blocks" in name else array
        for name, array in state.params.items()
    }
    state = state._replace(params=params)
    batch = {
        name: rng.standard_normal(leaf.shape).astype(leaf.dtype)
        for name, leaf in abstract_batch(config, source.config, 2).items()
    }
    told = Ranked(out=str(out), driven=Still(step, None), settings=config.settings(source))
    after, _ = told(state, batch | {POSITION: 0}, jax.random.key(3))
    assert told(state, batch | {POSITION: 1}, jax.random.key(3))[0] is state
    return config.settings(source), step, state, batch, after, json.loads((out / RANKING).read_text())


def test_the_first_one_is_that_without_which_a_model_is_nearest_to_the_teacher(ranked):
    """As a model of nine blocks, of which none is gated."""
    settings, step, state, batch, _, told = ranked
    student = step.rebuilt(state.params)["student"]
    at = noised(jnp.asarray(batch["latents"]), jax.random.key(3), settings.flow)
    target, _ = predicted(step.frozen["teacher"], at, batch)
    errors = {}
    for block in range(1, 9):
        shorter = jax.tree.map(lambda leaf: leaf, student)
        shorter.blocks = jax.tree.map(lambda leaf, block=block: jnp.delete(leaf, block, axis=0), student.blocks)
        errors[block] = float(mean_square(predicted(shorter, at, batch)[0] - target, None))
    assert told["order"][0] == min(errors, key=errors.get)
    assert told["velocity_errors"][0] == pytest.approx(min(errors.values()), rel=1e-4)
    assert len(told["velocity_errors"]) == 3 and sorted(told["order"]) == list(range(10))
    assert max(errors.values()) > 1.2 * min(errors.values())


def test_the_step_is_given_the_ranking_and_the_mean_too(ranked):
    _, _, before, _, after, told = ranked
    for held, was in ((after.params, before.params), (after.ema, before.ema)):
        np.testing.assert_array_equal(held[BIAS], logits_of(told["order"]))
        assert held[BIAS].sharding == was[BIAS].sharding
        assert all(held[name] is was[name] for name in held if name != BIAS)
