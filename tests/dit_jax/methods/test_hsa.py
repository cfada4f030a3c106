"""HSA against the plain sampler, against a masked form that refreshes by selection, and against its arithmetic."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, guided, noise, one_sample, relative_error, sampled, segment_programs

from dit_jax.config import UserError
from dit_jax.flops import Shape
from dit_jax.methods.hsa import PRESETS, Hsa, HsaDenoiser, is_refreshed
from dit_jax.methods.method import Run
from dit_jax.methods.plan import parse_plan
from dit_jax.methods.token_groups import active_groups, dealt, fixed_ranking, group_ends, relative_change
from dit_jax.models.network import Attended, Aux, State, unlayout, with_context
from dit_jax.ops.attention import attend
from dit_jax.sampling.sampler import sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import Euler, Step

SMALL = Hsa(shares=(0.3, 0.25, 0.45), budgets=(12, 6, 3), window=0.5)


def applied(hsa: Hsa, denoiser, latents) -> HsaDenoiser:
    run = Run(latents_shape=latents.shape, first=0, stop=hsa.steps, steps=hsa.steps, sigmas=None)
    return hsa.applied(denoiser, run)


@dataclass(frozen=True)
class Masked:
    """The oracle's attention: every token is projected, and what is not due keeps its old keys and values."""

    def __call__(self, attention, x_BMD, place, block, cache, due_RN):
        q, k, v = attention.qkv(x_BMD, place.rope)
        new = tuple(jnp.where(due_RN[..., None, None], new, old[block]) for new, old in zip((k, v), cache, strict=True))
        cache = tuple(old.at[block].set(of_block) for old, of_block in zip(cache, new, strict=True))
        k, v = new
        if place.context is None:
            return Attended(attention.out(attend(q, k, v))), cache
        k, v, _ = with_context(place.context, k, v, None)
        return Attended(attention.out(attend(q, k, v)), attend(place.context.q, k, v)), cache


