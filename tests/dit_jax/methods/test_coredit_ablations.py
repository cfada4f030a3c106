"""CoReDiT's choices and ablations (random selection, no reconstruction, branches that skip alike) against the method
itself and a slow transcription."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, guided, noise, one_sample, relative_error, sampled, segment_programs
from test_coredit import RAGGED, SKIPPED, attended, attention_of, slow_coherence, slow_protected

from dit_jax.config import UserError
from dit_jax.methods.coredit import Coherent, Coredit, RandomOrder
from dit_jax.methods.method import Run
from dit_jax.methods.plan import parse_plan
from dit_jax.models.network import Aux, Dense
from dit_jax.sampling.solvers import Step

STEPS = 4
KEY = jax.random.key(5, impl="threefry2x32")


def applied(coredit: Coredit, denoiser, latents):
    run = Run(latents_shape=latents.shape, first=0, stop=STEPS, steps=STEPS, sigmas=None)
    return coredit.applied(denoiser, run)


def slow_likes(x, lattice, block, select) -> np.ndarray:
    """What tokens of two guidance branches are ranked by [2, N]."""
    if select == "random":
        return np.asarray(jax.random.uniform(jax.random.fold_in(KEY, block), (2, lattice.tokens)))
    return np.stack([slow_coherence(np.asarray(row, np.float64), lattice, block) for row in x])


def slow_skipped(likes, lattice, block, skipped) -> np.ndarray:
    """Tokens that one row skips, one by one."""
    protects = slow_protected(lattice, block)
    return np.array([token for token in np.argsort(-likes) if not protects[token]][:skipped])


def slow(attention, x, place, lattice, block, out, rebuild) -> np.ndarray:
    """One row: the kept tokens attend one another, and each skipped output is zero or its sub-cell's mean."""
    stay = np.setdiff1d(np.arange(lattice.tokens), out)
    y = np.zeros(x.shape)
    y[stay] = attended(Dense(), attention, *jax.tree.map(lambda of_all: of_all[None, stay], (x, place)), block)[0]
    if rebuild == "none":
        return y
    weights = np.maximum(slow_coherence(np.asarray(x, np.float64), lattice, block), lattice.least_weight)
    cell = [(t, row // lattice.sub_cell, column // lattice.sub_cell) for t, row, column in np.ndindex(*lattice.grid)]
    for token in out:
        others = [other for other in stay if cell[other] == cell[token]]
        y[token] = weights[others] @ y[others] / weights[others].sum()
    return y


@pytest.mark.parametrize("buckets", [(SKIPPED,), (0, SKIPPED)], ids=["one bucket", "two buckets"])
@pytest.mark.parametrize(
    ("select", "rebuild", "shared"),
    [("random", "mean", False), ("coherence", "none", False), ("random", "none", True), ("coherence", "mean", True)],
)
def test_attention_is_that_of_the_ablation(select, rebuild, shared, buckets):
    attention, x, place = attention_of(RAGGED, rows=2)
    strategy, plain = Coherent(RAGGED, buckets, select, rebuild, rows=2, shared=shared), Coherent(RAGGED, buckets)
    bucket = jnp.full(2, len(buckets) - 1)
    told = RandomOrder(bucket, KEY) if select == "random" else bucket
    found = attended(strategy, attention, x, place, 1, told)
    likes = slow_likes(x, RAGGED, 1, select)
    skipped = [slow_skipped(likes.mean(axis=0) if shared else of_row, RAGGED, 1, SKIPPED) for of_row in likes]
    assert (set(skipped[0]) == set(skipped[1])) == shared
    for row in range(2):
        of_row = jax.tree.map(lambda leaf, row=row: leaf[row], (x, place))
        assert relative_error(found[row], slow(attention, *of_row, RAGGED, 1, skipped[row], rebuild)) < 1e-5
    assert relative_error(found, attended(plain, attention, x, place, 1, bucket)) > 1e-2


def test_without_reconstruction_as_many_outputs_are_zero_as_tokens_are_skipped():
    attention, x, place = attention_of(RAGGED, rows=2, padding=4)
    skipped = {}
    for select in ("coherence", "random"):
        told = RandomOrder(jnp.zeros(2, int), KEY) if select == "random" else None
        found = attended(Coherent(RAGGED, (SKIPPED,), select, "none"), attention, x, place, 1, told)
        skipped[select] = ~np.asarray(found[:, : RAGGED.tokens]).any(axis=-1)
        assert skipped[select].sum(axis=1).tolist() == [SKIPPED, SKIPPED]
        assert not skipped[select][:, slow_protected(RAGGED, 1)].any()
    assert (skipped["random"] != skipped["coherence"]).mean() > 0.2


def skipped_of_steps(seed: int) -> np.ndarray:
    """What both branches skip by lot in block 0 [2, N] of three steps, and in block 3 of step 0."""
    plain, latents = guided(CONFIGS["wan"]), noise(CONFIGS["wan"])
    random = applied(Coredit(ratios=(0.4,), select="random", rebuild="none", seed=seed), plain, latents)
    lattice = random.call.attention.lattice
    attention, x, place = attention_of(lattice, rows=2)
    strategy = replace(random.call.attention, skipped=random.call.attention.skipped[-1:])

    def zero(step: int, block: int):
        aux, index = Aux(), Step(jnp.int32(step), jnp.float32(0.7), jnp.float32(0.6), jnp.float32(700))
        for steer in random.steering:
            aux = steer(aux, latents, index, None)
        return ~np.asarray(attended(strategy, attention, x, place, block, aux.attention)).any(axis=-1)

    return np.stack([*(zero(step, 0) for step in range(STEPS - 1)), zero(0, 3)])


def test_every_step_block_and_seed_skips_other_tokens():
    one, other = skipped_of_steps(1), skipped_of_steps(2)
    assert len(np.unique(one.reshape(-1, one.shape[-1]), axis=0)) == 2 * STEPS, "block 3 protects what block 0 does"
    assert (one != other).any(axis=-1).all()
    np.testing.assert_array_equal(one, skipped_of_steps(1))


@pytest.mark.parametrize("backbone", CONFIGS)
def test_no_seed_compiles_again_and_a_sample_is_the_same_in_any_batch(backbone):
    config = CONFIGS[backbone]
    plain, latents = guided(config), noise(config)
    make = partial(Coredit, ratios=(0.4,), late=0.5, select="random")
    found = sampled(applied(make(seed=1), plain, latents), latents, STEPS)
    programs = segment_programs()
    other = sampled(applied(make(seed=2), plain, latents), latents, STEPS)
    assert segment_programs() == programs
    assert relative_error(other, found) > 1e-3
    alone = applied(make(seed=1), one_sample(plain, 1), latents[1:])
    assert relative_error(sampled(alone, latents[1:], STEPS)[0], found[1]) < 1e-5


@pytest.mark.parametrize("words", [{"select": "random"}, {"rebuild": "none"}, {"branches": "shared"}])
def test_ratio_0_is_the_plain_model(words):
    config = CONFIGS["wan"]
    plain, latents = guided(config), noise(config)
    zero = applied(Coredit(ratios=(0.0,), **words), plain, latents)
    np.testing.assert_array_equal(sampled(zero, latents, STEPS), sampled(plain, latents, STEPS))


def test_they_are_words_of_a_plan():
    [random] = parse_plan("coredit:0.3:select=random:seed=7:rebuild=none:branches=shared").methods
    assert random == Coredit(ratios=(0.3,), select="random", rebuild="none", branches="shared", seed=7)
    [usual] = parse_plan("coredit:0.3:select=coherence:rebuild=mean").methods
    assert usual == Coredit(ratios=(0.3,)) == parse_plan("coredit:0.3").methods[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("coredit:0.3:select=best", "expected select to be one of coherence, random, found 'best'"),
        ("coredit:0.3:rebuild=zero", "expected rebuild to be one of mean, none, found 'zero'"),
        ("coredit:0.3:branches=all", "expected branches to be one of own, shared, found 'all'"),
        ("coredit:0.3:seed=3", "only select=random reads"),
        ("coredit:0.3:select=random:seed=-1", "seed from 0"),
        ("coredit:0.3:select=random:seed=1.7", "expected seed to be a whole number, found '1.7'"),
        ("coredit:0.3:buckets=2.5", "expected buckets to be a whole number, found '2.5'"),
    ],
)
def test_words_that_are_none_are_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_plan(text)
