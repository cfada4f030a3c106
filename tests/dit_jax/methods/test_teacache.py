"""TeaCache against the plain sampler, against its equations step by step in NumPy, and in any batch."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from row_by_row import row_by_row
from small_models import CONFIGS, guided, noise, one_sample, relative_error, sampled, segment_programs

from dit_jax.config import UserError
from dit_jax.flops import Shape
from dit_jax.methods.method import Run
from dit_jax.methods.plan import parse_plan
from dit_jax.methods.teacache import POLYNOMIALS, RET_POLYNOMIALS, TeaCache, relative_change
from dit_jax.models.network import Route
from dit_jax.models.wan import FP32_LEAVES
from dit_jax.parameters import Precision, cast
from dit_jax.sampling.sampler import sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import Euler

STEPS = 12
HALF = {"wan": 1.0, "flux": 0.6}  # threshold at which these small models reuse about half of the steps


def applied(teacache: TeaCache, denoiser, latents):
    run = Run(latents_shape=latents.shape, first=0, stop=STEPS, steps=STEPS, sigmas=None)
    return teacache.applied(denoiser, run)


@partial(jax.jit, static_argnames="count")
def steps_run(denoiser, latents, first, count: int):
    """How often the trunk runs in these steps, from a fresh state."""
    schedule = Euler().schedule(STEPS, Shift(constant=3.0), 40)
    carry = sample(denoiser, Euler(), start(denoiser, Euler(), latents), schedule, first, count)
    return carry.denoiser.cache.residual.runs


def oracle(denoiser, latents, teacache: TeaCache):
    """The run row by row, the sums in fp64: (final latents, which rows ran the trunk at each step [S, R])."""
    last: dict[int, np.ndarray] = {}
    distance: dict[int, float] = {}

    def runs(index, row, seen):
        run = index < 5 if teacache.ret else index in (0, STEPS - 1)
        if not run:
            change = abs(seen - last[row]).mean() / abs(last[row]).mean()
            distance[row] += np.polyval(teacache.polynomial, change)
            run = not distance[row] < teacache.threshold
        if run:
            distance[row] = 0
        last[row] = seen
        return run

    return row_by_row(denoiser, latents, STEPS, runs, projected=teacache.ret)[:2]


@pytest.mark.parametrize("backbone", CONFIGS)
def test_a_threshold_of_zero_is_the_plain_sampler(backbone):
    plain, latents = guided(CONFIGS[backbone]), noise(CONFIGS[backbone])
    expected = sampled(plain, latents, STEPS, count=4)
    for model in (None, "wan2.1-t2v-14b"):  # the second has negative values
        found = sampled(applied(TeaCache(threshold=0, model=model), plain, latents), latents, STEPS, count=4)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("backbone", "branches", "ret"), [("wan", 2, False), ("wan", 1, True), ("flux", 2, False)])
def test_it_is_the_equations_step_by_step(backbone, branches, ret):
    plain, latents = guided(CONFIGS[backbone], branches=branches), noise(CONFIGS[backbone])
    teacache = TeaCache(threshold=HALF[backbone], ret=ret)
    expected, ran = oracle(plain, latents, teacache)
    assert relative_error(sampled(applied(teacache, plain, latents), latents, STEPS), expected) < 1e-5
    assert 0.3 < ran.mean() < 0.8  # both kinds of step are there


def test_a_row_decides_for_itself_in_any_batch():
    config = CONFIGS["flux"]
    plain, latents = guided(config), noise(config)
    teacache = TeaCache(threshold=HALF["flux"])
    _, ran = oracle(plain, latents, teacache)
    assert (ran.any(axis=1) & ~ran.all(axis=1)).sum() > 2  # steps that some rows run and others do not
    together = sampled(applied(teacache, plain, latents), latents, STEPS)
    for index in range(2):
        alone = one_sample(plain, index), latents[index : index + 1]
        found = sampled(applied(teacache, *alone), alone[1], STEPS)[0]
        assert relative_error(together[index], found) < 1e-5


def test_first_and_last_step_always_run_and_so_does_the_first_after_a_restart():
    config = CONFIGS["wan"]
    plain, latents = guided(config), noise(config)
    lazy = applied(TeaCache(threshold=1e9), plain, latents)
    assert [steps_run(lazy, latents, first, 4) for first in (0, 4, 8)] == [1, 1, 2]
    lazy = applied(TeaCache(threshold=1e9, ret=True), plain, latents)
    assert [steps_run(lazy, latents, first, 4) for first in (0, 4, 8)] == [4, 1, 1]


@partial(jax.tree_util.register_dataclass, data_fields=("active",), meta_fields=())
@dataclass(frozen=True)
class FirstBlocks:
    """Runs the first blocks alone."""

    active: jax.Array

    def __call__(self, aux, seen, step, conditioning):
        return aux._replace(routes=(Route(jnp.arange(3), self.active),))


def test_it_caches_the_blocks_that_other_methods_leave():
    config = CONFIGS["wan"]
    latents = noise(config)
    routed = replace(guided(config), steering=(FirstBlocks(jnp.int32(2)),))
    np.testing.assert_array_equal(
        sampled(applied(TeaCache(threshold=0), routed, latents), latents, STEPS), sampled(routed, latents, STEPS)
    )
    two_blocks = guided(config)
    two_blocks.model.blocks = jax.tree.map(lambda leaf: leaf[:2], two_blocks.model.blocks)
    found = sampled(applied(TeaCache(threshold=1.0), routed, latents), latents, STEPS)
    expected, _ = oracle(two_blocks, latents, TeaCache(threshold=1.0))
    assert relative_error(found, expected) < 1e-5


def test_segments_do_not_matter_and_nothing_compiles_again():
    config = CONFIGS["wan"]
    plain, latents = guided(config), noise(config)
    found = sampled(applied(TeaCache(threshold=1.0), plain, latents), latents, STEPS, count=4)
    programs = segment_programs()
    sampled(applied(TeaCache(threshold=0.4), guided(config, seed=5), latents), noise(config, seed=9), STEPS, count=4)
    assert segment_programs() == programs
    whole = sampled(applied(TeaCache(threshold=1.0), plain, latents), latents, STEPS)
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("backbone", "ret"), [("wan", False), ("wan", True), ("flux", False)])
def test_what_it_keeps_is_counted(backbone, ret, dtype):
    config = CONFIGS[backbone]
    plain, latents = guided(config), noise(config)
    exact = () if backbone == "flux" else FP32_LEAVES
    plain = replace(plain, model=cast(plain.model, Precision(weights=dtype, exact=exact)))
    teacache = TeaCache(threshold=1.0, ret=ret)
    state = jax.eval_shape(applied(teacache, plain, latents).init, latents).cache
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in (state.residual.added, state.signal))
    assert teacache.kept_bytes(config, Shape.of(plain, latents.shape)) == kept


def test_relative_change_leaves_out_padding():
    rng = np.random.default_rng(0)
    now, before = rng.standard_normal((2, 2, 7, 5)).astype(np.float32)
    valid = np.arange(7) < np.array([[5], [7]])
    real = [(now[0, :5], before[0, :5]), (now[1], before[1])]
    expected = [abs(n - b).mean() / abs(b).mean() for n, b in real]
    np.testing.assert_allclose(relative_change(now, before, valid), expected, rtol=1e-6)
    rows = relative_change(now[:, 0], before[:, 0], valid)  # a signal that is not of tokens
    np.testing.assert_allclose(rows, abs(now - before)[:, 0].sum(1) / abs(before)[:, 0].sum(1), rtol=1e-6)


def test_relative_change_of_bf16_is_that_of_the_exact_values():
    now = np.random.default_rng(0).standard_normal((3, 7, 5)) + 1
    now, before = (jnp.asarray(signal, jnp.bfloat16) for signal in (now, 1.01 * now))
    exact, last = (np.asarray(signal, np.float64) for signal in (now, before))
    expected = abs(exact - last).mean((1, 2)) / abs(last).mean((1, 2))
    np.testing.assert_allclose(relative_change(now, before, None), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("teacache", "expected a threshold, found none"),
        ("teacache:ret", "expected threshold from 0 to inf, found 'ret'"),
        ("teacache:-1", "expected threshold from 0"),
        ("teacache:0.1:model=sora", "expected model to be one of wan2.1-t2v-1.3b, .*, flux.1, found 'sora'"),
        ("teacache:0.1:model=flux.1:ret", "expected model to be one of .*, found 'flux.1'"),
        ("teacache:0.1:rat", "which teacache does not know"),
        ("teacache:0.1:model=flux.1+hsa:50", "hsa and teacache cannot share a plan"),
    ],
)
def test_words_that_are_none_are_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_plan(text)


def test_words_are_understood():
    [teacache] = parse_plan("teacache:0.05:model=wan2.1-t2v-1.3b:ret").methods
    assert teacache == TeaCache(threshold=0.05, model="wan2.1-t2v-1.3b", ret=True)
    assert teacache.polynomial == RET_POLYNOMIALS["wan2.1-t2v-1.3b"]
    assert TeaCache(threshold=0.05, model="flux.1").polynomial == POLYNOMIALS["flux.1"]


def test_a_model_without_a_polynomial_is_warned_of():
    with pytest.warns(UserWarning, match="names no model that TeaCache's polynomial was fitted for"):
        [teacache] = parse_plan("teacache:0.1").methods
    assert teacache.polynomial == (1, 0)


@pytest.mark.parametrize(("model", "stacks"), [("flux.1", (30,)), ("wan2.1-t2v-14b", (19, 38))])
def test_a_polynomial_of_another_backbone_is_refused(model, stacks):
    plan = parse_plan(f"teacache:0.1:model={model}")
    with pytest.raises(UserError, match=f"the polynomial of {model} is not for this model"):
        plan.check(stacks, {})
    plan.check((19, 38) if model == "flux.1" else (30,), {})
