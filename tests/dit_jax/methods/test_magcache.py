"""MagCache against the plain sampler and against runs whose steps are told one by one; its schedule; its ratios."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from row_by_row import row_by_row
from small_models import CONFIGS, guided, noise, one_sample, relative_error, sampled, segment_programs

from dit_jax.config import UserError
from dit_jax.flops import Shape, plan_cost
from dit_jax.methods.magcache import MagCache, ResidualNorms, ratios_of, read_ratios, recording, write_ratios
from dit_jax.methods.method import Run
from dit_jax.methods.plan import parse_plan
from dit_jax.sampling.sampler import sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import Euler

STEPS = 12
RATIOS = (1.0, 0.7, 0.99, 1.01, 0.98, 0.97, 0.99, 1.02, 1.01, 0.9, 0.95, 0.6)
USUAL = MagCache(threshold=0.12, ratios=RATIOS)


def applied(magcache: MagCache, denoiser, latents, first: int = 0):
    return magcache.applied(
        denoiser, Run(latents_shape=latents.shape, first=first, stop=STEPS, steps=STEPS, sigmas=None)
    )


@pytest.fixture
def ratios_file(tmp_path):
    path = tmp_path / "ratios.json"
    write_ratios(path, np.asarray(RATIOS))
    return path


@pytest.mark.parametrize("backbone", CONFIGS)
def test_a_threshold_of_zero_is_the_plain_sampler(backbone):
    plain, latents = guided(CONFIGS[backbone]), noise(CONFIGS[backbone])
    nothing = MagCache(threshold=0, ratios=RATIOS)
    np.testing.assert_array_equal(
        sampled(applied(nothing, plain, latents), latents, STEPS, count=4), sampled(plain, latents, STEPS, count=4)
    )


@pytest.mark.parametrize("backbone", CONFIGS)
def test_steps_that_reuse_add_the_residual_of_the_last_that_ran(backbone):
    plain, latents = guided(CONFIGS[backbone]), noise(CONFIGS[backbone])
    reuses = USUAL.reuses()
    expected, ran, _ = row_by_row(plain, latents, STEPS, lambda index, row, signal: not reuses[index])
    assert 4 < ran[:, 0].sum() < 9
    found = sampled(applied(USUAL, plain, latents), latents, STEPS, count=4)
    assert relative_error(found, expected) < 1e-5
    programs = segment_programs()
    other = MagCache(threshold=0.3, ratios=RATIOS[::-1], most_in_a_row=1, retention=0)
    sampled(
        applied(other, guided(CONFIGS[backbone], seed=5), latents), noise(CONFIGS[backbone], seed=9), STEPS, count=4
    )
    assert segment_programs() == programs


def test_the_schedule_is_worked_out_before_the_first_step():
    # Errors added up by hand: at 2, 0.01; 3, 0.01 + 0.0001; 4, 0.0101 + 0.020102; 5 would be the fourth in a row, and
    # so runs; 6, 0.01; 7, 0.01 + 0.0098; 8, 0.0198 + 0.019898; 9 runs; 10, 0.05; 11, 0.05 + 0.43.
    expected = [0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0]
    assert list(USUAL.reuses().astype(int)) == expected
    assert list(MagCache(threshold=0.025, ratios=RATIOS).reuses().astype(int)) == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    one = MagCache(threshold=9, ratios=RATIOS, most_in_a_row=1, retention=0.5)
    assert list(one.reuses().astype(int)) == [0] * 6 + [1, 0, 1, 0, 1, 0]
    assert not MagCache(threshold=9, ratios=RATIOS, most_in_a_row=0).reuses().any()
    # The error has to be below the threshold.
    assert not MagCache(threshold=0, ratios=(1.0,) * STEPS).reuses().any()
    # The trunk of a stage that begins at 6 has not run before it.
    assert list(USUAL.reuses(first=6).astype(int)) == [0] * 7 + [1, 1, 0, 1, 0]


def test_the_retained_share_is_exact():
    assert MagCache(threshold=9, ratios=(1.0,) * 100, retention=0.29).reuses().argmax() == 29


def test_ratios_are_those_of_the_residuals_norms():
    config = CONFIGS["wan"]
    plain, latents = guided(config), noise(config)
    _, _, norms = row_by_row(plain, latents, STEPS, lambda index, row, signal: True)
    expected = np.append(1, (norms[1:] / norms[:-1]).mean(axis=1))
    whole, watched = _norms(recording(plain, STEPS), latents, 0, STEPS)
    np.testing.assert_allclose(ratios_of(watched), expected, rtol=1e-5)
    half, first = _norms(recording(plain, STEPS), latents, 0, 6)
    rest, second = _norms(recording(plain, STEPS), half, 6, STEPS)
    np.testing.assert_allclose(rest, whole, rtol=1e-5, atol=1e-5)
    assert not first[6:].any() and not second[:6].any()
    np.testing.assert_allclose(ratios_of(first + second), expected, rtol=1e-5)


def test_padding_is_no_part_of_the_residuals_norm():
    x, added = np.random.default_rng(0).standard_normal((2, 3, 7, 5)).astype(np.float32)
    valid = np.arange(7) < np.array([[5], [7], [6]])
    trunk = SimpleNamespace(
        run=lambda x, state: (x + added, state), place=SimpleNamespace(valid=valid), aux=SimpleNamespace(cache=1)
    )
    norms = ResidualNorms(steps=3)
    _, state = norms(trunk, jnp.asarray(x), norms.init(None, jnp.asarray(x), None))
    expected = [np.linalg.norm(of_row[real]) for of_row, real in zip(added, valid, strict=True)]
    np.testing.assert_allclose(state.cache, [np.zeros(3), expected, np.zeros(3)], rtol=1e-4)


def test_the_work_of_a_run_begins_anew_with_an_expert():
    shape, shares = Shape(tokens=40, text=7), []
    spy = SimpleNamespace(step_work=lambda work, at: shares.append(work.blocks[0].share) or work)
    plan_cost(CONFIGS["wan"], shape, (USUAL, spy), STEPS, stages={0: "transformer", 3: "transformer_2"})
    assert shares == [*~USUAL.reuses()[:3], *~USUAL.reuses(first=3)[3:]]


def _norms(denoiser, latents, first, stop):
    """(latents after steps [first, stop), the norms that were noted [S, R])."""
    schedule = Euler().schedule(STEPS, Shift(constant=3.0), 40)
    carry = sample(denoiser, Euler(), start(denoiser, Euler(), latents), schedule, first, stop - first)
    return carry.latents, np.asarray(carry.denoiser.cache, np.float64)


def test_a_sample_is_the_same_in_any_batch():
    config = CONFIGS["flux"]
    plain, latents = guided(config), noise(config)
    together = sampled(applied(USUAL, plain, latents), latents, STEPS, count=4)
    alone = one_sample(plain, 1), latents[1:]
    assert relative_error(together[1], sampled(applied(USUAL, *alone), alone[1], STEPS, count=4)[0]) < 1e-5


def test_words_are_understood(ratios_file):
    [magcache] = parse_plan(f"magcache:0.1:k=2:retention=0.3:ratios={ratios_file}").methods
    assert magcache == MagCache(threshold=0.1, ratios=RATIOS, most_in_a_row=2, retention=0.3)
    assert parse_plan(f"magcache:0.1:ratios={ratios_file}").steps == STEPS


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("magcache", "expected a threshold, found none"),
        ("magcache:much:ratios={}", "expected threshold from 0 to inf"),
        ("magcache:0.1", "expected ratios=FILE.json"),
        ("magcache:0.1:ratios={}x", "found No such file"),
        ("magcache:0.1:k=1.5:ratios={}", "expected k to be a whole number"),
        ("magcache:0.1:k=inf:ratios={}", "expected k from 0 to 1000, found 'inf'"),
        ("magcache:0.1:retention=2:ratios={}", "expected retention from 0 to 1"),
        ("magcache:0.1:ret:ratios={}", "which magcache does not know"),
        ("magcache:0.1:ratios={}+hsa:50", "hsa and magcache cannot share a plan"),
        ("magcache:0.1:ratios={}+teacache:0.1:model=flux.1", "magcache and teacache cannot share a plan"),
    ],
)
def test_words_that_are_none_are_refused(words, told, ratios_file):
    with pytest.raises(UserError, match=told):
        parse_plan(words.format(ratios_file))


@pytest.mark.parametrize(
    "held", ["no JSON", "[1, 2]", "{}", '{"ratios": []}', '{"ratios": [1, -1]}', '{"ratios": [NaN]}']
)
def test_files_that_hold_no_ratios_are_refused(held, tmp_path):
    (tmp_path / "ratios.json").write_text(held)
    with pytest.raises(UserError, match=r"ratios\.json: expected .* `dit-calibrate magcache`"):
        read_ratios(tmp_path / "ratios.json")


def test_ratios_are_read_as_they_are_written(ratios_file):
    assert read_ratios(ratios_file) == RATIOS
    assert list(json.loads(ratios_file.read_text())) == ["ratios"]
