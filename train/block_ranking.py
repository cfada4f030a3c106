"""Which blocks a student can do without before it has learnt to: where the router of PARE's stage II begins.

A router that begins without a ranking settles within a hundred steps on whichever blocks the first batches made it
leave out. Here blocks are left out one after the other instead, each time the one without which the student's velocity
stays nearest to the teacher's.

Shapes: B samples, G blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.progress import progress_bar
from dit_jax.models.network import Aux
from dit_jax.sharding import replicated
from train.losses import Batch, Metrics, Noised, mean_square, noised, predicted
from train.pare_loss import PareSettings
from train.placement import in_dtype
from train.recipe import POSITION, Driven, without_position
from train.shards import write_whole
from train.step import TrainState, on_mesh

RANKING = "ranking.json"
SPREAD = 2.0  # of the logits that blocks begin with: the gate has four fifths of its steepest slope at the ends
BIAS = "router.out.bias"


def ranked_blocks(error: Callable[[np.ndarray], float], blocks: int, least: int) -> tuple[list[int], list[float]]:
    """(blocks in the order in which to leave them out, what `error` of fp32 gates [G] is without these and those
    before).

    least  blocks that run at least: those that no step leaves out are ranked by what the next one would have cost, and
           the first and the last, which always run, come at the end
    """
    left = list(range(1, blocks - 1))
    order: list[int] = []
    errors: list[float] = []
    turns = range(min(blocks - least, len(left)))
    for _ in progress_bar(turns, desc="blocks ranked by what leaving them out costs", unit="block"):
        costs = {block: error(_gates(blocks, [*order, block])) for block in left}
        best = min(costs, key=lambda block: costs[block])
        order.append(best)
        errors.append(costs[best])
        left.remove(best)
    rest = {block: error(_gates(blocks, [*order, block])) for block in left}
    return [*order, *sorted(left, key=lambda block: rest[block]), *{0, blocks - 1}], errors


def _gates(blocks: int, without: list[int]) -> np.ndarray:
    gates = np.ones(blocks, np.float32)
    gates[without] = 0
    return gates


def logits_of(order: list[int]) -> np.ndarray:
    """Logits [G] in fp32 of blocks in the order in which they are left out, evenly between ±`SPREAD`/2."""
    logits = np.empty(len(order), np.float32)
    logits[order] = SPREAD * (np.arange(len(order)) / max(len(order) - 1, 1) - 0.5)
    return logits


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A training step before whose first one an untrained router is told which blocks to leave out first.

    The ranking is written to ranking.json in the run's folder `out`.
    """

    out: str
    driven: Driven
    settings: PareSettings

    def __call__(self, state: TrainState, batch: Mapping[str, Any], key: jax.Array) -> tuple[TrainState, Metrics]:
        if batch[POSITION] == 0:
            state = self._told(state, without_position(batch), key)
        return self.driven(state, batch, key)

    def _told(self, state: TrainState, batch: Mapping[str, Any], key: jax.Array) -> TrainState:
        step, blocks = self.driven.step, len(state.params[BIAS])
        with jax.set_mesh(step.mesh):
            arrays = step.place(batch)
            target = jax.jit(self._target)(step.frozen["teacher"], arrays, key)
            error = jax.jit(self._error, out_shardings=replicated(step.mesh))
            order, errors = ranked_blocks(
                lambda gates: float(error(state.params, arrays, key, target, gates)),
                blocks,
                self.settings.routing.limits(blocks)[0],
            )
        if jax.process_index() == 0:
            told = {"order": order, "velocity_errors": errors}
            write_whole(Path(self.out) / RANKING, json.dumps(told, indent=1).encode() + b"\n")
        logits = on_mesh(logits_of(order), jnp.float32, step.weights[BIAS])
        params, ema = ({**held, BIAS: jnp.copy(logits)} for held in (state.params, state.ema))
        return state._replace(params=params, ema=ema)

    def _target(self, teacher: Any, arrays: Batch, key: jax.Array) -> jax.Array:
        batch, at = self._noised(arrays, key)
        return predicted(teacher, at, batch, self.settings.flow.call)[0]

    def _error(self, params: Any, arrays: Batch, key: jax.Array, target: jax.Array, gates: jax.Array) -> jax.Array:
        step = self.driven.step
        student = in_dtype(step.rebuilt(params), step.plan.dtype)["student"]
        batch, at = self._noised(arrays, key)
        rows = jnp.broadcast_to(gates, (len(at.latents), len(gates)))
        found, _ = predicted(student, at, batch, self.settings.flow.call, Aux(gates=rows))
        return mean_square(found - target, at.held)

    def _noised(self, arrays: Batch, key: jax.Array) -> tuple[Batch, Noised]:
        """The first microbatch, and its latents with noise."""
        first = self.driven.step.first(arrays)
        return first, noised(first["latents"], key, self.settings.flow)
