"""A diffusion transformer as tokenizer → trunk → head, whichever backbone it is.

Shapes: B batch rows (guidance branches included), N tokens, M padded tokens, P channels of a patch row, D width, G
blocks, T Y X latent grid, C latent channels. Latents are channels last and in raster order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.remat import Remat, rematerialised
from dit_jax.ops import mesh as meshes
from dit_jax.ops.attention import attend
from dit_jax.ops.rope import Rope

TPU_TOKENS = 128
Patch = tuple[int, int, int]


class Tokens(NamedTuple):
    """Patch rows [B, M, P], their (t, y, x) in token units [B, M, 3], and which rows are real [B, M] (None: all)."""

    rows: jax.Array
    positions: jax.Array
    valid: jax.Array | None


class Context(NamedTuple):
    """Queries, keys and values of text that shares the tokens' attention (FLUX), [B, L, H, K] each."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


class Place(NamedTuple):
    """What self-attention knows of its tokens besides their features.

    positions  (t, y, x) in token units [B, M, 3]
    rope       rotation table
    valid      which tokens are real [B, M] (None: all)
    context    text that attends and is attended with them, or None
    """

    positions: jax.Array
    rope: Rope
    valid: jax.Array | None
    context: Context | None = None


class Conditioning(NamedTuple):
    """What a model is told besides the timestep; a backbone reads the fields that it has weights for.

    text      embeddings [B, L, E]
    image     hidden states of the image encoder [B, I, E'] (image-to-video)
    pooled    one embedding a text [B, E'']
    guidance  scale of distilled guidance [B]
    """

    text: jax.Array
    image: jax.Array | None = None
    pooled: jax.Array | None = None
    guidance: jax.Array | None = None


class TokenTimesteps(NamedTuple):
    """Timesteps of tokens that have their own: the few distinct values [B, Q], and which of them each has [B, M].

    What a model makes of a timestep it makes of the Q values; no array of modulation per token is ever built.
    """

    values: jax.Array
    which: jax.Array


Timesteps = jax.Array | TokenTimesteps  # [B], or of every token


class Attended(NamedTuple):
    """Output of self-attention: the tokens' projected [B, M, D], and of a context's queries its heads [B, L, H, K]."""

    tokens: jax.Array
    context: jax.Array | None = None


class Strategy(Protocol):
    """How a block's self-attention runs: which tokens are projected, what they attend, what is kept for later steps."""

    def __call__(
        self, attention, x_BMD: jax.Array, place: Place, block: jax.Array, cache: Any, aux: Any
    ) -> tuple[Attended, Any]: ...


@runtime_checkable
class BranchStrategy(Strategy, Protocol):
    """A strategy that also says how a block's other branches run: `compute` gives the output of the one of this name.

    Names: `mlp`, `cross` (Wan), `text_mlp` (FLUX).
    """

    def branch(
        self, name: str, compute: Callable[[], jax.Array], block: jax.Array, cache: Any, aux: Any
    ) -> tuple[jax.Array, Any]: ...


def branch(strategy: Strategy, name: str, compute: Callable[[], jax.Array], block: jax.Array, cache: Any, aux: Any):
    """Output of a block's branch besides self-attention, and the strategy's state."""
    if isinstance(strategy, BranchStrategy):
        return strategy.branch(name, compute, block, cache, aux)
    return compute(), cache


@runtime_checkable
class CrossWatcher(Protocol):
    """A strategy that is also shown what cross-attention found: attended values [B, N, H, K] of each of its contexts,
    before the output projection. It returns its state."""

    def watch_cross(
        self, heads: tuple[jax.Array, ...], place: Place, block: jax.Array, cache: Any, aux: Any
    ) -> Any: ...


@dataclass(frozen=True)
class Dense:
    """Every token is projected and attends every valid token (and the context, which attends them too)."""

    def __call__(self, attention, x_BMD, place, block, cache, aux):
        return attended(attention, attention.qkv(x_BMD, place.rope), place.context, place.valid), cache


def attended(attention, qkv: tuple[jax.Array, ...], context: Context | None, valid_BM: jax.Array | None) -> Attended:
    """Queries [B, N, H, K] attend the valid keys [B, M, H, K] and the context's, which attends them all too."""
    q, k, v = qkv
    if context is None:
        return Attended(attention.out(attend(q, k, v, valid_BM)))
    k, v, valid = with_context(context, k, v, valid_BM)
    return Attended(attention.out(attend(q, k, v, valid)), attend(context.q, k, v, valid))


def with_context(context: Context, k_BMHK: jax.Array, v_BMHK: jax.Array, valid_BM: jax.Array | None):
    """Keys, values and validity with the context's in front."""
    k, v = (jnp.concatenate(pair, axis=1) for pair in ((context.k, k_BMHK), (context.v, v_BMHK)))
    real = jnp.ones(context.k.shape[:2], bool)
    return k, v, None if valid_BM is None else jnp.concatenate([real, valid_BM], axis=1)


