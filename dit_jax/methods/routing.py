"""PARE's routing: a router decides from the timestep and the content which blocks a step runs (arXiv 2605.27336).

At noise level t a step runs K(t) blocks of each sample, those with the largest logits. Samples that share a program
run the union of their blocks, and each keeps what its own blocks add.

Shapes: B samples, R batch rows (guidance branches included), T Y X latent grid, C latent channels, E content features,
G blocks of all stacks, S sampler steps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.config import UserError
from dit_jax.flops import Config, Shape, StepAt, StepWork
from dit_jax.methods.method import Part, Run, Words
from dit_jax.models.network import Aux, Conditioning, Route
from dit_jax.ops.linear import Linear
from dit_jax.ops.timestep import sinusoids
from dit_jax.parameters import named_leaves, with_leaves
from dit_jax.sampling.sampler import handed_over
from dit_jax.sampling.schedules import TRAIN_STEPS
from dit_jax.sampling.solvers import Step

ROUTER = "router"  # its name among the parts of a checkpoint
LEAST, MOST = 0.5, 0.875  # of the blocks, at t = 0 and at pure noise: 20 and 35 of 40
TIE = 0.01  # spread of an untrained router's logits: too little for the gate's slope, enough to rank by
Content = Literal["latents", "pooled", "image", "none"]
CONTENTS = ("latents", "pooled", "image", "none")
Choice = Literal["router", "random"]
MOST_SEED = 2**31


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Sizes of a router.

    content      what it is told besides the timestep: statistics of the noisy latents, the pooled text embedding, the
                 class feature of the image encoder, or nothing
    features     how many numbers that is
    blocks       of all the model's stacks
    least, most  blocks that run at t = 0 and at pure noise, as it was trained; None: the paper's shares of all
    """

    content: Content
    features: int
    blocks: int
    hidden: int = 256
    time_frequencies: int = 256
    least: int | None = None
    most: int | None = None


class Router(nnx.Module):
    """r = W3·silu(W2·silu(W1·[sinusoidal(t); e_c] + b1) + b2) + b3, in fp32: one logit a block.

    W3 begins at zero; b3 ranks the blocks so that an untrained router leaves out blocks that lie far apart.
    """

    def __init__(self, config: RouterConfig, rngs: nnx.Rngs):
        self.up = Linear(config.time_frequencies + config.features, config.hidden, rngs=rngs)
        self.middle = Linear(config.hidden, config.hidden, rngs=rngs)
        ranks = TIE * _spread_ranks(config.blocks)
        self.out = Linear(
            config.hidden,
            config.blocks,
            rngs=rngs,
            kernel_init=nnx.initializers.zeros,
            bias_init=lambda key, shape, dtype, **_: jnp.asarray(ranks, dtype),
        )
        self.config = config

    def __call__(self, t_B: jax.Array, content_BE: jax.Array) -> jax.Array:
        """Logits [B, G] at timesteps in [0, 1000]."""
        told = jnp.concatenate([sinusoids(t_B, self.config.time_frequencies), content_BE.astype(jnp.float32)], axis=-1)
        return self.out(jax.nn.silu(self.middle(jax.nn.silu(self.up(told)))))

    def of_step(self, seen_BTYXC: jax.Array, step: Step, conditioning: Conditioning, branches: int) -> jax.Array:
        """Logits of a step [B, G]."""
        content = content_features(self.config.content, seen_BTYXC, conditioning, branches)
        return self(jnp.broadcast_to(step.t, len(content)), content)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("seed",), meta_fields=("blocks",))
@dataclass(frozen=True, kw_only=True)
class RandomRouter:
    """Logits by lot (the paper's ablation): other blocks at every step, the same for every sample, so that what it runs
    does not depend on its place in the batch.

    seed  uint32 [], data: another one compiles nothing
    """

    seed: jax.Array
    blocks: int

    def of_step(self, seen_BTYXC: jax.Array, step: Step, conditioning: Conditioning, branches: int) -> jax.Array:
        """Logits of a step [B, G]."""
        key = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), step.index)
        return jnp.broadcast_to(jax.random.uniform(key, (self.blocks,)), (len(seen_BTYXC), self.blocks))


