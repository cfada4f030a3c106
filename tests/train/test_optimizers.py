"""Optimisers against their equations, and the numbers that the papers train with."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.models.wan import PRESETS
from train.models import Source
from train.optimizers import ADAM_BETAS, adam, adamw, muon
from train.pare_loss import PareSettings
from train.placement import training_mesh
from train.recipes import coredit, ddit, finetune, pare_stage1, pare_stage2, step_distill


def moved(optimizer, weights, gradients):
    """Weights after an update by each of the gradients."""
    state, seen = optimizer.init(weights), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        seen.append({name: np.asarray(leaf) for name, leaf in weights.items()})
    return seen


def adam_by_hand(x, gradients, rate, betas, decay=0.0, clip=1.0):
    """Adam with decoupled weight decay on one vector, clipped first."""
    first, second, seen = 0.0, 0.0, []
    for count, gradient in enumerate(gradients, 1):
        gradient = gradient * min(1.0, clip / np.linalg.norm(gradient))
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        step = (first / (1 - betas[0] ** count)) / (np.sqrt(second / (1 - betas[1] ** count)) + 1e-8)
        x = x - rate * (step + decay * x)
        seen.append(x)
    return seen


GRADIENTS = np.array([[3.0, -0.2, 0.5], [0.1, 0.3, -0.2], [-0.4, 8.0, 0.6]])


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9)])
def test_adamw_clips_first_and_decays_the_weights_by_themselves(betas):
    x = np.array([2.0, -1.0, 0.5])
    optimizer = adamw(0.1, betas=betas, weight_decay=0.3, clip=1.0)
    found = moved(optimizer, {"x": jnp.asarray(x, jnp.float32)}, [{"x": jnp.asarray(g)} for g in GRADIENTS])
    expected = adam_by_hand(x, GRADIENTS, 0.1, betas, decay=0.3)
    np.testing.assert_allclose([each["x"] for each in found], expected, rtol=1e-4)


def test_adam_of_the_demos_has_its_betas_and_clips_first():
    x = np.array([2.0, -1.0, 0.5])
    found = moved(adam(0.1, clip=0.7), {"x": jnp.asarray(x, jnp.float32)}, [{"x": jnp.asarray(g)} for g in GRADIENTS])
    expected = adam_by_hand(x, GRADIENTS, 0.1, (0.9, 0.99), clip=0.7)
    assert ADAM_BETAS == (0.9, 0.99)
    np.testing.assert_allclose([each["x"] for each in found], expected, rtol=1e-4)


def test_muon_moves_matrices_by_a_fifth_of_its_rate_and_all_else_as_nesterovs_adam():
    rng = np.random.default_rng(0)
    shapes = {
        "blocks.mlp.up.kernel": (2, 12, 40),
        "blocks.attn1.o.kernel": (2, 4, 3, 12),
        "blocks.mlp.up.bias": (2, 40),
    }
    weights = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    gradients = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    [after] = moved(muon(0.01, 0.003, clip=1e9), weights, [gradients])
    change = {name: after[name] - np.asarray(weights[name]) for name in shapes}
    for name in ("blocks.mlp.up.kernel", "blocks.attn1.o.kernel"):
        blocks = change[name].reshape(2, 12, -1)
        np.testing.assert_allclose(np.sqrt(np.mean(blocks**2, axis=(1, 2))), 0.2 * 0.01, rtol=0.2)
        sizes = np.linalg.svd(blocks, compute_uv=False)
        assert sizes.max() < 2.5 * sizes.min(), "all directions of a block move alike"
        assert (np.sum(blocks * np.asarray(gradients[name]).reshape(blocks.shape), axis=(1, 2)) < 0).all()
    bias = -0.003 * np.sign(gradients["blocks.mlp.up.bias"]) * (1 + 0.9 * 0.1 / (1 - 0.9**2))
    np.testing.assert_allclose(change["blocks.mlp.up.bias"], bias, rtol=1e-3)


def test_step_distillation_has_no_momentum_and_a_rate_for_each_network():
    source = Source("wan2.1-t2v-1.3b", training_mesh("fsdp=1"))
    fake, student = step_distill.training(step_distill.Config(), source).plan.updates
    for update, rate in ((fake, 4e-7), (student, 2e-6)):
        state, change = update.optimizer.init({"x": jnp.zeros(1)}), []
        for gradient in (0.5, -0.5):
            updates, state = update.optimizer.update({"x": jnp.full(1, gradient)}, state, {"x": jnp.zeros(1)})
            change.append(float(updates["x"][0]))
        np.testing.assert_allclose(change, [-rate, rate], rtol=1e-3)
    assert (fake.turns, student.turns) == (5, 1)


def test_what_is_not_said_is_the_papers():
    """METHODS of the four papers: steps, rates, and what else they say of training."""
    one, two, few = pare_stage1.Config(), pare_stage2.Config(), step_distill.Config()
    assert (one.steps, one.batch, one.learning_rate, one.warmup) == (7000, 4, 3e-5, 100)
    assert (two.steps, two.learning_rate, two.router_rate, two.sampled_blocks) == (7000, 3e-5, 5e-4, 4)
    assert (PareSettings().sampled_blocks, PareSettings().outliers) == (4, 3)
    weights = [pare_stage1.weights_for(PRESETS[name]) for name in ("wan2.1-t2v-14b", "wan2.1-i2v-14b")]
    assert [(each.features, each.teacher, each.data, each.motion) for each in weights] == [(10, 6, 1, 8), (10, 6, 1, 4)]
    assert pare_stage1.PRUNED == (0.3, 0.3)
    assert (few.ema_decay, few.shift, few.fake_turns) == (0.99, 5.0, 5)
    assert few.settings.timesteps == (1000, 750, 500, 250) and few.settings.guidance_scale == 3
    pruned = coredit.Config()
    assert (pruned.learning_rate, pruned.settings.teacher, pruned.settings.attention) == (1e-5, 0.5, 0.5)
    assert (pruned.every(30), coredit.Config(steps=100_000).every(30)) == (7, 15), "the ramp ends within a run"
    assert ddit.Config().rank == 32 and ddit.RATES == {"adamw": 1e-4, "prodigy": 1.0}
    assert {each.dtype for each in (one, two, few, pruned, finetune.Config())} == {"bfloat16"}
