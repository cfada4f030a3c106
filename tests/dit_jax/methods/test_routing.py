"""Routing against the plain sampler, against a model that has only the active blocks, and against its equations."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import FLUX, WAN, guided, noise, one_sample, relative_error, sampled, segment_programs

from dit_jax.config import UserError
from dit_jax.methods.method import Run
from dit_jax.methods.plan import parse_plan
from dit_jax.methods.routing import (
    RecordedRouting,
    Router,
    RouterConfig,
    Routing,
    budget,
    content_features,
    new_router,
    read_router,
    top_gates,
    trained_router,
)
from dit_jax.models.network import Conditioning
from dit_jax.parameters import leaf_name
from dit_jax.sampling.sampler import sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import Euler, Step

STEPS = 4
CONFIGS = {"wan": replace(WAN, blocks=6), "flux": FLUX}


def random_router(config, content, seed=0):
    """A router of ordinary weights, whose logits follow the content as much as the time."""
    blocks = config.blocks if hasattr(config, "blocks") else config.double_blocks + config.single_blocks
    features = {"latents": 2 * 4 + 1, "pooled": getattr(config, "pooled_width", 0), "none": 0}[content]
    sizes = RouterConfig(content=content, features=features, blocks=blocks, hidden=16, time_frequencies=8)
    rng = np.random.default_rng(seed)
    part = new_router(sizes)
    leaves = {name: rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in part.leaves.items()}
    leaves["up.kernel"][8:] *= 4
    return part._replace(leaves=leaves)


def content_of(config):
    return "pooled" if hasattr(config, "pooled_width") else "latents"


def applied(routing, denoiser, latents, part=None):
    part = random_router(denoiser.model.config, content_of(denoiser.model.config)) if part is None else part
    run = Run(
        latents_shape=latents.shape, first=0, stop=STEPS, steps=STEPS, sigmas=None, parts={"router": part}
    )  # fmt: skip
    return routing.applied(denoiser, run)


def gates_of_run(denoiser, latents):
    """Gates of every step [S, B, G], and the final latents."""
    recorded = RecordedRouting(denoiser=denoiser, steps=STEPS)
    schedule = Euler().schedule(STEPS, Shift(constant=3.0), 40)
    carry = jax.jit(lambda denoiser, latents: sample(
        denoiser, Euler(), start(denoiser, Euler(), latents), schedule, 0, STEPS
    ))(recorded, latents)  # fmt: skip
    return np.asarray(carry.denoiser.gates), np.asarray(carry.latents), schedule


def with_blocks(model, active):
    """The model whose other blocks change nothing: what they would add to the residual stream is zero."""
    stacks = ("double", "single") if len(model.stacks) == 2 else ("blocks",)
    parts = dict(zip(stacks, np.split(np.asarray(active), np.cumsum(model.stacks)[:-1]), strict=True))

    def silenced(path, leaf):
        name = leaf_name(path)
        if (".o." not in name and ".mlp.down." not in name) or name.split(".")[0] not in parts:
            return leaf
        return leaf * parts[name.split(".")[0]].reshape(-1, *[1] * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(silenced, model)


@pytest.mark.parametrize(("backbone", "samples"), [("wan", 1), ("flux", 2)])
def test_all_blocks_on_is_the_plain_sampler(backbone, samples):
    config = CONFIGS[backbone]
    plain, latents = guided(config, samples=samples), noise(config, samples=samples)
    blocks = sum(plain.model.stacks)
    routed = applied(Routing(least=blocks, most=blocks), plain, latents)
    np.testing.assert_array_equal(sampled(routed, latents, STEPS), sampled(plain, latents, STEPS))


@pytest.mark.parametrize("backbone", CONFIGS)
def test_a_run_is_that_of_a_model_of_the_active_blocks(backbone):
    """Every sample of a batch, though they run different blocks."""
    config = CONFIGS[backbone]
    plain, latents = guided(config, samples=3), noise(config, samples=3)
    blocks = sum(plain.model.stacks)
    part = random_router(config, content_of(config), seed=4)
    routed = applied(Routing(least=2, most=blocks - 1), plain, latents, part)
    gates, found, schedule = gates_of_run(routed, latents)
    assert len(np.unique(gates.reshape(-1, blocks), axis=0)) > 1
    counts = np.round(2 + (blocks - 3) * np.asarray(schedule.timesteps) / 1000)
    np.testing.assert_array_equal(gates.sum(-1), np.broadcast_to(counts[:, None], gates.shape[:2]))
    assert (gates[..., 0] == 1).all() and (gates[..., -1] == 1).all()
    velocity = jax.jit(lambda denoiser, x, step: denoiser(x, denoiser.init(x), step)[0])
    for index in range(3):
        alone, x = one_sample(plain, index), latents[index : index + 1]
        for number in range(STEPS):
            sigmas = schedule.sigmas[number : number + 2]
            step = Step(jnp.int32(number), *sigmas, jnp.float32(schedule.timesteps[number]))
            fewer = replace(alone, model=with_blocks(plain.model, gates[number, index]))
            x = x + velocity(fewer, x, step) * (sigmas[1] - sigmas[0])
        assert relative_error(found[index : index + 1], x) < 1e-5
    assert relative_error(found, sampled(plain, latents, STEPS)) > 1e-3


def test_a_sample_is_routed_by_itself_in_any_batch():
    config = CONFIGS["wan"]
    plain, latents = guided(config, samples=3), noise(config, samples=3)
    routing = Routing(least=3, most=4)
    part = random_router(config, "latents", seed=1)
    together = sampled(applied(routing, plain, latents, part), latents, STEPS)
    for index in range(3):
        alone, x = one_sample(plain, index), latents[index : index + 1]
        assert relative_error(together[index], sampled(applied(routing, alone, x, part), x, STEPS)[0]) < 1e-5


def test_budgets_routers_and_seeds_share_a_program():
    config = CONFIGS["wan"]
    latents = noise(config)
    sampled(applied(Routing(least=2, most=4), guided(config), latents), latents, STEPS)
    programs = segment_programs()
    other = applied(Routing(least=2, most=3), guided(config, seed=3), latents, random_router(config, "latents", 7))
    sampled(other, noise(config, seed=5), STEPS)
    assert segment_programs() == programs


@pytest.mark.parametrize("content", ["latents", "pooled", "none"])
def test_logits_are_the_equations(content):
    config = CONFIGS["flux"]
    part = random_router(config, content, seed=2)
    router = read_router({"router": part}, 5)
    rng = np.random.default_rng(0)
    t, e = np.array([3.0, 977.0], np.float32), rng.standard_normal((2, part.settings["features"])).astype(np.float32)
    frequencies = np.exp(-np.log(1e4) * np.arange(4) / 4)
    angles = t[:, None] * frequencies
    x = np.concatenate([np.cos(angles), np.sin(angles), e], -1)
    for name in ("up", "middle"):
        x = x @ part.leaves[f"{name}.kernel"] + part.leaves[f"{name}.bias"]
        x = x / (1 + np.exp(-x))
    expected = x @ part.leaves["out.kernel"] + part.leaves["out.bias"]
    np.testing.assert_allclose(router(jnp.asarray(t), jnp.asarray(e)), expected, rtol=1e-4, atol=1e-4)


def test_the_gates_are_a_hard_top_k_with_both_ends_on():
    logits = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    for count in range(2, 10):
        inner = np.argsort(-logits[:, 1:-1], axis=1)[:, : count - 2] + 1
        expected = np.zeros((5, 9))
        expected[:, [0, -1]] = 1
        np.put_along_axis(expected, inner, 1, axis=1)
        np.testing.assert_array_equal(top_gates(jnp.asarray(logits), jnp.float32(count)), expected)


def test_the_budget_is_the_papers():
    assert [float(budget(t, 20, 35)) for t in (0, 1000, 500, 200)] == [20, 35, 28, 23]
    assert Routing().limits(40) == (20, 35)
    shifted = Euler().schedule(40, Shift(constant=3.0), 1).timesteps
    assert Routing().mean_share(shifted, 40) == pytest.approx(0.76, abs=0.01)


def test_content_is_what_the_latents_say():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 3, 4, 5, 6)).astype(np.float32) * 2 + 1
    flat = latents.reshape(2, -1, 6)
    change = np.abs(latents[:, 1:] - latents[:, :-1]).reshape(2, -1).mean(1)
    expected = np.concatenate([flat.mean(1), flat.std(1), change[:, None]], -1)
    told = Conditioning(jnp.zeros((4, 1, 1)), image=jnp.arange(8 * 3 * 2.0).reshape(8, 3, 2))
    np.testing.assert_allclose(content_features("latents", jnp.asarray(latents), told, 2), expected, rtol=1e-5)
    # Two samples of two branches, each told a first and a last image: the first image's class token.
    np.testing.assert_array_equal(
        content_features("image", jnp.asarray(latents), told, 2), told.image[jnp.array([0, 4]), 0]
    )
    # The text's embedding is that of the conditional branch.
    pooled = jnp.arange(4 * 3.0).reshape(4, 3)
    found = content_features("pooled", jnp.asarray(latents), told._replace(pooled=pooled), 2)
    np.testing.assert_array_equal(found, pooled[jnp.array([0, 2])])
    assert content_features("none", jnp.asarray(latents), told, 2).shape == (2, 0)
    still = content_features("latents", jnp.asarray(latents[:, :1]), told, 2)
    assert (np.asarray(still)[:, -1] == 0).all()


def test_an_untrained_router_leaves_out_blocks_that_lie_apart():
    router = Router(RouterConfig(content="none", features=0, blocks=16, hidden=8, time_frequencies=4), nnx.Rngs(0))
    gates = np.asarray(top_gates(router(jnp.asarray([400.0]), jnp.zeros((1, 0))), jnp.float32(9)))[0]
    skipped = np.flatnonzero(gates == 0)
    assert len(skipped) == 7 and np.diff(skipped).min() == 2
    assert (np.asarray(router.out.kernel[...]) == 0).all()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("routing:min=0", "min as a whole number of blocks, found '0'"),
        ("routing:max=many", "max as a whole number of blocks"),
        ("routing:20", "which routing does not know"),
        ("routing:colour=red", "which routing does not know"),
        ("routing+hsa:50", "hsa and routing cannot share a plan"),
    ],
)
def test_words_that_are_none_are_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_plan(text)


@pytest.mark.parametrize(
    ("text", "blocks", "change", "told"),
    [
        ("routing", 6, None, "attach an untrained one with `dit-adapt --add router`"),
        ("routing:max=7", 6, {}, "3 to 7 blocks of a model of 6"),
        ("routing:min=1", 6, {}, "1 to 5 blocks of a model of 6"),
        ("routing:min=3:max=2", 6, {}, "3 to 2 blocks of a model of 6"),
        ("routing", 4, {}, "a model of 6 blocks, found one of 4"),
        ("routing", 6, {"colour": "red"}, "expected content, features, blocks"),
        ("routing", 6, {"hidden": "wide"}, "expected content, features, blocks"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(text, blocks, change, told):
    part = random_router(CONFIGS["wan"], "latents")
    parts = {} if change is None else {"router": part._replace(settings=part.settings | change)}
    with pytest.raises(UserError, match=told):
        parse_plan(text).check((blocks,), parts)


@pytest.mark.parametrize(
    ("content", "features", "found"),
    [("image", 20, "0"), ("pooled", 8, "0"), ("latents", 33, "9"), ("none", 1, "0")],
)
def test_a_router_of_another_models_content_is_refused(content, features, found):
    part = new_router(RouterConfig(content=content, features=features, blocks=6, hidden=16, time_frequencies=8))
    with pytest.raises(UserError, match=f"told {features} features of {content}, found {found} in this model"):
        applied(Routing(), guided(CONFIGS["wan"]), noise(CONFIGS["wan"]), part)


def test_words_are_understood():
    assert parse_plan("routing").methods == (Routing(),)
    assert parse_plan("routing:max=35:min=20").methods == (Routing(least=20, most=35),)


def test_as_many_blocks_run_as_the_router_was_trained_with_unless_the_plan_says():
    part = random_router(CONFIGS["wan"], "latents")
    trained = trained_router(part, Routing(least=2, most=3), part.leaves)
    assert (trained.settings["least"], trained.settings["most"]) == (2, 3)
    parts = {"router": trained}
    told = {
        text: parse_plan(text).told(parts).methods[0] for text in ("routing", "routing:min=3", "routing:choose=random")
    }
    assert told["routing"] == Routing(least=2, most=3) and told["routing:min=3"] == Routing(least=3, most=3)
    assert told["routing:choose=random"].limits(4) == (2, 3), "by lot as many"
    assert parse_plan("routing").told({"router": part}).methods == (Routing(),)
    again = trained_router(part, Routing(), part.leaves).settings
    assert (again["least"], again["most"]) == Routing().limits(part.settings["blocks"])
    plain, latents = guided(CONFIGS["wan"]), noise(CONFIGS["wan"])
    by_part = applied(parse_plan("routing"), plain, latents, trained)
    by_plan = applied(parse_plan("routing:min=2:max=3"), plain, latents, part)
    np.testing.assert_array_equal(sampled(by_part, latents, STEPS), sampled(by_plan, latents, STEPS))


def test_random_blocks_are_as_many_and_follow_the_seed_alone():
    """Both ends on, other blocks at other steps, the same for every sample; no router is needed."""
    config = replace(CONFIGS["wan"], blocks=7)
    plain, latents = guided(config, samples=2), noise(config, samples=2)
    found = {}
    programs = set()
    for seed in (1, 2):
        routing = Routing(least=3, most=5, choose="random", seed=seed)
        routing.check((7,), {})
        run = Run(latents_shape=latents.shape, first=0, stop=STEPS, steps=STEPS, sigmas=None)
        routed = routing.applied(plain, run)
        found[seed], _, schedule = gates_of_run(routed, latents)
        sampled(routed, latents, STEPS)
        programs.add(segment_programs())
        for index, t in enumerate(schedule.timesteps):
            key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
            inner = np.argsort(-np.asarray(jax.random.uniform(key, (7,)))[1:-1]) + 1
            expected = np.zeros(7)
            expected[[0, 6, *inner[: round(3 + 2 * float(t) / 1000) - 2]]] = 1
            np.testing.assert_array_equal(found[seed][index], np.tile(expected, (2, 1)))
    assert len(programs) == 1, "another seed compiles nothing"
    assert (found[1] != found[2]).any() and len(np.unique(found[1][:, 0], axis=0)) > 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("routing:choose=best", "expected choose to be one of router, random, found 'best'"),
        ("routing:seed=1", "only choose=random reads"),
        ("routing:choose=random:seed=-1", "seed from 0"),
        ("routing:choose=random:seed=1.7", "expected seed to be a whole number, found '1.7'"),
    ],
)
def test_a_choice_that_is_none_is_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_plan(text)


def test_random_choice_is_a_word():
    assert parse_plan("routing:choose=random:seed=4:min=3").methods == (Routing(least=3, choose="random", seed=4),)