def _spread_ranks(blocks: int) -> np.ndarray:
    """Numbers in [0, 1) whose smallest lie far apart, whichever many one takes [G]: the index's bits in reverse."""
    bits = max(blocks - 1, 1).bit_length()
    reverse = [int(f"{block:0{bits}b}"[::-1], 2) for block in range(blocks)]
    return np.asarray(reverse) / 2**bits


def content_features(content: Content, seen_BTYXC: jax.Array, conditioning: Conditioning, branches: int) -> jax.Array:
    """What a router is told of each sample [B, E]; guidance branches share it.

    latents  mean and standard deviation of every channel, and the mean absolute difference of neighbouring frames
    """
    batch = len(seen_BTYXC)
    if content == "pooled":
        assert conditioning.pooled is not None
        return conditioning.pooled[::branches]
    if content == "image":
        assert conditioning.image is not None
        # The states of a first and a last image lie behind each other; the class token is the first of each.
        return conditioning.image[:: len(conditioning.image) // batch, 0]
    if content == "none":
        return jnp.zeros((batch, 0), jnp.float32)
    space = (1, 2, 3)
    change = jnp.abs(jnp.diff(seen_BTYXC, axis=1)).mean((*space, 4)) if seen_BTYXC.shape[1] > 1 else jnp.zeros(batch)
    return jnp.concatenate([seen_BTYXC.mean(space), seen_BTYXC.std(space), change[:, None]], axis=-1)


def _check_content(config: RouterConfig, told: Conditioning, channels: int) -> None:
    """UserError where a model does not tell its router what this one was made for."""
    of_told = {"pooled": told.pooled, "image": told.image}.get(config.content)
    features = 2 * channels + 1 if config.content == "latents" else 0 if of_told is None else of_told.shape[-1]
    if features != config.features:
        raise UserError(
            f"the router is told {config.features} features of {config.content}, found {features} in this model: "
            "expected its own router; attach one with `dit-adapt --add router`"
        )


def budget(t: Any, least: Any, most: Any) -> Any:
    """K(t) = K_min + (K_max − K_min)·t/T blocks, rounded to the nearest whole number."""
    return jnp.round(least + (most - least) * t / TRAIN_STEPS)


def top_gates(logits_BG: jax.Array, count: jax.Array) -> jax.Array:
    """1 for the `count` blocks of largest logit, [] or of each sample [B, 1], 0 for the others [B, G] in fp32; the
    first and the last block always run and count."""
    rank = jnp.argsort(jnp.argsort(-_ends_on(logits_BG), axis=1, stable=True), axis=1)
    return (rank < count).astype(jnp.float32)


def straight_through_gates(logits_BG: jax.Array, count: jax.Array) -> jax.Array:
    """`top_gates` to train by, m = hard_topK(r) + (sigmoid(r) − stop_gradient(sigmoid(r))): their values, with the
    slope of the sigmoid at the logits of all blocks but the first and the last, which always run."""
    soft = jax.nn.sigmoid(_ends_on(logits_BG))
    # Without these brackets the sum would miss 1 by a rounding for a quarter of the logits.
    return top_gates(logits_BG, count) + (soft - jax.lax.stop_gradient(soft))


def _ends_on(logits_BG: jax.Array) -> jax.Array:
    return logits_BG.at[:, jnp.asarray([0, logits_BG.shape[1] - 1])].set(jnp.inf)


def union_routes(gates_BG: jax.Array, stacks: tuple[int, ...]) -> tuple[Route, ...]:
    """For every stack the blocks that any sample runs, in order."""
    ends = list(itertools.accumulate(stacks))
    runs = [jnp.any(part > 0, axis=0) for part in jnp.split(gates_BG, ends[:-1], axis=1)]
    return tuple(Route(jnp.argsort(~runs_G, stable=True), jnp.sum(runs_G)) for runs_G in runs)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("router", "least", "most"),
    meta_fields=("stacks", "branches"),
)
@dataclass(frozen=True, kw_only=True)
class RoutingSteering:
    """Tells every step which blocks it runs.

    least, most  blocks at t = 0 and at t = 1000, fp32 []
    stacks       blocks of each of the model's stacks
    branches     guidance branches of a sample, which share its gates
    """

    router: Router | RandomRouter
    least: jax.Array
    most: jax.Array
    stacks: tuple[int, ...]
    branches: int

    def __call__(self, aux: Aux, seen: jax.Array, step: Step, conditioning: Conditioning) -> Aux:
        gates = self.gates(seen, step, conditioning)
        # A sample alone runs its own blocks and no others: there is nothing to take back.
        rows = None if len(gates) == 1 else jnp.repeat(gates, self.branches, axis=0)
        return aux._replace(gates=rows, routes=union_routes(gates, self.stacks))

    def gates(self, seen_BTYXC: jax.Array, step: Step, conditioning: Conditioning) -> jax.Array:
        """Which blocks each sample runs, 1 or 0 [B, G]."""
        logits = self.router.of_step(seen_BTYXC, step, conditioning, self.branches)
        return top_gates(logits, budget(step.t, self.least, self.most))


