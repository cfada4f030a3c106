"""How far a changed denoiser's velocity is from the plain model's at the same noisy latents, those of the plain model's
own runs: far cheaper and less noisy than comparing whole runs.

Shapes: S sampler steps, B samples, T Y X latent grid, C latent channels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.methods.method import Run
from dit_jax.sampling.sampler import Guided
from dit_jax.sampling.solvers import Step
from infer.pipeline import Pipeline
from infer.request import Job


class Visited(NamedTuple):
    """What a run came by: latents and their velocities [S, B, T, Y, X, C], and timesteps [S]."""

    latents: jax.Array
    velocities: jax.Array
    timesteps: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=("guided",), meta_fields=("steps",))
@dataclass(frozen=True, kw_only=True)
class VisitRecorder:
    """A denoiser without a state of its own that keeps all that it sees and says."""

    guided: Guided
    steps: int

    def init(self, latents, before=None):
        every = jnp.zeros((self.steps, *latents.shape), jnp.float32)
        return Visited(every, every, jnp.zeros(self.steps, jnp.float32))

    def __call__(self, latents, state: Visited, step: Step):
        velocity = _velocity(self.guided, latents, step)
        now = (latents, velocity, jnp.float32(step.t))
        return velocity, Visited(*(every.at[step.index].set(one) for every, one in zip(state, now, strict=True)))

    def finish(self, latents):
        return self.guided.finish(latents)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A plain run: its denoiser, what that was run for, and what it came by."""

    denoiser: Guided
    run: Run
    visited: Visited

    def error(self, changed: Guided, index: int) -> float:
        """‖v − v_plain‖₂ / ‖v_plain‖₂ of a changed denoiser at a step of the run."""
        latents, expected, t = (np.asarray(every[index]) for every in self.visited)
        sigma, sigma_next = (jnp.float32(self.run.sigmas[at]) for at in (index, index + 1))
        found = np.asarray(
            _jitted_velocity(changed, latents, Step(jnp.int32(index), sigma, sigma_next, jnp.float32(t)))
        )
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class _TrajectoryWatch:
    trajectory: Trajectory

    def around(self, denoiser: Guided, run: Run) -> VisitRecorder:
        self._denoiser, self._run = denoiser, run
        return VisitRecorder(guided=denoiser, steps=run.steps)

    def finished(self, component: str, state: Any) -> None:
        self.trajectory = Trajectory(denoiser=self._denoiser, run=self._run, visited=state)


def trajectories(pipe: Pipeline, jobs: Sequence[Job]) -> Iterator[Trajectory]:
    """The plain runs of jobs, of a model of one transformer."""
    for job in jobs:
        pipe.denoise(job, watch=(watch := _TrajectoryWatch()))
        yield watch.trajectory


def _velocity(denoiser: Guided, latents: jax.Array, step: Step) -> jax.Array:
    return denoiser(latents, denoiser.init(latents), step)[0]


_jitted_velocity = jax.jit(_velocity)
