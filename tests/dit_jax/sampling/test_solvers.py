"""Solvers and schedules against diffusers' schedulers, on a made-up velocity field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from dit_jax.sampling.sampler import Carry, sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import Euler, UniPC


class Field:
    """A velocity that bends with both x and t, so that an order mixed up shows."""

    def init(self, latents):
        return jnp.zeros((), jnp.int32)

    def __call__(self, latents, calls, step):
        return jnp.sin(3 * latents) + latents * step.t / 700 - 0.3, calls + 1


def velocity(x, t):
    return torch.sin(3 * x) + x * t / 700 - 0.3


def run_diffusers(scheduler, steps, x, **kwargs):
    scheduler.set_timesteps(num_inference_steps=None if kwargs else steps, **kwargs)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t), t, x, return_dict=False)[0]
    return x.numpy()


def run_ours(solver, shift, steps, x, tokens=0, segments=None):
    schedule = solver.schedule(steps, shift, tokens)
    carry, first = start(Field(), solver, jnp.asarray(x)), 0
    run = jax.jit(
        lambda carry, schedule, first, count: sample(Field(), solver, carry, schedule, first, count), static_argnums=3
    )
    for count in segments or [steps]:
        carry, first = run(carry, schedule, first, count), first + count
    assert isinstance(carry, Carry) and carry.denoiser == steps
    return np.asarray(carry.latents), schedule


X = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_unipc(steps, shift):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    expected = run_diffusers(scheduler, steps, torch.tensor(X))
    ours, schedule = run_ours(UniPC(), Shift(constant=shift), steps, X)
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_array_equal(schedule.sigmas, scheduler.sigmas.numpy())
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_unipc_with_dynamic_shift(tokens):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    )
    scheduler.set_timesteps(8, mu=Shift(dynamic=True).mu(tokens))
    schedule = UniPC().schedule(8, Shift(constant=3.0, dynamic=True), tokens)
    np.testing.assert_allclose(schedule.sigmas, scheduler.sigmas.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_with_constant_shift(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    expected = run_diffusers(scheduler, steps, torch.tensor(X))
    ours, schedule = run_ours(Euler(), Shift(constant=shift), steps, X)
    np.testing.assert_allclose(schedule.sigmas, scheduler.sigmas.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [256, 1000, 4096])
def test_euler_with_dynamic_shift(tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = Shift(dynamic=True).mu(tokens)
    expected = run_diffusers(scheduler, 7, torch.tensor(X), sigmas=np.linspace(1, 1 / 7, 7), mu=mu)
    ours, schedule = run_ours(Euler(), Shift(dynamic=True), 7, X, tokens)
    np.testing.assert_allclose(schedule.sigmas, scheduler.sigmas.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_dynamic_shift_grows_evenly_with_the_tokens():
    """From 1/2 at 256 of them to 1.15 at 4,096, as FLUX's pipelines have it."""
    np.testing.assert_allclose(
        [Shift(dynamic=True).mu(n) for n in (256, 1024, 4096, 8192)], [0.5, 0.63, 1.15, 1.8433333]
    )
    other = Shift(dynamic=True, low=0.2, high=0.9, low_tokens=100, high_tokens=300)
    np.testing.assert_allclose([other.mu(n) for n in (100, 200, 300)], [0.2, 0.55, 0.9])
    assert Shift(dynamic=True).scale(4096) == pytest.approx(np.exp(1.15))
    assert Shift(constant=3.0).scale(4096) == 3


@pytest.mark.parametrize("solver", [Euler(), UniPC()])
def test_segments_equal_one_scan(solver):
    whole, _ = run_ours(solver, Shift(constant=3.0), 9, X)
    parts, _ = run_ours(solver, Shift(constant=3.0), 9, X, segments=[2, 3, 4])
    np.testing.assert_array_equal(parts, whole)