def oracle(denoiser, latents, sigmas, hsa: Hsa):
    """The whole run step by step, in raster order, with masks in place of prefixes."""
    config, branches = denoiser.model.config, denoiser.branches
    count = denoiser.tokens(latents).rows.shape[1]
    blocks = sum(denoiser.model.stacks)
    shape = (blocks, len(latents) * branches, count, config.heads, config.head_width)
    cache, velocity = (jnp.zeros(shape), jnp.zeros(shape)), None
    ends = group_ends(hsa.shares, count, count)
    change = np.zeros((len(latents), count))
    group = None
    masked = replace(denoiser, call=replace(denoiser.call, attention=Masked()))

    @jax.jit
    def refreshed(latents, step, due, cache):
        aux = Aux(attention=jnp.repeat(due, branches, 0))
        tokens = denoiser.tokens(denoiser.finish(latents))
        rows, state = masked.velocity_rows(tokens, step, State(attention=cache), aux)
        return rows, state.attention

    for index in range(hsa.steps):
        if index == hsa.margin:
            rank = np.argsort(np.argsort(-change, axis=1, kind="stable"), axis=1)
            group = np.searchsorted(ends, rank, side="right")
        inside = hsa.margin <= index < hsa.steps - hsa.margin
        due = np.ones((len(latents), count), bool)
        if inside:
            divisors = [hsa.steps // budget for budget in hsa.budgets]
            due = np.array([[index % divisors[g] == 0 for g in row] for row in group])
        rows, cache = refreshed(latents, _step(index, sigmas), jnp.asarray(due), cache)
        new = rows if velocity is None else jnp.where(due[..., None], rows, velocity)
        if velocity is not None and index < hsa.margin:
            change += np.asarray(relative_change(new, velocity), np.float64)
        velocity = new
        latents = latents + unlayout(velocity, latents.shape, config.patch) * (sigmas[index + 1] - sigmas[index])
    return latents


def _step(index, sigmas):
    return Step(jnp.int32(index), sigmas[index], sigmas[index + 1], jnp.float32(1000 * sigmas[index]))


@pytest.mark.parametrize("backbone", CONFIGS)
@pytest.mark.parametrize("branches", [1, 2])
def test_budgets_of_all_steps_are_the_plain_sampler(backbone, branches):
    config = CONFIGS[backbone]
    plain, latents = guided(config, branches=branches), noise(config)
    hsa = Hsa(shares=(1.0,), budgets=(6,), window=0.8)
    np.testing.assert_array_equal(
        sampled(applied(hsa, plain, latents), latents, 6, count=2), sampled(plain, latents, 6, count=2)
    )


@pytest.mark.parametrize("backbone", CONFIGS)
@pytest.mark.parametrize("branches", [1, 2])
def test_prefixes_equal_masks(backbone, branches):
    config = CONFIGS[backbone]
    plain, latents = guided(config, branches=branches), noise(config)
    sigmas = jnp.asarray(Euler().schedule(SMALL.steps, Shift(constant=3.0), 40).sigmas)
    found = sampled(applied(SMALL, plain, latents), latents, SMALL.steps, count=4)
    assert relative_error(found, oracle(plain, latents, sigmas, SMALL)) < 1e-5
    # It is not what the plain sampler makes: the masks do something.
    assert relative_error(found, sampled(plain, latents, SMALL.steps)) > 1e-3


@pytest.mark.parametrize("ranking", ["dynamic", "uniform", "random", "first-frame"])
def test_a_constant_velocity_field_is_integrated_exactly(ranking):
    config = CONFIGS["wan"]
    plain, latents = guided(config), noise(config)
    plain.model.out.kernel[...] = jnp.zeros_like(plain.model.out.kernel[...])
    hsa = replace(SMALL, ranking=ranking)
    np.testing.assert_array_equal(
        sampled(applied(hsa, plain, latents), latents, hsa.steps), sampled(plain, latents, hsa.steps)
    )


def test_segments_do_not_matter_and_nothing_compiles_again():
    config = CONFIGS["wan"]
    denoiser, latents = applied(SMALL, guided(config), noise(config)), noise(config)
    found = sampled(denoiser, latents, SMALL.steps, count=3)
    programs = segment_programs()
    other = applied(replace(SMALL, window=0.6), guided(config, seed=5), latents)
    sampled(other, noise(config, seed=9), SMALL.steps, count=3)
    assert segment_programs() == programs
    np.testing.assert_array_equal(found, sampled(denoiser, latents, SMALL.steps))


def test_tokens_dealt_over_shards_and_prefixes_that_are_filled_up_change_nothing():
    """As on a mesh of five, or of a TPU's lanes, where a step's prefix holds tokens that are not due."""
    config = CONFIGS["wan"]
    denoiser, latents = applied(SMALL, guided(config), noise(config)), noise(config)
    dealt_out = replace(denoiser, shards=5, multiple=10)
    assert denoiser.ends == (14, 25, 45) and dealt_out._first(jnp.arange(45)[None], 14).shape == (1, 20)
    found = sampled(dealt_out, latents, SMALL.steps, count=3)
    assert relative_error(found, sampled(denoiser, latents, SMALL.steps, count=3)) < 1e-5


@pytest.mark.parametrize("backbone", CONFIGS)
def test_a_sample_is_ranked_by_itself_in_any_batch(backbone):
    config = CONFIGS[backbone]
    plain, latents = guided(config, samples=3), noise(config, samples=3)
    together = sampled(applied(SMALL, plain, latents), latents, SMALL.steps)
    for index in range(3):
        alone = one_sample(plain, index), latents[index : index + 1]
        assert relative_error(together[index], sampled(applied(SMALL, *alone), alone[1], SMALL.steps)[0]) < 1e-5


def test_the_cache_is_in_memory_once():
    config = replace(CONFIGS["wan"], blocks=6, width=96, heads=8)
    shape = (1, 4, 32, 32, 4)  # 1,024 tokens
    plain, latents = guided(config, samples=1), jnp.zeros(shape)
    schedule = Euler().schedule(SMALL.steps, Shift(constant=3.0), 1024)

    def temporaries(denoiser):
        carry = jax.eval_shape(lambda denoiser: start(denoiser, Euler(), latents), denoiser)
        run = jax.jit(lambda denoiser, carry: sample(denoiser, Euler(), carry, schedule, 0, 4), donate_argnums=1)
        return run.lower(denoiser, carry).compile().memory_analysis().temp_size_in_bytes

    denoiser = applied(SMALL, plain, latents)
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.eval_shape(denoiser.init, latents).cache)
    assert cache == 2 * 6 * 2 * 1024 * 96 * 4
    # The donated cache is the program's argument and its result.
    assert cache + temporaries(denoiser) <= 1.2 * cache + temporaries(plain)


def test_held_tokens_are_always_active():
    config = CONFIGS["wan"]
    latents = noise(config)
    plain = replace(guided(config), held=latents[:, :1] * 0.5)
    denoiser = applied(replace(SMALL, shares=(0.1, 0.2, 0.7)), plain, latents)
    assert denoiser.ends[0] == 15  # one latent frame, more than a tenth of 45
    state = denoiser.init(latents)
    change = jnp.asarray(np.random.default_rng(0).random((2, 45)), jnp.float32)
    order = denoiser._ranked(change, plain.tokens(latents))
    assert set(np.asarray(order[0, :15])) == set(range(15))
    assert state.cache.k.shape == (3, 4, 4, 1, 45, 12)
    kept = sum(leaf.nbytes for leaf in (*state.cache, state.velocity))
    assert SMALL.kept_bytes(config, Shape.of(plain, latents.shape)) == kept


def test_another_network_begins_in_the_window_with_a_full_step_and_the_ranking_so_far():
    config = CONFIGS["wan"]
    hsa, latents = Hsa(shares=(0.3, 0.7), budgets=(12, 3), window=0.5), noise(config)
    one, other = (applied(hsa, guided(config, seed=seed), latents) for seed in (0, 5))
    sigmas = jnp.linspace(1, 0, 13)
    run = jax.jit(lambda denoiser, state, index: denoiser(latents, state, _step(index, sigmas)))
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(45) for _ in range(2)]).astype(np.int32)
    change = rng.random((2, 45)).astype(np.float32)
    left = one.init(latents)._replace(order=jnp.asarray(order), change=jnp.asarray(change))
    for index in (1, 5):  # before the window, and inside at a step of the first group alone
        _, after = run(other, other.init(latents, one.handed(left)), index)
        assert np.abs(after.velocity).max(axis=-1).min() > 0, "every token has a velocity of this network"
        np.testing.assert_array_equal(after.order, order)
        np.testing.assert_array_equal(after.change, change)


