"""Options that all recipes share reach what a step is made of: optimisers, running means, microbatches, remat."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from infer.program_costs import matmul_flops
from train.cli import load_recipe
from train.optimizers import adamw, constant, cosine
from train.placement import training_mesh
from train.recipe import abstract_batch, made, rows_of, source_of
from train.recipes.step_distill import BETAS
from train.step import TrainStep

OPTIONS = {"steps": 8, "warmup": 2, "learning_rate": 0.1, "weight_decay": 0.3, "clip": 0.5, "ema_decay": 0.6}
OWN = {"pare_stage2": {"router_rate": 0.7}, "step_distill": {"fake_rate": 0.7}}
RECIPES = ("finetune", "pare_stage1", "pare_stage2", "step_distill", "coredit", "ddit")


def training(name, **settings):
    """What a recipe makes of demo-wan's shapes, and its options."""
    recipe = load_recipe(name)
    config = recipe.Config(**{"model": "demo-wan", "mesh": "fsdp=1", **settings})
    source = source_of(config, training_mesh(config.mesh), planned=True)
    return config, source, made(config, recipe.training, source)


def expected_optimizers(name):
    """Of every update, by the module that a weight belongs to."""
    rest = {"weight_decay": 0.3, "clip": 0.5}
    usual = adamw(cosine(0.1, 8, 2), **rest)
    if name == "step_distill":
        return [{module: adamw(constant(rate, 2), betas=BETAS, **rest)} for module, rate in
                (("fake", 0.7), ("student", 0.1))]  # fmt: skip
    if name == "ddit":  # of the two sizes each counts its own steps
        return [{size: adamw(cosine(0.1, 4, 1), **rest)} for size in ("2p", "4p")]
    if name == "pare_stage2":
        return [{"student": usual, "router": adamw(cosine(0.7, 8, 2), **rest)}]
    return [{"student": usual}]


def weights_after(optimizer, modules):
    """Weights of such modules after updates by gradients whose norm is above and below the clip."""
    rng = np.random.default_rng(0)
    weights = {f"{module}.x": jnp.asarray(rng.standard_normal(5), jnp.float32) for module in modules}
    state = optimizer.init(weights)
    for size in (0.1, 20.0, 3.0):
        gradient = {name: jnp.asarray(rng.standard_normal(5) * size, jnp.float32) for name in weights}
        updates, state = optimizer.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


@pytest.mark.parametrize("name", RECIPES)
def test_rates_decay_clip_means_and_microbatches(name):
    plan = training(name, microbatches=2, batch=4, **OPTIONS, **OWN.get(name, {}))[2].plan
    assert plan.ema_decay == 0.6 and {update.microbatches for update in plan.updates} == {2}
    for update, modules in zip(plan.updates, expected_optimizers(name), strict=True):
        found = weights_after(update.optimizer, modules)
        expected = weights_after(
            optax.partition(modules, lambda params: {key: key.partition(".")[0] for key in params}), modules
        )
        for key in expected:
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-5, err_msg=key)


def step_flops(name, remat):
    config, source, made_of = training(name, remat=remat, size="64x64", frames=5, batch=1)
    step = TrainStep(made_of.trained, made_of.plan, source.mesh, made_of.frozen)
    batch = abstract_batch(config, source.config, rows_of(config, made_of))
    return matmul_flops(step.trace({**batch, **made_of.extra}, made_of.first_turn).jaxpr, made_of.trips)


@pytest.mark.parametrize("name", RECIPES)
def test_remat_says_what_is_computed_again(name):
    nothing, all_but_attention, blocks = (step_flops(name, remat) for remat in ("none", "attention", "blocks"))
    assert nothing < all_but_attention < blocks
