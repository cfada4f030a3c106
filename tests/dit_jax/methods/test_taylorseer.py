"""TaylorSeer against the plain sampler, and against its series in NumPy with the blocks one by one."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, guided, noise, one_sample, relative_error, sampled, segment_programs

from dit_jax.config import UserError
from dit_jax.flops import Shape, plan_cost
from dit_jax.methods.method import Run
from dit_jax.methods.plan import parse_plan
from dit_jax.methods.taylorseer import Differenced, Predicted, TaylorSeer, TaylorStep
from dit_jax.models.network import Attended, Dense, Place, layout, unlayout
from dit_jax.sampling.sampler import sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import Euler

STEPS = 8
FULL = {1: range(8), 3: (0, 1, 2, 5), 4: (0, 1, 2, 6)}  # of eight steps, by the interval


def applied(taylorseer: TaylorSeer, denoiser, latents):
    run = Run(latents_shape=latents.shape, first=0, stop=STEPS, steps=STEPS, sigmas=None)
    return taylorseer.applied(denoiser, run)


class Listening:
    """Computes every output and writes it down, under (name, block)."""

    def __init__(self):
        self.outputs = {}

    def __call__(self, attention, x_BMD, place, block, cache, aux):
        attended, _ = Dense()(attention, x_BMD, place, block, None, None)
        self.outputs["attention", block], self.outputs["context", block] = attended
        return attended, cache

    def branch(self, name, compute, block, cache, aux):
        self.outputs[name, block] = compute()
        return self.outputs[name, block], cache


class Reading:
    """Takes every output from such a list."""

    def __init__(self, outputs):
        self.outputs = outputs

    def __call__(self, attention, x_BMD, place, block, cache, aux):
        return Attended(self.outputs["attention", block], self.outputs["context", block]), cache

    def branch(self, name, compute, block, cache, aux):
        return self.outputs[name, block], cache


@partial(jax.jit, static_argnames="steps")
def one_step(denoiser, latents, index, outputs, steps: int):
    """(latents after a step, outputs of all blocks), which are computed if none are given."""
    model, branches = denoiser.model, denoiser.branches
    schedule = jax.tree.map(jnp.asarray, Euler().schedule(steps, Shift(constant=3.0), 40))
    tokens = jax.tree.map(lambda leaf: jnp.repeat(leaf, branches, 0), layout(latents, model.config.patch))
    t = jnp.full(len(latents) * branches, schedule.timesteps[index])
    signal = model.signal(t, denoiser.conditioning)
    x, place = model.embed(tokens.rows), Place(tokens.positions, model.rope(tokens.positions), None)
    strategy = Listening() if outputs is None else Reading(outputs)
    stacks = [model.blocks] if hasattr(model, "blocks") else [model.double, model.single]
    x = x if len(stacks) == 1 else (x, signal.text)
    number = 0
    for stack, count in zip(stacks, model.stacks, strict=True):
        for within in range(count):
            block = jax.tree.map(lambda leaf, within=within: leaf[within], stack)
            x, _ = block(x, signal, place, strategy, number, None, None)
            number += 1
    rows = model.head(x[0] if len(stacks) == 2 else x, signal)
    if branches == 2:
        rows = rows[1::2] + denoiser.guidance_scale * (rows[0::2] - rows[1::2])
    ahead = schedule.sigmas[index + 1] - schedule.sigmas[index]
    return latents + unlayout(rows, latents.shape, model.config.patch) * ahead, strategy.outputs


def series(full: list[tuple[int, np.ndarray]], order: int, index: int) -> np.ndarray:
    """The Taylor series of one output from (step, output) of all full steps so far, in fp64."""
    factors, last = [], None
    for step, output in full:
        new = [np.asarray(output, np.float64)]
        for i in range(min(order, len(factors))):
            new.append((new[i] - factors[i]) / (step - last))
        factors, last = new, step
    return sum(factor * (index - last) ** i / math.factorial(i) for i, factor in enumerate(factors))


def oracle(denoiser, latents, taylorseer: TaylorSeer):
    history: dict[tuple[str, int], list] = {}
    for index in range(STEPS):
        if index in FULL[taylorseer.interval]:
            latents, outputs = one_step(denoiser, latents, index, None, STEPS)
            for key, output in outputs.items():
                history.setdefault(key, []).append((index, output))
        else:
            told = {
                key: None if full[0][1] is None else jnp.asarray(series(full, taylorseer.order, index), jnp.float32)
                for key, full in history.items()
            }
            latents, _ = one_step(denoiser, latents, index, told, STEPS)
    return latents


@pytest.mark.parametrize("backbone", CONFIGS)
def test_full_steps_alone_are_the_plain_sampler(backbone):
    plain, latents = guided(CONFIGS[backbone]), noise(CONFIGS[backbone])
    denoiser = applied(TaylorSeer(interval=1, order=2), plain, latents)
    np.testing.assert_array_equal(sampled(denoiser, latents, STEPS, count=4), sampled(plain, latents, STEPS, count=4))


@pytest.mark.parametrize("backbone", CONFIGS)
@pytest.mark.parametrize("interval", [3, 4])
def test_outputs_between_full_steps_are_their_taylor_series(backbone, interval):
    plain, latents = guided(CONFIGS[backbone]), noise(CONFIGS[backbone])
    taylorseer = TaylorSeer(interval=interval, order=3)  # more than the first three full steps give
    found = sampled(applied(taylorseer, plain, latents), latents, STEPS, count=4)
    assert relative_error(found, oracle(plain, latents, taylorseer)) < 1e-4
    # A series of another order is not this one.
    assert relative_error(found, oracle(plain, latents, TaylorSeer(interval=interval, order=1))) > 1e-3


def test_nothing_compiles_again_and_a_sample_is_the_same_in_any_batch():
    config = CONFIGS["wan"]
    plain, latents = guided(config), noise(config)
    together = sampled(applied(TaylorSeer(order=2), plain, latents), latents, STEPS, count=4)
    programs = segment_programs()
    sampled(applied(TaylorSeer(interval=2, order=2), guided(config, seed=5), latents), latents, STEPS, count=4)
    assert segment_programs() == programs
    alone = one_sample(plain, 1), latents[1:]
    found = sampled(applied(TaylorSeer(order=2), *alone), alone[1], STEPS, count=4)
    assert relative_error(together[1], found[0]) < 1e-5


def test_the_timeline_is_known_before_the_first_step():
    timeline = TaylorSeer(interval=3).timeline(10)
    assert list(np.flatnonzero(timeline.full)) == [0, 1, 2, 5, 8]
    assert list(timeline.apart) == [0, 1, 1, 1, 2, 3, 1, 2, 3, 1]
    assert list(timeline.made) == [0, 1, 2, 3, 3, 3, 4, 4, 4, 5]
    # A second expert takes over at step 6: nothing of the first one's is used.
    after = TaylorSeer(interval=3).timeline(10, first=6)
    assert list(np.flatnonzero(after.full)) == [6, 9] and after.made[6] == 0 and after.made[9] == 1


def test_the_work_of_a_run_begins_anew_with_an_expert():
    shape, taylorseer, shares = Shape(tokens=40, text=7), TaylorSeer(interval=4), []
    spy = SimpleNamespace(step_work=lambda work, at: shares.append(work.blocks[0].share) or work)
    plan_cost(CONFIGS["wan"], shape, (taylorseer, spy), 40, stages={0: "transformer", 13: "transformer_2"})
    expected = [*taylorseer.timeline(40).full[:13], *taylorseer.timeline(40, first=13).full[13:]]
    assert shares == expected and sum(shares) == 12


def test_differences_and_predictions_in_bf16_are_rounded_once():
    rng = np.random.default_rng(0)
    kept = jnp.asarray(rng.standard_normal((2, 3, 4, 9, 8)), jnp.bfloat16)  # blocks, orders, rows, tokens, width
    output = jnp.asarray(rng.standard_normal((4, 9, 8)), jnp.bfloat16)
    step = TaylorStep(full=jnp.array(True), apart=jnp.int32(3), made=jnp.int32(2))
    before, now = np.asarray(kept[1], np.float64), np.asarray(output, np.float64)
    first = (now - before[0]) / 3
    noted = Differenced(order=2)._noted("mlp", output, jnp.int32(1), {"mlp": kept}, step)["mlp"]
    np.testing.assert_array_equal(noted[0], kept[0])
    predicted = Predicted(order=2)._predicted("mlp", jnp.int32(1), {"mlp": kept}, step)
    series = before[0] + 3 * before[1] + 4.5 * before[2]
    for found, exact in (
        (noted[1, 0], now),
        (noted[1, 1], first),
        (noted[1, 2], (first - before[1]) / 3),
        (predicted, series),
    ):
        nearest = np.asarray(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16), np.float32)
        assert found.dtype == jnp.bfloat16 and np.mean(np.asarray(found, np.float32) != nearest) < 0.01


@pytest.mark.parametrize(
    "config", [CONFIGS["wan"], CONFIGS["flux"], replace(CONFIGS["flux"], heads=3)], ids=["wan", "flux", "pruned"]
)
def test_what_it_keeps_is_counted(config):
    plain, latents, taylorseer = guided(config), noise(config), TaylorSeer(order=2)
    state = jax.eval_shape(applied(taylorseer, plain, latents).init, latents)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert taylorseer.kept_bytes(config, Shape.of(plain, latents.shape)) == kept > 0


def test_what_is_kept_is_held_once():
    config = replace(CONFIGS["wan"], blocks=16)
    plain, latents = guided(config), noise(config)
    schedule = Euler().schedule(STEPS, Shift(constant=3.0), 40)

    def memory(denoiser):
        carry = start(denoiser, Euler(), latents)
        run = jax.jit(lambda denoiser, carry: sample(denoiser, Euler(), carry, schedule, 0, 2), donate_argnums=1)
        temporary = run.lower(denoiser, carry).compile().memory_analysis().temp_size_in_bytes
        return temporary, sum(leaf.nbytes for leaf in jax.tree.leaves(carry.denoiser))

    temporary, kept = memory(applied(TaylorSeer(order=1), plain, latents))
    assert kept == 3 * 16 * 2 * 4 * 45 * 48 * 4  # outputs, blocks, orders, rows, tokens, width, bytes
    assert temporary - memory(plain)[0] < 0.1 * kept


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("taylorseer:4", "found '4', which taylorseer does not know"),
        ("taylorseer:n=0", "expected n from 1 to 1000"),
        ("taylorseer:order=9", "expected order from 0 to 4"),
        ("taylorseer:n=2.5", "expected n to be a whole number, found '2.5'"),
        ("taylorseer:every=4", "which taylorseer does not know"),
        ("taylorseer+hsa:50", "hsa and taylorseer cannot share a plan"),
        ("taylorseer+teacache:0.1:model=flux.1", "taylorseer and teacache cannot share a plan"),
    ],
)
def test_words_that_are_none_are_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_plan(text)


def test_words_are_understood():
    assert parse_plan("taylorseer:n=5:order=2").methods == (TaylorSeer(interval=5, order=2),)
    assert parse_plan("taylorseer").methods == (TaylorSeer(interval=4, order=1),)
