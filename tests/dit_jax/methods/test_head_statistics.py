"""What is recorded of heads, against NumPy on what the model's own parts compute, and against the plain run."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, guided, noise, relative_error

from dit_jax.methods.head_statistics import (
    HeadProbe,
    ProbeSteering,
    Recording,
    intra_slice_ratio,
    recorded,
    sampled_queries,
)
from dit_jax.models.network import Attended, Aux, Context, Place, with_context
from dit_jax.sampling.sampler import sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import Euler, Step

STEPS = 3


@partial(jax.jit, static_argnames="steps")
def run(denoiser, latents, steps=STEPS):
    schedule = Euler().schedule(steps, Shift(constant=3.0), 40)
    return sample(denoiser, Euler(), start(denoiser, Euler(), latents), schedule, 0, steps)


def plain_softmax(q, k):
    scores = np.einsum("qk,nk->qn", q, k, dtype=np.float64) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("backbone", CONFIGS)
def test_recording_changes_nothing_and_counts_the_steps(backbone):
    config = CONFIGS[backbone]
    plain, latents = guided(config), noise(config)
    denoiser = recorded(plain, latents.shape)
    carry = run(denoiser, latents)
    np.testing.assert_array_equal(carry.latents, run(plain, latents).latents)
    sums = carry.denoiser.attention
    used = {"wan": {"tokens", "cross_text", "inside"}, "flux": {"tokens", "context", "joint"}}[backbone]
    for name, of_all in sums._asdict().items():
        assert of_all.shape == (sum(plain.model.stacks), config.heads)
        assert (np.asarray(of_all) > 0).all() == (name in used)
    if backbone == "wan":
        assert (np.asarray(sums.inside) < STEPS).all()


@pytest.mark.parametrize("backbone", CONFIGS)
def test_norms_and_ratios_are_the_equations(backbone):
    """One block's attention on its own: masked tokens, a context, and the sampled queries."""
    config = CONFIGS[backbone]
    rng = np.random.default_rng(0)
    q, k, v, text_q, text_k, text_v = (
        rng.standard_normal((2, length, config.heads, config.head_width)).astype(np.float32)
        for length in (12, 12, 12, 5, 5, 5)
    )
    positions = np.stack([np.arange(12) // 4, np.arange(12) % 4, np.zeros(12)], -1).astype(np.float32)
    valid = np.arange(12) < 11

    @dataclass
    class Given:
        def qkv(self, x, rope):
            return q, k, v

        def out(self, y):
            return y

    context = Context(text_q, text_k, text_v) if backbone == "flux" else None
    place = Place(jnp.broadcast_to(positions, (2, 12, 3)), None, jnp.broadcast_to(valid, (2, 12)), context)
    sums = recorded(guided(config), (1, 3, 6, 10, 4)).init(None).attention
    queries = np.array([1, 6, 10])
    probe = HeadProbe(jnp.float32(0.5), jnp.asarray(queries))
    attended, found = jax.jit(
        lambda sums: Recording(inside=True)(Given(), None, place, jnp.int32(1), sums, probe)
    )(sums)  # fmt: skip
    assert isinstance(attended, Attended)
    keys, values, seen = k, v, np.broadcast_to(valid, (2, 12))
    if context is not None:
        keys, values, seen = (np.asarray(part) for part in with_context(context, k, v, place.valid))
    for head in range(config.heads):
        tokens, text, inside = [], [], []
        for row in range(2):
            mine = keys[row, seen[row], head], values[row, seen[row], head]
            tokens.append(np.sum((plain_softmax(q[row, :11, head], mine[0]) @ mine[1]) ** 2))
            text.append(np.sum((plain_softmax(text_q[row, :, head], mine[0]) @ mine[1]) ** 2))
            weights = plain_softmax(q[row, queries, head], k[row, :11, head])
            same = positions[queries, 0][:, None] == positions[None, :11, 0]
            inside.append((weights * same).sum(1).mean())
        assert float(found.tokens[1, head]) == pytest.approx(0.5 * np.sqrt(tokens).mean(), rel=1e-4)
        assert float(found.inside[1, head]) == pytest.approx(np.mean(inside), rel=1e-4)
        if context is not None:
            assert float(found.context[1, head]) == pytest.approx(0.5 * np.sqrt(text).mean(), rel=1e-4)
            both = np.sqrt(np.add(tokens, text)).mean()
            assert float(found.joint[1, head]) == pytest.approx(0.5 * both, rel=1e-4)
    assert float(jnp.abs(found.tokens[0]).sum()) == 0


@pytest.mark.parametrize("t", [0.0, 250.0, 1000.0])
def test_a_step_weighs_the_logarithm_of_one_and_its_share_of_the_noise(t):
    told = ProbeSteering(queries=jnp.arange(3))(Aux(), None, Step(0, t / 1000, 0.0, jnp.float32(t)), None).attention
    assert float(told.weight) == pytest.approx(np.log(1 + t / 1000)) and told.queries.tolist() == [0, 1, 2]


def test_cross_attention_to_silent_values_adds_nothing():
    config = CONFIGS["wan"]
    latents = noise(config)  # as many samples as above, whose program this is
    one = recorded(guided(config), latents.shape)
    block = jax.tree.map(lambda leaf: leaf[0] * 0, one.guided.model.blocks.attn2.v)
    model = one.guided.model
    silent = jax.tree.map(lambda leaf: leaf, model)
    silent.blocks.attn2.v = jax.tree.map(lambda leaf, zero: leaf.at[0].set(zero), model.blocks.attn2.v, block)
    sums = run(replace(one, guided=replace(one.guided, model=silent)), latents).denoiser.attention
    assert (np.asarray(sums.cross_text[0]) == 0).all() and (np.asarray(sums.cross_text[1:]) > 0).all()
    assert (np.asarray(sums.cross_image) == 0).all()


def test_uniform_attention_looks_at_its_own_frame_by_its_share():
    q, k = np.zeros((1, 12, 2, 4), np.float32), np.random.default_rng(0).standard_normal((1, 12, 2, 4))
    frames = jnp.asarray([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2]])
    found = intra_slice_ratio(jnp.asarray(q), jnp.asarray(k, jnp.float32), frames, jnp.asarray([0, 4, 10]))
    np.testing.assert_allclose(found, np.full((1, 2), (4 + 6 + 2) / 36), rtol=1e-6)


@pytest.mark.parametrize("count", [6, 256])
def test_queries_are_as_many_of_every_frame(count):
    queries = sampled_queries((1, 3, 6, 10, 4), (1, 2, 2), count)
    frames = np.bincount(queries // 15)
    assert len(set(queries)) == len(queries) and (frames == frames[0]).all() and len(frames) == 3
    assert len(queries) == min(count, 45)
    assert relative_error(np.mean(queries), 22) < 0.05
