"""TaylorSeer: between full steps the outputs of every block's attention and MLP are predicted by a Taylor series
(arXiv 2503.06923).

The blocks still run: modulation, gates and the residual stream are those of the step at hand. All differences of all
outputs are kept, which takes a lot of memory.

Shapes: R batch rows (guidance branches included), M tokens, L text tokens, D width, G blocks, S sampler steps, O order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dit_jax.flops import Config, Shape, StepAt, StepWork, block_counts
from dit_jax.methods.method import Run, Words
from dit_jax.models.network import Attended, Aux, Dense, State, Trunk
from dit_jax.models.wan import WanConfig
from dit_jax.ops import mesh as meshes
from dit_jax.ops.memory_order import row_major
from dit_jax.sampling.sampler import Guided

FULL_AT_FIRST = 3  # full steps at the start of a run
TEXT = ("context", "text_mlp")  # outputs that are not of the tokens
Kept = dict[str, jax.Array]  # differences of each output, order 0 (itself) first [G, O + 1, R, ...]


class TaylorStep(NamedTuple):
    """What is known of each step before the first, arrays [S]; of one of them, [].

    full   whether every output is computed
    apart  steps since the last full one; that is the k of a prediction and the Δ of a full step's differences
    made   full steps so far
    """

    full: jax.Array
    apart: jax.Array
    made: jax.Array


@dataclass(frozen=True)
class Differenced:
    """The strategy of a full step: all is computed, and the differences are taken,
    `F_{i+1} = (F_i - F_i of the last full step) / Δ` as far as there are full steps for them."""

    order: int

    def __call__(self, attention, x_BMD, place, block, cache: Kept, aux: TaylorStep):
        attended, _ = Dense()(attention, x_BMD, place, block, None, None)
        cache = self._noted("attention", attended.tokens, block, cache, aux)
        if attended.context is not None:
            cache = self._noted("context", attended.context, block, cache, aux)
        return attended, cache

    def branch(self, name: str, compute: Callable[[], jax.Array], block, cache: Kept, aux: TaylorStep):
        output = compute()
        return output, self._noted(name, output, block, cache, aux)

    def _noted(self, name, output, block, cache: Kept, aux: TaylorStep) -> Kept:
        before = _of_block(cache[name], block).astype(jnp.float32)
        differences = [output.astype(jnp.float32)]
        for order in range(self.order):
            difference = (differences[order] - before[order]) / jnp.maximum(aux.apart, 1)
            differences.append(jnp.where(aux.made > order, difference, 0))
        rows = row_major(jnp.stack(differences)[None].astype(cache[name].dtype))
        place = (block, *[0] * (rows.ndim - 1))
        return cache | {name: _pinned(name, jax.lax.dynamic_update_slice(cache[name], rows, place))}


@dataclass(frozen=True)
class Predicted:
    """The strategy of the steps between: every output is `Σ_i F_i·k^i / i!`, nothing is computed."""

    order: int

    def __call__(self, attention, x_BMD, place, block, cache: Kept, aux: TaylorStep):
        tokens = self._predicted("attention", block, cache, aux)
        if place.context is None:
            return Attended(tokens), cache
        return Attended(tokens, self._predicted("context", block, cache, aux)), cache

    def branch(self, name: str, compute: Callable[[], jax.Array], block, cache: Kept, aux: TaylorStep):
        return self._predicted(name, block, cache, aux), cache

    def _predicted(self, name, block, cache: Kept, aux: TaylorStep) -> jax.Array:
        differences = _of_block(cache[name], block)
        steps = aux.apart.astype(jnp.float32)
        terms = (differences[i].astype(jnp.float32) * steps**i / math.factorial(i) for i in range(self.order + 1))
        return sum(terms, jnp.zeros(())).astype(differences.dtype)


def _of_block(kept: jax.Array, block) -> jax.Array:
    return row_major(jax.lax.dynamic_index_in_dim(kept, block, keepdims=False))


def _pinned(name: str, kept: jax.Array) -> jax.Array:
    """Holds differences [G, O + 1, R, ...] to the batch and token axes of the mesh in force."""
    mesh = meshes.current_mesh()
    if mesh is None:
        return kept
    batch, tokens = meshes.activation_axes(mesh, kept.shape[2])
    spec = PartitionSpec(None, None, batch or None, None if name in TEXT else tokens or None)
    return jax.lax.with_sharding_constraint(kept, spec)


@dataclass(frozen=True)
class TaylorCache:
    """The trunk's cache of TaylorSeer: two loops over the blocks, one of which has no turns."""

    order: int

    def init(self, model, x_BMD, signal):
        def nothing(name, of):
            return _pinned(name, jnp.zeros((sum(model.stacks), self.order + 1, *of.shape), of.dtype))

        return State(attention={name: nothing(name, of) for name, of in model.branch_shapes(x_BMD, signal).items()})

    def __call__(self, trunk: Trunk, x_BMD, state: State):
        told: TaylorStep = trunk.aux.cache
        x, kept = trunk.run_if(told.full, Differenced(self.order), told, x_BMD, state.attention)
        x, kept = trunk.run_if(~told.full, Predicted(self.order), told, x, kept)
        return x, State(attention=kept)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("steps",), meta_fields=())
