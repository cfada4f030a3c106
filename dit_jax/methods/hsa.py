"""HSA: heterogeneous step allocation, every token has its own number of denoising steps (arXiv 2605.06892).

Tokens are split into groups whose budgets divide each other, and are ordered by budget, largest first. Whatever a step
refreshes is then a prefix of that order: K and V are cached in it, block by block, and a step overwrites the rows of
its prefix and lets them attend the whole. Latents and velocities stay in raster order.

Shapes: B samples, R batch rows (guidance branches included), N tokens with padding, M tokens of a prefix, G blocks, H
heads, K head width, Z shards of the tokens, P channels of a patch row, S sampler steps, A groups.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dit_jax.flops import Config, Shape, StepAt, StepWork, block_counts
from dit_jax.methods.method import Run, Words
from dit_jax.methods.token_groups import (
    RANKINGS,
    Ranking,
    active_groups,
    dealt,
    fixed_ranking,
    group_ends,
    ranks_of_places,
    relative_change,
)
from dit_jax.models.network import Aux, State, Tokens, all_or_none, attended, lattice, unlayout
from dit_jax.ops import mesh as meshes
from dit_jax.ops.memory_order import row_major
from dit_jax.sampling.sampler import Guided

TPU_GROUP = 128  # tokens a shard that group sizes are multiples of on TPU


class KeysValues(NamedTuple):
    """Keys and values of all blocks, heads first: [G, R, H, Z, N/Z, K] each."""

    k: jax.Array
    v: jax.Array


class HsaRanks(NamedTuple):
    """What a stage leaves to the next: `change` and `order` of its `HsaState`."""

    change: jax.Array
    order: jax.Array


class HsaState(NamedTuple):
    """What a step leaves to the next.

    velocity  the last velocity of every token [B, N, P], raster order
    change    relative change of the velocity, summed over the full steps so far [B, N], raster order
    order     raster index of the token at each place of the cache [B, N]
    cache     keys and values in that order
    begun     whether `velocity` is one that this network has made []
    """

    velocity: jax.Array
    change: jax.Array
    order: jax.Array
    cache: KeysValues
    begun: jax.Array


@dataclass(frozen=True)
class Prefix:
    """Attention of the first tokens of every shard: their keys and values overwrite the cache, whose whole they attend.

    The block loop carries the cache; `aux` is the validity of the tokens in its order [R, N], or None.

    due  tokens that are refreshed, by rank; what is given beyond them, for even shards, leaves no trace
    """

    shards: int
    due: int

    def __call__(self, attention, x_BMD, place, block, cache: KeysValues, aux):
        q, k, v = attention.qkv(x_BMD, place.rope)
        cache = KeysValues(self._written(cache.k, k, block), self._written(cache.v, v, block))
        k, v = (_in_rows(jax.lax.dynamic_index_in_dim(of_all, block, keepdims=False)) for of_all in cache)
        return attended(attention, (q, k, v), place.context, aux), cache

    def _written(self, of_all, rows_RMHK, block):
        rows = einops.rearrange(rows_RMHK, "r (z m) h k -> 1 r h z m k", z=self.shards).astype(of_all.dtype)
        place = (block, 0, 0, 0, 0, 0)
        if self.due < rows_RMHK.shape[1]:
            is_due = is_refreshed(rows_RMHK.shape[1], self.due, self.shards).reshape(self.shards, -1, 1)
            rows = jnp.where(is_due, rows, jax.lax.dynamic_slice(of_all, place, rows.shape))
        return pinned(jax.lax.dynamic_update_slice(of_all, row_major(rows), place))


def _in_rows(x_RHZNK):
    return einops.rearrange(x_RHZNK, "r h z n k -> r (z n) h k")


def pinned(cache_GRHZNK: jax.Array) -> jax.Array:
    """Holds a cache to the batch, `tensor` and token axes of the mesh in force."""
    mesh = meshes.current_mesh()
    if mesh is None:
        return cache_GRHZNK
    batch, tokens = meshes.activation_axes(mesh, cache_GRHZNK.shape[1])
    heads = "tensor" if "tensor" in mesh.axis_names else None
    spec = PartitionSpec(None, batch or None, heads, tokens or None)
    return jax.lax.with_sharding_constraint(cache_GRHZNK, spec)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("guided", "active", "entry", "order"),
    meta_fields=("ends", "multiple", "shards", "dynamic"),
)
@dataclass(frozen=True, kw_only=True)
class HsaDenoiser:
    """Velocity of every token at every step, of which a step refreshes those that are due.

    active    which groups a step refreshes, bool [S, A]; with a group, all groups before it
    entry     the step from which a dynamic ranking is in force []; steps before it refresh all
    order     raster index of the token at each place of the cache until then [N]
    ends      tokens of the first group, of the first two, …, of all (padding included)
    multiple  prefixes are rounded up to it
    shards    over which tokens are dealt by rank
    """

    guided: Guided
    active: np.ndarray | jax.Array
    entry: np.int32 | jax.Array
    order: np.ndarray | jax.Array
    ends: tuple[int, ...]
    multiple: int
    shards: int
    dynamic: bool

    def init(self, latents, before: HsaRanks | None = None):
        tokens = jax.eval_shape(self.guided.tokens, latents)
        batch, count = tokens.rows.shape[:2]
        model, branches = self.guided.model, self.guided.branches
        config = model.config
        shape = (batch * branches, config.heads, self.shards, count // self.shards, config.head_width)
        width = config.out_channels * math.prod(config.patch)
        dtype = model.patch.kernel[...].dtype
        order = jnp.broadcast_to(self.order, (batch, count))
        return HsaState(
            velocity=jnp.zeros((batch, count, width), jnp.float32),
            change=jnp.zeros((batch, count), jnp.float32) if before is None else before.change,
            order=order if before is None else before.order,
            cache=KeysValues(*(pinned(jnp.zeros((sum(model.stacks), *shape), dtype)) for _ in range(2))),
            begun=jnp.zeros((), bool),
        )

    def handed(self, state: HsaState) -> HsaRanks:
        return HsaRanks(state.change, state.order)

    def __call__(self, latents, state: HsaState, step):
        tokens = self.guided.tokens(self.finish(latents))
        order, cache = self._order(state, tokens, step)
        places = jnp.repeat(order, self.guided.branches, axis=0)
        valid = None
        if tokens.valid is not None:
            valid = jnp.take_along_axis(jnp.repeat(tokens.valid, self.guided.branches, axis=0), places, axis=1)
        # A stage begins with a full step: its cache is empty.
        level = jnp.where(state.begun, jnp.sum(jnp.asarray(self.active)[step.index]), len(self.ends)) - 1
        velocity = state.velocity
        for index, end in enumerate(self.ends):
            rows_BM = self._first(order, end)
            new, cache = self._refreshed(_taken(tokens, rows_BM), step, cache, valid, end, level == index)
            is_due = (level == index) & is_refreshed(rows_BM.shape[1], end, self.shards)
            velocity = _put(velocity, rows_BM, new, is_due)
        ranks = state.begun & (step.index < self.entry)
        change = state.change + jnp.where(ranks, relative_change(velocity, state.velocity), 0)
        after = HsaState(velocity, change, order, cache, jnp.ones((), bool))
        return unlayout(velocity, latents.shape, self.guided.model.config.patch), after

    def finish(self, latents):
        return self.guided.finish(latents)

    def _refreshed(self, tokens: Tokens, step, cache, valid, end: int, chosen):
        """Velocity of a prefix, with every block run where it is chosen and none where not: no conditional may carry a
        cache, XLA would copy it."""
        call = replace(self.guided.call, attention=Prefix(self.shards, end))
        routes = all_or_none(self.guided.model.stacks, chosen)
        guided = replace(self.guided, call=call)
        new, state = guided.velocity_rows(tokens, step, State(attention=cache), Aux(attention=valid, routes=routes))
        return new, state.attention

    def _order(self, state: HsaState, tokens: Tokens, step):
        if not self.dynamic:
            return state.order, state.cache
        enters = step.index == self.entry
        order = jax.lax.cond(enters, lambda: self._ranked(state.change, tokens), lambda: state.order)
        places = jnp.repeat(order, self.guided.branches, axis=0)

        def moved(block, cache):
            """A block's cache from raster order; one at a time, so that no second cache is held."""
            return KeysValues(*(_moved(of_all, block, places, self.shards) for of_all in cache))

        blocks = jnp.where(enters, sum(self.guided.model.stacks), 0)
        return order, jax.lax.fori_loop(0, blocks, moved, state.cache)

    def _ranked(self, change_BN, tokens: Tokens):
        keys = jnp.where(self.guided.is_held(tokens.positions), jnp.inf, change_BN)
        if tokens.valid is not None:
            keys = jnp.where(tokens.valid, keys, -jnp.inf)
        return dealt(jnp.argsort(-keys, axis=1, stable=True), self.shards)

    def _first(self, order_BN, end: int):
        count = min(math.ceil(end / self.multiple) * self.multiple, order_BN.shape[1])
        by_shard = einops.rearrange(order_BN, "b (z n) -> b z n", z=self.shards)
        return by_shard[:, :, : count // self.shards].reshape(len(order_BN), count)


def _taken(tokens: Tokens, rows_BM) -> Tokens:
    def taken(of_all):
        rows = rows_BM.reshape(*rows_BM.shape, *[1] * (of_all.ndim - 2))
        return jnp.take_along_axis(of_all, rows, axis=1)

    return jax.tree.map(taken, tokens)


def _put(of_all_BNP, rows_BM, new_BMP, is_due_M):
    def put(of_all, rows, new):
        return of_all.at[rows].set(jnp.where(is_due_M[:, None], new, of_all[rows]))

    return jax.vmap(put)(of_all_BNP, rows_BM, new_BMP)


def is_refreshed(places: int, due: int, shards: int) -> np.ndarray:
    """Which of the tokens at the first places of every shard are among the first `due` by rank [places]."""
    return ranks_of_places(places, shards) < due


def _moved(of_all, block, places_RN, shards: int):
    one = row_major(jax.lax.dynamic_index_in_dim(of_all, block, keepdims=False))
    flat = einops.rearrange(one, "r h z n k -> r h (z n) k")
    flat = jnp.take_along_axis(flat, places_RN[:, None, :, None], axis=2)
    one = row_major(einops.rearrange(flat, "r h (z n) k -> r h z n k", z=shards))
    return pinned(jax.lax.dynamic_update_slice(of_all, one[None], (block, 0, 0, 0, 0, 0)))


@dataclass(frozen=True, kw_only=True)
class Hsa:
    """HSA as a plan has it.

    shares   of the tokens in each group, adding up to 1
    budgets  steps of each group: first all of them, each a divisor of the one before
    window   middle share of the trajectory in which budgets hold; outside it every step refreshes every token
    ranking  who gets the large budgets: tokens whose velocity changes most (dynamic), or by `fixed_ranking`
    seed     of random groups
    """

    shares: tuple[float, ...]
    budgets: tuple[int, ...]
    window: float
    ranking: Ranking = "dynamic"
    seed: int = 0

    name: ClassVar[str] = "hsa"
    solver: ClassVar[str | None] = "euler"

    @property
    def steps(self) -> int:
        """The number of steps of the sampler."""
        return self.budgets[0]

    @property
    def margin(self) -> int:
        """Full steps at each end: (1 - k)·S/2, rounded down."""
        return int((1 - Fraction(self.window).limit_denominator(10_000)) * self.steps / 2)

    @property
    def active(self) -> np.ndarray:
        """Which groups each step refreshes, bool [S, A]."""
        divisors = tuple(self.steps // budget for budget in self.budgets)
        return active_groups(divisors, self.margin, self.steps - self.margin, self.steps)

    def share_of_full(self, step: int) -> float:
        """Share of the tokens that a step refreshes."""
        return float(self.active[step] @ np.asarray(self.shares))

    def step_work(self, work: StepWork, at: StepAt) -> StepWork:
        """A step works on the tokens that are due, which attend all."""
        if at.step == at.first:
            return work
        share = self.share_of_full(at.step)
        due = work.in_blocks(lambda block: block._replace(tokens=share * block.tokens, projected=share * block.tokens))
        return due._replace(tokens=share * work.tokens)

    def kept_bytes(self, config: Config, shape: Shape) -> int:
        """Keys and values of all tokens in all blocks, and the last velocity in fp32."""
        numbers = 2 * sum(block_counts(config)) * shape.rows * shape.tokens * config.heads * config.head_width
        velocity = shape.samples * shape.tokens * config.out_channels * math.prod(config.patch) * 4
        return numbers * shape.itemsize + velocity

    def applied(self, denoiser: Guided, run: Run) -> HsaDenoiser:
        patch = denoiser.model.config.patch
        positions, count = lattice(run.latents_shape, patch)
        held = np.asarray(denoiser.is_held(positions)) & (np.arange(len(positions)) < count)
        shards = _shards(run.latents_shape[0] * denoiser.branches)
        # Whole lanes a shard on TPU, where there are many tokens.
        lanes = TPU_GROUP if meshes.platform() == "tpu" and len(positions) >= 64 * TPU_GROUP * shards else 1
        dynamic = self.ranking == "dynamic" and len(self.shares) > 1
        order = np.arange(len(positions))
        if not dynamic:
            order = fixed_ranking(self.ranking, positions, np.arange(len(positions)) < count, held, self.seed)
            order = order[ranks_of_places(len(order), shards)]
        return HsaDenoiser(
            guided=denoiser,
            active=self.active,
            entry=np.int32(self.margin if dynamic else 0),
            order=order.astype(np.int32),
            ends=group_ends(self.shares, count, len(positions), int(held.sum())),
            multiple=shards * lanes,
            shards=shards,
            dynamic=dynamic,
        )


def _shards(rows: int) -> int:
    mesh = meshes.current_mesh()
    return 1 if mesh is None else meshes.axis_size(mesh, meshes.activation_axes(mesh, rows)[1])


PRESETS = {
    "75A": Hsa(shares=(0.25, 0.25, 0.5), budgets=(40, 20, 10), window=0.5),
    "75B": Hsa(shares=(0.33, 0.67), budgets=(40, 10), window=0.5),
    "50": Hsa(shares=(0.16, 0.84), budgets=(40, 10), window=0.8),
    "25": Hsa(shares=(0.16, 0.84), budgets=(20, 5), window=0.8, ranking="random"),
}


def parse_hsa(words: Words) -> Hsa:
    """`hsa:50`, `hsa:75A:ranking=uniform`, `hsa:groups=25@40/25@20/50@10:window=0.5` (percent@steps)."""
    groups, preset = words.option("groups"), words.first
    if (groups is None) == (preset is None):
        known = ", ".join(PRESETS)
        raise words.error("expected either a preset or groups=", f"write one of {known}, or groups=16@40/84@10")
    if preset is not None and preset not in PRESETS:
        raise words.error(
            f"expected a preset of {', '.join(PRESETS)}, found {preset!r}", "choose one, or write groups="
        )
    usual = PRESETS[str(preset)] if groups is None else _of_groups(words, groups)
    hsa = replace(
        usual,
        window=words.number("window", usual.window, low=0, high=1),
        ranking=words.choice("ranking", usual.ranking, RANKINGS),
        seed=words.whole("seed", usual.seed, low=0, high=2**31),
    )
    words.finish()
    if hsa.ranking == "dynamic" and len(hsa.shares) > 1 and hsa.margin < 2:
        found = f"a dynamic ranking needs 2 full steps before the window, found {hsa.margin}"
        raise words.error(found, "choose a smaller window= or ranking=random")
    return hsa


def _of_groups(words: Words, text: str) -> Hsa:
    try:
        pairs = [(float(share), int(steps)) for share, steps in (part.split("@") for part in text.split("/"))]
    except ValueError:
        found = f"expected groups as percent@steps, found {text!r}"
        raise words.error(found, "write groups=25@40/25@20/50@10") from None
    shares, budgets = zip(*pairs, strict=True)
    if not abs(sum(shares) - 100) <= 1e-6 or min(shares) <= 0:  # NaN is neither more nor less
        raise words.error(f"expected positive percentages that add up to 100, found {shares}", "change them")
    if min(budgets) < 1 or any(large % small for large, small in itertools.pairwise(budgets)):
        raise words.error(f"expected budgets that each divide the one before, found {budgets}", "write 40, 20, 10")
    return Hsa(shares=tuple(share / 100 for share in shares), budgets=budgets, window=PRESETS["50"].window)