class RecordedState(NamedTuple):
    """A denoiser's own state, and the gates of every step so far [S, B, G]."""

    state: Any
    gates: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=("denoiser",), meta_fields=("steps",))
@dataclass(frozen=True, kw_only=True)
class RecordedRouting:
    """A routed denoiser that keeps the gates of every step in its state: for statistics."""

    denoiser: Any
    steps: int

    @property
    def steering(self) -> RoutingSteering:
        """The denoiser's routing."""
        return next(steer for steer in self.denoiser.steering if isinstance(steer, RoutingSteering))

    def init(self, latents, before: RecordedState | None = None):
        shape = (self.steps, len(latents), sum(self.steering.stacks))
        gates = jnp.zeros(shape, jnp.float32) if before is None else before.gates
        return RecordedState(self.denoiser.init(latents, None if before is None else before.state), gates)

    def handed(self, state: RecordedState) -> RecordedState:
        return RecordedState(handed_over(self.denoiser, state.state), state.gates)

    def __call__(self, latents, state: RecordedState, step):
        gates = self.steering.gates(self.finish(latents), step, self.denoiser.conditioning)
        velocity, after = self.denoiser(latents, state.state, step)
        return velocity, RecordedState(after, state.gates.at[step.index].set(gates))

    def finish(self, latents):
        return self.denoiser.finish(latents)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Routing as a plan has it.

    least, most  blocks that run at t = 0 and at pure noise; None is what the model's router was trained with, else the
                 paper's share of all
    choose       which blocks those are: the router's choice, or (the paper's ablation) random ones, without a router
    seed         of random ones
    """

    least: int | None = None
    most: int | None = None
    choose: Choice = "router"
    seed: int = 0

    name: ClassVar[str] = "routing"
    solver: ClassVar[str | None] = None

    @property
    def steps(self) -> int | None:
        return None

    def told(self, parts: Mapping[str, Part]) -> Routing:
        """With as many blocks as the checkpoint's router was trained with, where the plan does not say."""
        settings = parts[ROUTER].settings if ROUTER in parts else {}
        own: Any = {name: settings.get(name) for name in ("least", "most") if getattr(self, name) is None}
        return replace(self, **own)

    def limits(self, blocks: int) -> tuple[int, int]:
        """(blocks that run at t = 0, at t = 1000) of a model of so many; UserError where it has no such number."""
        fewest = min(2, blocks)  # the first and the last
        least = max(round(LEAST * blocks), fewest) if self.least is None else self.least
        most = max(round(MOST * blocks), fewest) if self.most is None else self.most
        if not fewest <= least <= most <= blocks:
            raise UserError(
                f"routing would run {least} to {most} blocks of a model of {blocks}: expected "
                f"{fewest} <= min <= max <= {blocks}; change min= or max="
            )
        return least, most

    def mean_share(self, timesteps: Any, blocks: int) -> float:
        """Share of the blocks that a sample runs, averaged over the steps of a trajectory."""
        return float(np.mean(budget(np.asarray(timesteps), *self.limits(blocks)))) / blocks

    def check(self, stacks: tuple[int, ...], parts: Mapping[str, Part]) -> None:
        """UserError for a model without a router, or whose router or number of blocks does not fit."""
        self.limits(sum(stacks))
        if self.choose == "router":
            router_config(parts, sum(stacks))

    def step_work(self, work: StepWork, at: StepAt) -> StepWork:
        """So many blocks run as the budget says; which ones, the router alone knows: each counts with their share."""
        count = len(work.blocks)
        share = float(budget(np.float32(at.t), *self.limits(count))) / count
        return work.in_blocks(lambda block: block._replace(share=block.share * share))

    def kept_bytes(self, config: Config, shape: Shape) -> int:
        return 0

    def applied(self, denoiser: Any, run: Run) -> Any:
        stacks = denoiser.model.stacks
        least, most = self.limits(sum(stacks))
        router: Router | RandomRouter = RandomRouter(seed=jnp.uint32(self.seed), blocks=sum(stacks))
        if self.choose == "router":
            router = read_router(run.parts, sum(stacks))
            _check_content(router.config, denoiser.conditioning, run.latents_shape[-1])
        steering = RoutingSteering(
            router=router,
            least=jnp.float32(least),
            most=jnp.float32(most),
            stacks=stacks,
            branches=denoiser.branches,
        )
        return replace(denoiser, steering=(*denoiser.steering, steering))