@pytest.mark.parametrize(
    ("shares", "held", "ends"),
    [
        ((0.35, 0.65), 0, (16, 48)),
        ((0.1, 0.2, 0.7), 0, (4, 14, 48)),
        ((0.1, 0.2, 0.7), 15, (15, 15, 48)),
        ((1.0,), 0, (48,)),
    ],
)
def test_groups_have_the_nearest_whole_numbers_of_tokens(shares, held, ends):
    """Of 45 tokens, with three of padding in the last group."""
    assert group_ends(shares, 45, 48, held) == ends


def test_activity_follows_the_step_index():
    table = active_groups((1, 2, 4), 2, 6, 8)
    groups = [list(row.astype(int)) for row in table]
    assert groups == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("name", "margin", "token_steps"), [("75A", 10, 30.0), ("75B", 10, 29.95), ("50", 4, 19.84), ("25", 2, 9.92)]
)
def test_presets_have_the_papers_margins_and_token_steps(name, margin, token_steps):
    hsa = PRESETS[name]
    assert hsa.margin == margin
    assert sum(hsa.share_of_full(step) for step in range(hsa.steps)) == pytest.approx(token_steps)


def test_tokens_are_dealt_by_rank_over_the_shards():
    ranked = np.random.default_rng(0).permutation(24)
    order = np.asarray(dealt(jnp.asarray(ranked[None]), 4)).reshape(4, 6)
    assert set(order[:, :2].ravel()) == set(ranked[:8])
    assert sorted(order.ravel()) == list(range(24))
    # Of the first eight places, those of the first six ranks.
    assert set(order[:, :2].ravel()[is_refreshed(8, 6, 4)]) == set(ranked[:6])


def test_relative_change_is_the_papers():
    rng = np.random.default_rng(0)
    now, before = rng.standard_normal((2, 2, 7, 5)).astype(np.float32)
    expected = [
        [abs(n - b).sum() / abs(n).sum() for n, b in zip(*pair, strict=True)] for pair in zip(now, before, strict=True)
    ]
    np.testing.assert_allclose(relative_change(now, before), expected, rtol=1e-6)


@pytest.mark.parametrize("ranking", ["uniform", "random", "first-frame"])
def test_fixed_rankings_are_permutations_with_padding_last(ranking):
    positions = np.stack(np.meshgrid(*map(np.arange, (3, 4, 4)), indexing="ij"), -1).reshape(-1, 3)
    valid, held = np.arange(48) < 45, np.zeros(48, bool)
    order = fixed_ranking(ranking, positions, valid, held, seed=5)
    assert sorted(order) == list(range(48)) and set(order[-3:]) == {45, 46, 47}
    assert (order == fixed_ranking(ranking, positions, valid, held, seed=5)).all()
    held = (positions[:, 0] == 1) & (positions[:, 2] < 2)
    assert set(fixed_ranking(ranking, positions, valid, held, seed=5)[:8]) == set(np.flatnonzero(held))
    if ranking == "first-frame":
        assert set(order[:16]) == set(range(16))
        assert len(set(positions[order[:4], 1])) > 1, "no part of the frame comes first"
    if ranking == "uniform":  # a quarter of the tokens leaves no quarter of the frame empty
        chosen = positions[order[:12]]
        assert all(len(chosen[chosen[:, 0] == frame]) >= 3 for frame in range(3))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hsa", "expected either a preset or groups="),
        ("hsa:40", "expected a preset of 75A"),
        ("hsa:50:groups=100@4", "expected either a preset or groups="),
        ("hsa:groups=50@40/50@12", "each divide the one before"),
        ("hsa:groups=50@40/40@10", "add up to 100"),
        ("hsa:groups=half", "percent@steps"),
        ("hsa:groups=nan@8/50@4:window=0.5", "add up to 100"),
        ("hsa:50:seed=1.7", "expected seed to be a whole number, found '1.7'"),
        ("hsa:50:window=2", "window from 0 to 1"),
        ("hsa:50:window=1", "needs 2 full steps before the window, found 0"),
        ("hsa:50:ranking=best", "expected ranking to be one of"),
        ("hsa:50:colour=red", "which hsa does not know"),
        ("hsa:50+hsa:25", "names hsa twice"),
        ("has:50", "expected methods of dense"),
    ],
)
def test_words_that_are_none_are_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_plan(text)


def test_words_are_understood():
    [hsa] = parse_plan("hsa:groups=25@40/25@20/50@10:window=0.5:ranking=random:seed=7").methods
    assert hsa == replace(PRESETS["75A"], ranking="random", seed=7)
