"""Renoising: clean predictions with fresh noise at the next level, the same for a request in any batch and segment."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.sampling.sampler import noise, sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import SOLVERS

SOLVER = SOLVERS["renoise"]
SHAPE = (3, 10, 14, 6)
SCHEDULE = SOLVER.schedule(4, Shift(constant=5.0), 100)


class Knows:
    """A denoiser that knows the clean sample."""

    def __init__(self, clean):
        self.clean = clean

    def init(self, latents, before=None):
        return ()

    def __call__(self, latents, state, step):
        return (latents - self.clean) / step.sigma, state

    def finish(self, latents):
        return latents


def run(seeds, clean, first=0, count=4, carry=None):
    denoiser = Knows(clean)
    carry = start(denoiser, SOLVER, noise(np.array(seeds, np.uint32), SHAPE)) if carry is None else carry
    return sample(denoiser, SOLVER, carry, SCHEDULE, jnp.int32(first), count)


def test_levels_are_evenly_spaced_and_shifted_once():
    spaced = np.array([1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(SCHEDULE.sigmas, [*(5 * spaced / (1 + 4 * spaced)), 0], rtol=1e-6)


def test_what_is_known_is_reached_and_noise_on_the_way_is_fresh():
    clean = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    np.testing.assert_allclose(run([3, 4], clean).latents, clean, atol=1e-5)
    seen = [np.asarray(noise(np.array([3, 4], np.uint32), SHAPE))]
    for count in (1, 2, 3):
        sigma = float(SCHEDULE.sigmas[count])
        latents = run([3, 4], clean, count=count).latents
        seen.append(np.asarray((latents - (1 - sigma) * clean) / sigma))
    flat = np.stack(seen).reshape(4, -1)
    np.testing.assert_allclose(flat.std(axis=1), 1, atol=0.06)
    together = np.corrcoef(np.concatenate([flat, np.asarray(clean).reshape(1, -1)]))
    assert np.abs(together - np.eye(5)).max() < 0.1
    samples = np.stack(seen).reshape(8, -1)
    assert np.abs(np.corrcoef(samples) - np.eye(8)).max() < 0.15


def test_a_request_is_the_same_in_a_batch_and_in_segments():
    clean = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    whole = run([3, 4, 5], clean, count=3)
    alone = run([4], clean[1:2], count=3)
    np.testing.assert_allclose(whole.latents[1], alone.latents[0], atol=1e-6)
    half = run([3, 4, 5], clean, count=2)
    np.testing.assert_allclose(run([3, 4, 5], clean, first=2, count=1, carry=half).latents, whole.latents, atol=1e-6)
