"""MagCache: steps at which the trunk's residual keeps its size reuse the last one (arXiv 2506.09045).

How the residual's size changes from step to step hardly depends on the prompt. It is measured once; which steps run is
then known before the first.

Shapes: R batch rows (guidance branches included), M tokens, D width, S sampler steps.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import UserError
from dit_jax.flops import Config, Shape, StepAt, StepWork, residual_bytes
from dit_jax.methods.method import Run, Words
from dit_jax.methods.residual import no_residual, run_or_reuse
from dit_jax.models.network import Aux, State, Trunk
from dit_jax.sampling.sampler import Guided

MOST_IN_A_ROW = 3  # steps that reuse, where a plan does not say
RETENTION = 0.2  # share of the steps, from the first, that always run, where a plan does not say


@dataclass(frozen=True)
class ScheduledCache:
    """The trunk's cache of MagCache: told whether a step reuses the residual []."""

    def init(self, model, x_BMD, signal):
        return State(cache=no_residual(x_BMD))

    def __call__(self, trunk: Trunk, x_BMD, state: State):
        reuses = jnp.broadcast_to(trunk.aux.cache & (state.cache.runs > 0), x_BMD.shape[:1])
        x, block_state, residual = run_or_reuse(trunk, x_BMD, state.attention, state.cache, reuses)
        return x, State(block_state, residual)


@dataclass(frozen=True)
class ResidualNorms:
    """A trunk's cache that reuses nothing: it keeps the norms of the residual [S, R], and is told the step's index."""

    steps: int

    def init(self, model, x_BMD, signal):
        return State(cache=jnp.zeros((self.steps, x_BMD.shape[0]), jnp.float32))

    def __call__(self, trunk: Trunk, x_BMD, state: State):
        after, block_state = trunk.run(x_BMD, state.attention)
        added = (after - x_BMD).astype(jnp.float32)
        if trunk.place.valid is not None:
            added = jnp.where(trunk.place.valid[..., None], added, 0)
        norms = state.cache.at[trunk.aux.cache].set(jnp.linalg.norm(added, axis=(1, 2)))
        return after, State(block_state, norms)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=())
@dataclass(frozen=True)
class StepTable:
    """Tells the trunk's cache the value of the step at hand, of `values` [S]."""

    values: jax.Array

    def __call__(self, aux: Aux, seen, step, conditioning) -> Aux:
        return aux._replace(cache=self.values[step.index])


def _cached(denoiser: Guided, cache: Any, values) -> Guided:
    call = replace(denoiser.call, cache=cache)
    return replace(denoiser, call=call, steering=(*denoiser.steering, StepTable(jnp.asarray(values))))


@dataclass(frozen=True, kw_only=True)
class MagCache:
    """MagCache as a plan has it.

    threshold      of the error added up since the trunk last ran, below which a step reuses the residual
    ratios         size of a step's residual over that of the step before, of all steps; the first is not used
    most_in_a_row  K, steps that reuse one after the other
    retention      share of the steps, from the first, that always run
    """

    threshold: float
    ratios: tuple[float, ...]
    most_in_a_row: int = MOST_IN_A_ROW
    retention: float = RETENTION

    name: ClassVar[str] = "magcache"
    solver: ClassVar[str | None] = None

    @property
    def steps(self) -> int:
        """The number of steps that the ratios were measured with."""
        return len(self.ratios)

    def reuses(self, first: int = 0) -> np.ndarray:
        """Which steps reuse the residual, bool [S], where the trunk has not run before step `first`.

        `acc *= γ; err += |1 - acc|`; a step reuses if err is below the threshold, the trunk has run in one of the K
        steps before it, and it is past the retention share. A step that runs resets acc to 1 and err to 0.
        """
        retained = int(Fraction(self.retention).limit_denominator(10_000) * self.steps)
        reuses = np.zeros(self.steps, bool)
        size, error, in_a_row = 1.0, 0.0, 0
        for index in range(max(first + 1, retained), self.steps):
            size *= self.ratios[index]
            error += abs(1 - size)
            if error < self.threshold and in_a_row < self.most_in_a_row:
                reuses[index], in_a_row = True, in_a_row + 1
            else:
                size, error, in_a_row = 1.0, 0.0, 0
        return reuses

    def step_work(self, work: StepWork, at: StepAt) -> StepWork:
        """A step that reuses the residual runs no block."""
        runs = not self.reuses(at.first)[at.step]
        return work.in_blocks(lambda block: block._replace(share=block.share * runs))

    def kept_bytes(self, config: Config, shape: Shape) -> int:
        return residual_bytes(config, shape)

    def applied(self, denoiser: Guided, run: Run) -> Guided:
        return _cached(denoiser, ScheduledCache(), self.reuses(run.first))


def recording(denoiser: Guided, steps: int) -> Guided:
    """A denoiser that runs every step and notes in its state's `cache` the norms of the trunk's residual [S, R]; 0 at
    the steps of others."""
    return _cached(denoiser, ResidualNorms(steps), np.arange(steps))


def ratios_of(norms_SR: np.ndarray) -> np.ndarray:
    """γ of each step [S], the mean over the rows; γ_0 is 1."""
    return np.append(1.0, np.mean(norms_SR[1:] / norms_SR[:-1], axis=1))


def write_ratios(path: Path, ratios: np.ndarray) -> None:
    """A file that a plan's `ratios=` reads: a JSON object with the list `ratios`, one for each step."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"ratios": [round(float(ratio), 6) for ratio in ratios]}) + "\n")
    partial.replace(path)


def read_ratios(path: Path) -> tuple[float, ...]:
    """The ratios in such a file; UserError if it is none."""
    remedy = "measure them with `dit-calibrate magcache`"
    try:
        held = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: expected a file of MagCache's ratios, found {error.strerror}; {remedy}") from None
    except ValueError:
        raise UserError(f"{path}: expected JSON with MagCache's ratios, found something else; {remedy}") from None
    ratios = held.get("ratios") if isinstance(held, dict) else None
    if not isinstance(ratios, list) or not ratios or not all(map(_is_ratio, ratios)):
        raise UserError(f"{path}: expected a list `ratios` of positive numbers, one for each step; {remedy}")
    return tuple(float(ratio) for ratio in ratios)


def _is_ratio(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def parse_magcache(words: Words) -> MagCache:
    """`magcache:0.1:ratios=ratios.json`, `magcache:0.1:k=3:retention=0.2:ratios=ratios.json`."""
    if words.first is None:
        raise words.error("expected a threshold, found none", "write magcache:0.1:ratios=FILE.json")
    threshold = words.as_number("threshold", words.first, low=0, high=math.inf)
    most = words.whole("k", MOST_IN_A_ROW, low=0, high=1000)
    retention = words.number("retention", RETENTION, low=0, high=1)
    file = words.option("ratios")
    words.finish()
    if file is None:
        found = "expected ratios=FILE.json, found none"
        raise words.error(found, "measure them with `dit-calibrate magcache`")
    return MagCache(threshold=threshold, ratios=read_ratios(Path(file)), most_in_a_row=most, retention=retention)
