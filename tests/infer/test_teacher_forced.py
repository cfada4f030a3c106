"""Errors at the plain model's own noisy latents."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import load_pipeline
from infer.request import Request
from infer.teacher_forced import trajectories

STEPS = 3


@pytest.fixture(scope="module")
def plain(text_to_video):
    """A plain run of a tiny model, and its final latents."""
    pipe = load_pipeline(text_to_video[0])
    job = pipe.prepare(Request(prompt="a red cat runs", size=(64, 48), frames=5, steps=STEPS, solver="euler", seed=3))
    [found] = trajectories(pipe, [job])
    return found, pipe.denoise(job)


def test_a_run_is_kept_step_by_step(plain):
    found, final = plain
    latents, velocities, timesteps = map(np.asarray, found.visited)
    sigmas = np.asarray(found.run.sigmas)
    after = latents + velocities * np.diff(sigmas).reshape(-1, 1, 1, 1, 1, 1)
    np.testing.assert_allclose(after[:-1], latents[1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after[-1], final, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(timesteps, 1000 * sigmas[:-1], rtol=1e-5)


def test_the_plain_model_has_no_error_and_silence_has_all_of_it(plain):
    found, _ = plain
    silent = replace(found.denoiser, model=jax.tree.map(jnp.zeros_like, found.denoiser.model))
    for index in range(STEPS):
        assert found.error(found.denoiser, index) < 1e-5
        assert found.error(silent, index) == pytest.approx(1)


def test_an_error_is_relative_and_of_that_step(plain):
    """With guidance scales 3 and 1 the velocity is v₁ + 2·(v_c − v_u): halfway up to it lies half the error."""
    found, _ = plain
    at = [
        [found.error(replace(found.denoiser, guidance_scale=jnp.float32(scale)), step) for scale in (1, 3)]
        for step in range(STEPS)
    ]
    usual = float(found.denoiser.guidance_scale)
    assert all(far / near == pytest.approx((usual - 1) / (usual - 3), rel=1e-3) for far, near in at)
    assert len({round(far, 4) for far, _ in at}) == STEPS
