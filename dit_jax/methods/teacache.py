"""TeaCache: a step whose timestep embedding has hardly changed reuses the trunk's last residual (arXiv 2411.19108).

Relative changes of a signal from step to step are mapped by a polynomial fitted for the model and added up; while the
sum stays below a threshold the trunk is not run. Each row decides for itself.

Shapes: R batch rows (guidance branches included), M tokens, D width, S sampler steps.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import UserError
from dit_jax.flops import Config, Shape, StepAt, StepWork, residual_bytes
from dit_jax.methods.method import Part, Run, RunRecord, Words
from dit_jax.methods.residual import Residual, no_residual, run_or_reuse
from dit_jax.models.flux import FluxConfig
from dit_jax.models.network import Aux, State, Trunk
from dit_jax.ops import mesh as meshes
from dit_jax.sampling.sampler import Guided

FIRST_STEPS_OF_RET = 5  # that always run, in the variant that retains early steps

# The polynomials of TeaCache's authors (Apache-2.0), highest degree first.
POLYNOMIALS = {
    "wan2.1-t2v-1.3b": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan2.1-t2v-14b": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "wan2.1-i2v-480p": (-302.33167, 223.948934, -52.5463970, 5.87348440, -0.201973289),
    "wan2.1-i2v-720p": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    "flux.1": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
}
RET_POLYNOMIALS = {
    "wan2.1-t2v-1.3b": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    "wan2.1-t2v-14b": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
    "wan2.1-i2v-480p": (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
    "wan2.1-i2v-720p": (8107.05460, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
}
IDENTITY = (1.0, 0.0)


class SignalState(NamedTuple):
    """What a step leaves to the next.

    signal    of the last step, [R, ...]
    distance  changes added up since the row last ran [R]
    """

    residual: Residual
    signal: jax.Array
    distance: jax.Array


class Told(NamedTuple):
    """What the cache is told of a step: the threshold [], and whether every row must run []."""

    threshold: jax.Array
    must_run: jax.Array


@dataclass(frozen=True)
class SignalCache:
    """The trunk's cache of TeaCache: `acc += poly(mean|m_i - m_{i-1}| / mean|m_{i-1}|)`, reuse where acc is below the
    threshold; 0 reuses nothing.

    polynomial  coefficients, highest degree first
    projected   whether m is the projected embedding (`cache_signal` of the model)
    """

    polynomial: tuple[float, ...]
    projected: bool = False

    def init(self, model, x_BMD, signal):
        seen = jax.eval_shape(functools.partial(model.cache_signal, projected=self.projected), x_BMD, signal)
        distance = jnp.zeros(x_BMD.shape[0], jnp.float32)
        return State(cache=SignalState(no_residual(x_BMD), _pinned(jnp.zeros(seen.shape, seen.dtype)), distance))

    def __call__(self, trunk: Trunk, x_BMD, state: State):
        before: SignalState = state.cache
        told: Told = trunk.aux.cache
        seen = _pinned(trunk.model.cache_signal(x_BMD, trunk.signal, projected=self.projected))
        change = relative_change(seen, before.signal, trunk.place.valid)
        distance = before.distance + jnp.polyval(jnp.asarray(self.polynomial, jnp.float32), change)
        # Some polynomials have negative values, which are below a threshold of 0 too.
        may_reuse = (before.residual.runs > 0) & ~told.must_run & (told.threshold > 0)
        reuses = may_reuse & (distance < told.threshold)
        x, block_state, residual = run_or_reuse(trunk, x_BMD, state.attention, before.residual, reuses)
        return x, State(block_state, SignalState(residual, seen, jnp.where(reuses, distance, 0)))


def relative_change(signal: jax.Array, before: jax.Array, valid_RM: jax.Array | None) -> jax.Array:
    """mean|m_i - m_{i-1}| / mean|m_{i-1}| of each row [R] in fp32, without the padding of a signal of tokens."""
    signal, before = signal.astype(jnp.float32), before.astype(jnp.float32)
    if signal.ndim == 3 and valid_RM is not None:
        signal, before = (jnp.where(valid_RM[..., None], of_tokens, 0) for of_tokens in (signal, before))
    axes = tuple(range(1, signal.ndim))
    return jnp.mean(jnp.abs(signal - before), axes) / jnp.mean(jnp.abs(before), axes)


def _pinned(signal: jax.Array) -> jax.Array:
    return meshes.constrain_tokens(signal) if signal.ndim == 3 else meshes.constrain_rows(signal)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("threshold", "must_run"), meta_fields=())
@dataclass(frozen=True)
class SignalSteering:
    """Tells the cache its threshold [] and which of the steps must run [S]."""

    threshold: jax.Array
    must_run: jax.Array

    def __call__(self, aux: Aux, seen, step, conditioning) -> Aux:
        return aux._replace(cache=Told(self.threshold, self.must_run[step.index]))


@dataclass(frozen=True, kw_only=True)
class TeaCache:
    """TeaCache as a plan has it.

    threshold  δ, the summed change below which a step is not run
    model      whose polynomial, a key of `POLYNOMIALS`; None for the identity
    ret        the variant that retains early steps: the first five always run, the last one need not
    """

    threshold: float
    model: str | None = None
    ret: bool = False

    name: ClassVar[str] = "teacache"
    solver: ClassVar[str | None] = None

    @property
    def steps(self) -> int | None:
        """Any number of steps."""
        return None

    @property
    def polynomial(self) -> tuple[float, ...]:
        """Coefficients, highest degree first."""
        return IDENTITY if self.model is None else (RET_POLYNOMIALS if self.ret else POLYNOMIALS)[self.model]

    def must_run(self, steps: int) -> np.ndarray:
        """Which steps run whatever the signal does, bool [S]."""
        index = np.arange(steps)
        return index < FIRST_STEPS_OF_RET if self.ret else (index == 0) | (index == steps - 1)

    def check(self, stacks: tuple[int, ...], parts: Mapping[str, Part]) -> None:
        """UserError where the polynomial was fitted for a model of another backbone."""
        backbone = "flux" if len(stacks) > 1 else "wan"
        if self.model is not None and not self.model.startswith(backbone):
            known = [name for name in (RET_POLYNOMIALS if self.ret else POLYNOMIALS) if name.startswith(backbone)]
            raise UserError(
                f"teacache: the polynomial of {self.model} is not for this model: expected one of "
                f"{', '.join(known) or 'none with ret'}; change model= or leave it out"
            )

    def measured(self, record: RunRecord) -> list[float]:
        """The share of the steps that ran the blocks: which ones they were is not kept."""
        ran = sum(int(state.cache.residual.runs) for state in record.states)
        return [ran / record.steps] * record.steps

    def step_work(self, work: StepWork, at: StepAt) -> StepWork:
        """The blocks, by the share of steps that was measured to run them; in every step, if nothing was."""
        share = at.measured.get(self.name, 1.0)
        return work.in_blocks(lambda block: block._replace(share=block.share * share))

    def kept_bytes(self, config: Config, shape: Shape) -> int:
        """The residual and the signal: for FLUX as large again, for Wan a vector or six of every row, in fp32."""
        vectors = shape.rows * config.width * 4 * (6 if self.ret else 1)
        residual = residual_bytes(config, shape)
        return residual + (residual if isinstance(config, FluxConfig) else vectors)

    def applied(self, denoiser: Guided, run: Run) -> Guided:
        steering = SignalSteering(jnp.float32(self.threshold), jnp.asarray(self.must_run(run.steps)))
        call = replace(denoiser.call, cache=SignalCache(self.polynomial, self.ret))
        return replace(denoiser, call=call, steering=(*denoiser.steering, steering))


def parse_teacache(words: Words) -> TeaCache:
    """`teacache:0.1`, `teacache:0.05:model=wan2.1-t2v-1.3b:ret`."""
    if words.first is None:
        raise words.error("expected a threshold, found none", "write teacache:0.1")
    threshold = words.as_number("threshold", words.first, low=0, high=math.inf)
    ret, model = words.flag("ret"), words.option("model")
    words.finish()
    known = RET_POLYNOMIALS if ret else POLYNOMIALS
    if model is not None and model not in known:
        found = f"expected model to be one of {', '.join(known)}, found {model!r}"
        raise words.error(found, "choose the one that was fitted for the model, or leave out model=")
    if model is None:
        warnings.warn(
            f"plan {words.text} names no model that TeaCache's polynomial was fitted for: the signal's own change is "
            "compared with the threshold",
            stacklevel=2,
        )
    return TeaCache(threshold=threshold, model=model, ret=ret)
