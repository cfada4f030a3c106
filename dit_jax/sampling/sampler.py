"""The sampling loop, the only one: a scan over any segment of the trajectory, from any carry.

Shapes: B samples, R batch rows (guidance branches of a sample next to each other), T Y X latent grid, C latent
channels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from dit_jax.models.network import (
    Aux,
    Conditioning,
    NetworkCall,
    State,
    Timesteps,
    Tokens,
    TokenTimesteps,
    layout,
    network,
    unlayout,
)
from dit_jax.ops import mesh as meshes
from dit_jax.sampling.schedules import Schedule
from dit_jax.sampling.solvers import Solver, Step


class Denoiser(Protocol):
    """What the sampler integrates: velocity of latents at a step, with a state of its own.

    `init` makes the state; `before` is what the denoiser of the stage before handed over (`Handing`), or None. `finish`
    is run on the last latents.
    """

    def init(self, latents: jax.Array, before: Any = None) -> Any: ...
    def __call__(self, latents: jax.Array, state: Any, step: Step) -> tuple[jax.Array, Any]: ...
    def finish(self, latents: jax.Array) -> jax.Array: ...


@runtime_checkable
class Handing(Protocol):
    """A denoiser that the next stage's begins from: `handed(state)` is what that needs of its last state, the rest of
    which is gone before the next is made."""

    def handed(self, state: Any) -> Any: ...


def handed_over(denoiser: Denoiser, state: Any) -> Any:
    """What a denoiser leaves to the next stage's: most, nothing."""
    return denoiser.handed(state) if isinstance(denoiser, Handing) else None


class Carry(NamedTuple):
    """All that passes from one step, or segment, to the next; latents are fp32 in the sampler's normalised units."""

    latents: jax.Array
    solver: Any
    denoiser: Any


def start(denoiser: Denoiser, solver: Solver, latents: jax.Array) -> Carry:
    """The carry before step 0."""
    return Carry(latents, solver.init(latents), denoiser.init(latents))


def sample(denoiser: Denoiser, solver: Solver, carry: Carry, schedule: Schedule, first: jax.Array, count: int) -> Carry:
    """Runs steps [first, first + count); `first` may be traced, `count` is static."""

    def one(carry: Carry, index):
        step = Step(index, schedule.sigmas[index], schedule.sigmas[index + 1], schedule.timesteps[index])
        velocity, state = denoiser(carry.latents, carry.denoiser, step)
        latents, memory = solver.step(carry.latents, velocity, step, carry.solver, schedule)
        return Carry(latents, memory, state), None

    schedule = jax.tree.map(jnp.asarray, schedule)
    return jax.lax.scan(one, carry, first + jnp.arange(count))[0]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("model", "conditioning", "guidance_scale", "extra", "held", "steering", "residual"),
    meta_fields=("call", "branches"),
)
@dataclass(frozen=True, kw_only=True)
class Guided:
    """A backbone under classifier-free guidance: v = v_uncond + scale·(v_cond − v_uncond) (Ho & Salimans, arXiv
    2207.12598).

    conditioning   rows of all branches, sample-major: row 2b conditional, 2b + 1 unconditional; one row a sample if
                   `branches` is 1
    guidance_scale scalar or [B]
    extra          [B, T, Y, X, C'] channels that the backbone sees behind the latents (image-to-video), or None
    held           [B, T', Y, X, C] first frames that are known, or None: they take the latents' place at every step and
                   at the end, and their tokens have timestep 0
    steering       pytrees that say, one after the other, what a step is steered by: steer(aux, seen [B, T, Y, X, C],
                   step, conditioning) -> aux
    residual       what is added to the guided velocity: residual([B, T, Y, X, C + C'], t) -> [B, T, Y, X, C], or None
    """

    model: Any
    conditioning: Conditioning
    guidance_scale: jax.Array
    extra: jax.Array | None = None
    held: jax.Array | None = None
    steering: tuple[Any, ...] = ()
    residual: Any = None
    call: NetworkCall = NetworkCall()
    branches: int = 1

    def init(self, latents, before=None):
        if self.call.cache is None:
            return State()

        def seen(latents):
            tokens = self._in_branches(self.tokens(latents))
            t = self._timesteps(jnp.zeros(()), tokens)
            return self.model.embed(tokens.rows), self.model.signal(t, self.conditioning)

        return self.call.cache.init(self.model, *jax.eval_shape(seen, latents))

    def __call__(self, latents, state, step):
        patch, aux = self.model.config.patch, Aux()
        seen = self.finish(latents)
        for steer in self.steering:
            aux = steer(aux, seen, step, self.conditioning)
        rows, state = self.velocity_rows(self.tokens(seen), step, state, aux)
        velocity = unlayout(rows, latents.shape, patch)
        if self.residual is not None:
            velocity = velocity + self.residual(self._with_extra(seen), step.t)
        return velocity, state

    def tokens(self, seen: jax.Array) -> Tokens:
        """Tokens of a sample, of all that the backbone sees."""
        return layout(self._with_extra(seen), self.model.config.patch)

    def _with_extra(self, seen: jax.Array) -> jax.Array:
        return seen if self.extra is None else jnp.concatenate([seen, self.extra], axis=-1)

    def velocity_rows(self, tokens: Tokens, step: Step, state: State = State(), aux: Aux = Aux()):
        """Guided velocity [B, M, P'] of these tokens, and the network's state; the arrays of `aux` have rows of all
        branches."""
        tokens = self._in_branches(tokens)
        t = self._timesteps(step.t, tokens)
        rows, state = network(self.model, self.call, tokens, t, self.conditioning, state, aux)
        if self.branches == 1:
            return rows, state
        conditional, unconditional = rows[0::2], rows[1::2]
        scale = jnp.reshape(self.guidance_scale, (-1, 1, 1))
        return unconditional + scale * (conditional - unconditional), state

    def finish(self, latents):
        """The latents with the held frames in their place."""
        return latents if self.held is None else latents.at[:, : self.held.shape[1]].set(self.held)

    def is_held(self, positions_BM3: Any) -> Any:
        """Which tokens are of held frames [B, M]."""
        held = 0 if self.held is None else self.held.shape[1]
        return positions_BM3[..., 0] * self.model.config.patch[0] < held

    def _in_branches(self, tokens: Tokens) -> Tokens:
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, self.branches, axis=0), tokens)

    def _timesteps(self, t: jax.Array, tokens: Tokens) -> Timesteps:
        t_R = jnp.broadcast_to(t, tokens.rows.shape[:1])
        if self.held is None:
            return t_R
        which = meshes.constrain_tokens(self.is_held(tokens.positions).astype(jnp.int32))
        return TokenTimesteps(jnp.stack([t_R, jnp.zeros_like(t_R)], axis=1), which)


def noise(seeds: Any, shape: tuple[int, ...]) -> jax.Array:
    """Starting noise [B, *shape] in fp32, each sample from the threefry key of its own seed [B], uint32."""

    def of_seed(seed):
        return jax.random.normal(jax.random.key(seed, impl="threefry2x32"), shape, jnp.float32)

    return jax.vmap(of_seed)(seeds)