class TrunkCache(Protocol):
    """Whether a step runs the whole trunk or adds what it added before.

    `init` makes the state from the shapes of tokens [B, M, D] and signal; a call returns (x [B, M, D], state).
    """

    def init(self, model: Any, x_BMD: jax.ShapeDtypeStruct, signal: Any) -> State: ...
    def __call__(self, trunk: Trunk, x_BMD: jax.Array, state: State) -> tuple[jax.Array, State]: ...


@dataclass(frozen=True, kw_only=True)
class NetworkCall:
    """The static part of what a step may vary; part of a program's key."""

    attention: Strategy = Dense()
    cache: TrunkCache | None = None
    remat: Remat = "none"


class Route(NamedTuple):
    """Blocks of one stack that run: their indexes, in order and in front [G], and how many they are []."""

    blocks: jax.Array
    active: jax.Array


def all_or_none(stacks: tuple[int, ...], runs: jax.Array) -> tuple[Route, ...]:
    """Routes through all blocks of each stack if `runs` [], else through none."""
    return tuple(Route(jnp.arange(blocks), jnp.where(runs, blocks, 0)) for blocks in stacks)


class Aux(NamedTuple):
    """Arrays that a step is steered by. What is None is not in the program at all.

    attention  what the attention strategy is told
    cache      what the trunk's cache is told
    gates      each row's gate of every block [B, G], fp32: x <- m·block(x) + (1 - m)·x
    routes     a Route for each of the model's stacks; the other blocks are not executed
    taps       blocks whose outputs `State.taps` is to have [P], no block twice
    """

    attention: Any = None
    cache: Any = None
    gates: jax.Array | None = None
    routes: tuple[Route, ...] | None = None
    taps: jax.Array | None = None


class State(NamedTuple):
    """What the attention strategy and the trunk's cache keep from step to step, and what a call found at its taps.

    taps  tokens behind the blocks of `Aux.taps` and their gates [P, B, M, D], without text; None where none are asked
    """

    attention: Any = None
    cache: Any = None
    taps: jax.Array | None = None


class Tapped(NamedTuple):
    """State of a block loop with taps: the attention strategy's, and tokens [P + 1, B, M, D] behind the tapped blocks;
    the last place is any other block's."""

    attention: Any
    tokens: jax.Array