def parse_routing(words: Words) -> Routing:
    """`routing`, `routing:min=20:max=35` (blocks at t = 0 and at pure noise); for ablations `choose=random:seed=1`."""
    given = {name: words.option(name) for name in ("min", "max")}
    for name, text in given.items():
        if text is not None and not (text.isascii() and text.isdigit() and int(text)):
            raise words.error(f"expected {name} as a whole number of blocks, found {text!r}", "change it")
    if words.first is not None:
        raise words.error(f"found {words.first!r}, which routing does not know", "write min= and max=")
    usual = Routing()
    choose = words.choice("choose", usual.choose, get_args(Choice))
    if choose != "random" and "seed" in words.options:
        raise words.error("found seed=, which only choose=random reads", "remove it, or add choose=random")
    seed = words.whole("seed", usual.seed, low=0, high=MOST_SEED)
    words.finish()
    least, most = (None if text is None else int(text) for text in given.values())
    return Routing(least=least, most=most, choose=choose, seed=seed)


def router_config(parts: Mapping[str, Part], blocks: int) -> RouterConfig:
    """Sizes of the router among a checkpoint's parts; UserError where there is none or it is another model's."""
    if ROUTER not in parts:
        raise UserError(
            "routing needs a router, which the model lacks: expected one in its folder methods/router; attach an "
            "untrained one with `dit-adapt --add router`"
        )
    settings = parts[ROUTER].settings
    try:
        config = RouterConfig(**settings)
        known = config.content in CONTENTS and all(
            isinstance(size, int) for size in (config.features, config.blocks, config.hidden, config.time_frequencies)
        )
        known = known and all(limit is None or isinstance(limit, int) for limit in (config.least, config.most))
    except TypeError:
        known = False
    if not known:
        raise UserError(
            f"the router's config.json holds {dict(settings)}: expected {', '.join(asdict(_EXAMPLE))}; attach a router "
            "with `dit-adapt --add router`"
        )
    if config.blocks != blocks:
        raise UserError(
            f"the router is for a model of {config.blocks} blocks, found one of {blocks}: expected its own; attach one "
            "with `dit-adapt --add router`"
        )
    return config


_EXAMPLE = RouterConfig(content="latents", features=0, blocks=0)


def read_router(parts: Mapping[str, Part], blocks: int) -> Router:
    """The router among a checkpoint's parts; UserError where there is none or it does not fit."""
    config = router_config(parts, blocks)
    router = nnx.eval_shape(lambda: Router(config, nnx.Rngs(0)))
    leaves = parts[ROUTER].leaves
    names = {name for name, _ in named_leaves(router)}
    if names != set(leaves):
        odd = sorted(names ^ set(leaves))[0]
        raise UserError(
            f"the router's weights differ in {odd!r}: expected {', '.join(sorted(names))}; attach a router with "
            "`dit-adapt --add router`"
        )
    return with_leaves(router, leaves)


def trained_router(part: Part, routing: Routing, leaves: Mapping[str, Any]) -> Part:
    """The router with these weights, which were trained with so many blocks."""
    least, most = routing.limits(part.settings["blocks"])
    return Part({**part.settings, "least": least, "most": most}, leaves)


def new_router(config: RouterConfig, seed: int = 0) -> Part:
    """An untrained router as a part of a checkpoint."""
    router = Router(config, nnx.Rngs(seed))
    return Part(asdict(config), {name: np.asarray(leaf) for name, leaf in named_leaves(router)})