@dataclass(frozen=True)
class TaylorSteering:
    """Tells the trunk's cache of the step at hand."""

    steps: TaylorStep

    def __call__(self, aux: Aux, seen, step, conditioning) -> Aux:
        return aux._replace(cache=jax.tree.map(lambda of_all: of_all[step.index], self.steps))


@dataclass(frozen=True, kw_only=True)
class TaylorSeer:
    """TaylorSeer as a plan has it: a full step every `interval` steps, and the highest `order` of differences."""

    interval: int = 4
    order: int = 1

    name: ClassVar[str] = "taylorseer"
    solver: ClassVar[str | None] = None

    @property
    def steps(self) -> int | None:
        """Any number of steps."""
        return None

    def timeline(self, steps: int, first: int = 0) -> TaylorStep:
        """Which steps are full, where no step before `first` has been run by the same network; arrays [S]."""
        full, apart, made = np.zeros(steps, bool), np.zeros(steps, np.int32), np.zeros(steps, np.int32)
        last, count = first, 0
        for index in range(first, steps):
            full[index] = index in (first, *range(FULL_AT_FIRST)) or index - last == self.interval
            apart[index], made[index] = index - last, count
            if full[index]:
                last, count = index, count + 1
        return TaylorStep(*map(jnp.asarray, (full, apart, made)))

    def step_work(self, work: StepWork, at: StepAt) -> StepWork:
        """A step that predicts the branches' outputs runs none of them."""
        runs = bool(self.timeline(at.steps, at.first).full[at.step])
        return work.in_blocks(lambda block: block._replace(share=block.share * runs))

    def kept_bytes(self, config: Config, shape: Shape) -> int:
        """The output of every branch of every block (attention and MLP; Wan's cross-attention; FLUX's text) and its
        differences."""
        if isinstance(config, WanConfig):
            numbers = 3 * shape.tokens * config.width
        else:
            # The text's attention is kept before its projection, as its heads.
            inner = config.heads * config.head_width
            numbers = 2 * shape.tokens * config.width + shape.text * (inner + config.width)
        return (self.order + 1) * sum(block_counts(config)) * shape.rows * numbers * shape.itemsize

    def applied(self, denoiser: Guided, run: Run) -> Guided:
        steering = TaylorSteering(self.timeline(run.steps, run.first))
        call = replace(denoiser.call, cache=TaylorCache(self.order))
        return replace(denoiser, call=call, steering=(*denoiser.steering, steering))


def parse_taylorseer(words: Words) -> TaylorSeer:
    """`taylorseer`, `taylorseer:n=4:order=1`."""
    if words.first is not None:
        raise words.error(f"found {words.first!r}, which taylorseer does not know", "write taylorseer:n=4:order=1")
    interval = words.whole("n", TaylorSeer.interval, low=1, high=1000)
    order = words.whole("order", TaylorSeer.order, low=0, high=4)
    words.finish()
    return TaylorSeer(interval=interval, order=order)