class Trunk(NamedTuple):
    """All blocks of a model in one call, as a trunk cache sees them."""

    model: Any
    signal: Any
    place: Place
    call: NetworkCall
    aux: Aux

    def run(self, x_BMD: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Tokens through the blocks: (x, the attention strategy's state)."""
        return self.model.trunk(x_BMD, self.signal, self.place, self.call, state, self.aux)

    def run_if(self, runs: jax.Array, attention: Strategy, told: Any, x_BMD: jax.Array, state: Any):
        """The same with another strategy, which is told this, if `runs` []; else as they came. No conditional carries
        the state: XLA would copy it."""
        routes = all_or_none(self.model.stacks, runs)
        call, aux = replace(self.call, attention=attention), self.aux._replace(attention=told, routes=routes)
        return self._replace(call=call, aux=aux).run(x_BMD, state)


def grid(latents_shape, patch: Patch) -> tuple[int, int, int]:
    """Token grid (T, Y, X) of latents [B, T, Y, X, C]; a last patch that they do not fill counts."""
    return tuple(-(-size // step) for size, step in zip(latents_shape[1:4], patch, strict=True))


def padded_length(tokens: int) -> int:
    """Tokens with the padding that the mesh in force needs: an even split, and on TPU whole lanes a shard."""
    multiple = meshes.token_multiple(meshes.current_mesh()) * (TPU_TOKENS if meshes.platform() == "tpu" else 1)
    return math.ceil(tokens / multiple) * multiple


def lattice(latents_shape, patch: Patch) -> tuple[np.ndarray, int]:
    """(t, y, x) of the tokens of such latents in token units, padding included (at the origin) [M, 3] in fp32, and how
    many tokens there are without it."""
    t, y, x = grid(latents_shape, patch)
    positions = np.stack(np.meshgrid(np.arange(t), np.arange(y), np.arange(x), indexing="ij"), -1).reshape(-1, 3)
    pad = padded_length(len(positions)) - len(positions)
    return np.pad(positions, ((0, pad), (0, 0))).astype(np.float32), len(positions)


def layout(latents_BTYXC: jax.Array, patch: Patch) -> Tokens:
    """Latents in rows of `patch` (t, y, x) cells, channels ordered (t y x c), padded for the mesh in force.

    Where the patch does not divide the latents, their last cells are repeated to fill it: no token is padding alone.
    """
    missing = [-size % step for size, step in zip(latents_BTYXC.shape[1:4], patch, strict=True)]
    if any(missing):
        edges = ((0, 0), *((0, count) for count in missing), (0, 0))
        latents_BTYXC = jnp.pad(latents_BTYXC, edges, mode="edge")
    rows = einops.rearrange(
        latents_BTYXC, "b (t pt) (y py) (x px) c -> b (t y x) (pt py px c)", pt=patch[0], py=patch[1], px=patch[2]
    )
    positions, count = lattice(latents_BTYXC.shape, patch)
    padded, batch = len(positions), len(rows)
    rows = meshes.constrain_tokens(jnp.pad(rows, ((0, 0), (0, padded - count), (0, 0))))
    valid = jnp.broadcast_to(np.arange(padded) < count, (batch, padded)) if padded > count else None
    return Tokens(rows, jnp.broadcast_to(positions, (batch, *positions.shape)), valid)


def unlayout(rows_BMP: jax.Array, latents_shape, patch: Patch) -> jax.Array:
    """Latent-shaped [B, T, Y, X, C'] array from patch rows; the padding is dropped."""
    t, y, x = grid(latents_shape, patch)
    whole = einops.rearrange(
        rows_BMP[:, : t * y * x],
        "b (t y x) (pt py px c) -> b (t pt) (y py) (x px) c",
        t=t, y=y, x=x, pt=patch[0], py=patch[1], px=patch[2],
    )  # fmt: skip
    frames, rows, columns = latents_shape[1:4]
    return whole[:, :frames, :rows, :columns]


def network(
    model,
    call: NetworkCall,
    tokens: Tokens,
    t: Timesteps,
    conditioning: Conditioning,
    state: State = State(),
    aux: Aux = Aux(),
):
    """One evaluation of a backbone: (velocity rows [B, M, P] in fp32, state).

    `t` is the model's timestep in [0, 1000], of a row or (Wan) of each token.
    """
    signal = model.signal(t, conditioning)
    x_BMD = meshes.constrain_tokens(model.embed(tokens.rows))
    trunk = Trunk(model, signal, Place(tokens.positions, model.rope(tokens.positions), tokens.valid), call, aux)
    if aux.taps is not None:
        x_BMD, state = _run_tapped(trunk, x_BMD, state)
    elif call.cache is None:
        x_BMD, block_state = trunk.run(x_BMD, state.attention)
        state = state._replace(attention=block_state)
    else:
        x_BMD, state = call.cache(trunk, x_BMD, state)
    return model.head(x_BMD, signal).astype(jnp.float32), state


def _run_tapped(trunk: Trunk, x_BMD: jax.Array, state: State) -> tuple[jax.Array, State]:
    if trunk.call.cache is not None:
        raise ValueError("a trunk cache may skip the blocks that are tapped: run the model without it")
    assert trunk.aux.taps is not None
    count = len(trunk.aux.taps)
    nothing = jax.vmap(meshes.constrain_tokens)(jnp.zeros((count + 1, *x_BMD.shape), x_BMD.dtype))
    x_BMD, after = trunk.run(x_BMD, Tapped(state.attention, nothing))
    return x_BMD, state._replace(attention=after.attention, taps=after.tokens[:count])


def run_blocks(blocks, x, signal, place: Place, call: NetworkCall, state=None, aux: Aux = Aux(), stack=0, first=0):
    """Tokens through a stack of blocks, one after the other: (x, the attention strategy's state).

    x      [B, M, D], or a tuple of that and of text tokens [B, L, D] that the blocks also change
    state  of the attention strategy; `Tapped` if there are taps
    stack  which of the model's stacks it is
    first  index of its first block in the model
    """

    def step(carry, block, index):
        x, cache = carry
        after, cache = block(x, signal, place, call.attention, first + index, cache, aux.attention)
        if aux.gates is not None:
            after = _gated(x, after, jax.lax.dynamic_index_in_dim(aux.gates, first + index, axis=1))
        return _pinned(after), cache

    run = step if aux.routes is not None else rematerialised(step, call.remat)
    run = run if aux.taps is None else _tapping(run, aux.taps, first)
    carry = (_pinned(x), state)
    if aux.routes is not None:
        route = aux.routes[stack]

        def routed(turn, carry):
            index = route.blocks[turn]
            block = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), blocks)
            return run(carry, block, index)

        return jax.lax.fori_loop(0, route.active, routed, carry)
    count = jax.tree.leaves(blocks)[0].shape[0]
    return jax.lax.scan(lambda carry, each: (run(carry, *each), None), carry, (blocks, jnp.arange(count)))[0]


def _tapping(run: Callable, taps_P: jax.Array, first: int) -> Callable:
    """A step of the block loop that also keeps its output where it is tapped, in a buffer that no block saves.

    The gradient of a write at an index needs that index alone; a `where` over the buffer would save its mask with every
    block.
    """

    def tapping(carry, block, index):
        x, (cache, tokens) = carry
        x, cache = run((x, cache), block, index)
        place = jnp.min(jnp.where(taps_P == first + index, jnp.arange(len(taps_P)), len(taps_P)))
        output = x[0] if isinstance(x, tuple) else x
        return x, Tapped(cache, jax.lax.dynamic_update_index_in_dim(tokens, output, place, 0))

    return tapping


def _gated(x, after, gate_B1: jax.Array):
    def mixed(before, after):
        gate = gate_B1[..., None]
        return (gate * after + (1 - gate) * before).astype(after.dtype)

    return jax.tree.map(mixed, x, after)


def _pinned(x):
    """Tokens, and text that the blocks change too, where it divides: no chip repeats another's work on it."""
    return jax.tree.map(meshes.constrain_tokens, x)
