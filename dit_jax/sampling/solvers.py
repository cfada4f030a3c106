"""Solvers of the flow ODE. A solver is static; its state is a pytree that the sampler carries from step to step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.sampling.schedules import TRAIN_STEPS, Schedule, Shift, euler_sigmas, unipc_sigmas


class Step(NamedTuple):
    """One step of the trajectory: its global index, σ before and after it, the model's timestep."""

    index: jax.Array  # type: ignore[assignment]
    sigma: jax.Array
    sigma_next: jax.Array
    t: jax.Array


class Solver(Protocol):
    """`schedule` on the host; `init` and `step` inside the program."""

    def schedule(self, steps: int, shift: Shift, tokens: int) -> Schedule: ...
    def init(self, latents: jax.Array) -> Any: ...
    def step(self, latents: jax.Array, velocity: jax.Array, step: Step, state: Any, schedule: Schedule) -> tuple: ...


@dataclass(frozen=True)
class Euler:
    """x ← x + v·(σ_next − σ)."""

    def schedule(self, steps: int, shift: Shift, tokens: int) -> Schedule:
        """`tokens` matters to a dynamic shift alone."""
        sigmas = euler_sigmas(steps, shift, tokens)
        return Schedule(sigmas, sigmas[:-1] * np.float32(TRAIN_STEPS), np.zeros((steps, 0), np.float32))

    def init(self, latents):
        return ()

    def step(self, latents, velocity, step, state, schedule):
        return latents + velocity * (step.sigma_next - step.sigma), state


class UniPCState(NamedTuple):
    """The last corrected sample, and the clean predictions of the last two steps."""

    sample: jax.Array
    clean: jax.Array
    clean_before: jax.Array


@dataclass(frozen=True)
class UniPC:
    """UniPC of order 2 with B(h) = e^h − 1 and a corrector (arXiv 2302.04867), as diffusers runs it for Wan.

    Corrector and predictor are linear in the samples and clean predictions they use; `schedule` computes their eight
    coefficients a step in fp64, so that the program holds no logarithm of a σ that may be 0.
    """

    def schedule(self, steps: int, shift: Shift, tokens: int) -> Schedule:
        """`tokens` matters to a dynamic shift alone."""
        sigmas = unipc_sigmas(steps, shift, tokens)
        # The originals pass the timesteps through an integer type.
        timesteps = np.trunc(sigmas * TRAIN_STEPS).astype(np.float32)
        rounded = np.append(sigmas, 0).astype(np.float32)
        return Schedule(rounded, timesteps, _coefficients(rounded.astype(np.float64)))

    def init(self, latents):
        return UniPCState(*(jnp.zeros_like(latents) for _ in range(3)))  # three buffers, so that they can be donated

    def step(self, latents, velocity, step, state, schedule):
        same, c_sample, c_clean, c_before, c_now, p_sample, p_now, p_clean = schedule.coefficients[step.index]
        clean = latents - step.sigma * velocity
        corrected = (
            same * latents
            + c_sample * state.sample
            + c_clean * state.clean
            + c_before * state.clean_before
            + c_now * clean
        )
        predicted = p_sample * corrected + p_now * clean + p_clean * state.clean
        return predicted, UniPCState(corrected, clean, state.clean)


def _coefficients(sigmas: np.ndarray) -> np.ndarray:
    """[S, 8]: of the corrector on (latents, last sample, clean of the last step, of the one before, clean now), then of
    the predictor on (corrected sample, clean now, clean of the last step)."""
    steps = len(sigmas) - 1
    orders = [min(2, index + 1, steps - index) for index in range(steps)]
    rows = []
    for index in range(steps):
        corrector = (1, 0, 0, 0, 0) if index == 0 else (0, *_corrector(sigmas, index, orders[index - 1]))
        rows.append((*corrector, *_predictor(sigmas, index, orders[index])))
    return np.asarray(rows, np.float32)


def _log_snr(sigma: float) -> float:
    return np.inf if sigma == 0 else np.log1p(-sigma) - np.log(sigma)


def _predictor(sigmas: np.ndarray, index: int, order: int) -> tuple[float, float, float]:
    """From step `index` to the next: coefficients of (sample, clean here, clean one step before)."""
    here, there = sigmas[index], sigmas[index + 1]
    h = _log_snr(there) - _log_snr(here)
    weight = -(1 - there) * np.expm1(-h)
    if order == 1:
        return there / here, weight, 0.0
    ratio = (_log_snr(sigmas[index - 1]) - _log_snr(here)) / h
    slope = weight / (2 * ratio)
    return there / here, weight - slope, slope


def _corrector(sigmas: np.ndarray, index: int, order: int) -> tuple[float, float, float, float]:
    """The sample at `index` again, from the step before: coefficients of (its sample, its clean, clean before it, clean
    now)."""
    before, here = sigmas[index - 1], sigmas[index]
    h = _log_snr(here) - _log_snr(before)
    weight = -(1 - here) * np.expm1(-h)
    if order == 1:
        return here / before, weight / 2, 0.0, weight / 2
    ratio = (_log_snr(sigmas[index - 2]) - _log_snr(before)) / h
    b_h = np.expm1(-h)
    phi = b_h / -h - 1
    right = np.array([phi / b_h, 2 * (phi / -h - 0.5) / b_h])
    rho_before, rho_now = np.linalg.solve(np.array([[1.0, 1.0], [ratio, 1.0]]), right)
    slope = weight * rho_before / ratio
    return here / before, weight * (1 - rho_now) - slope, slope, weight * rho_now


@dataclass(frozen=True)
class Renoise:
    """x ← (1 − σ_next)·x0 + σ_next·ε with x0 = x − σ·v and fresh noise ε: how students of few steps are run
    (Self-Forcing, arXiv 2506.08009).

    A sample's noise comes from a key that its starting noise gives, so that a request has the same in any batch.
    """

    def schedule(self, steps: int, shift: Shift, tokens: int) -> Schedule:
        """σ spaced evenly from 1 to 1/S and shifted once."""
        spaced = Shift(**{**asdict(shift), "to_last_step": True})
        return Euler().schedule(steps, spaced, tokens)

    def init(self, latents):
        return jax.lax.bitcast_convert_type(latents.reshape(len(latents), -1)[:, :2], jnp.uint32)

    def step(self, latents, velocity, step, state, schedule):
        def fresh(key, sample):
            key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step.index)
            return jax.random.normal(key, sample.shape, jnp.float32)

        clean = latents - step.sigma * velocity
        noise = jax.vmap(fresh)(state, latents)
        return (1 - step.sigma_next) * clean + step.sigma_next * noise, state


SOLVERS: dict[str, Solver] = {"unipc": UniPC(), "euler": Euler(), "renoise": Renoise()}
