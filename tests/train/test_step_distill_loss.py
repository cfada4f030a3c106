"""Distribution matching against PyTorch autograd and its equations in NumPy."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_twins import (
    as_jax,
    batch_of,
    counted_mean,
    gradients_of,
    relative,
    router_gates,
    router_of,
    told_levels,
    torch_leaves,
    twin,
    use_rounded_frequencies,
    velocity,
)

from dit_jax.config import UserError
from dit_jax.methods.routing import Routing
from train.losses import FlowSettings, at_levels, held_samples, noised
from train.step_distill_loss import StepDistillSettings, fake_score, matching_gradient, step_distill

LIMITS = (2, 3)  # blocks of a routed student, at t = 0 and at t = 1000
SETTINGS = StepDistillSettings(routing=Routing(least=LIMITS[0], most=LIMITS[1]))
LEVELS = np.float32([1, 5 * 0.75 / 4, 5 * 0.5 / 3, 5 * 0.25 / 2])  # of t = 1000, 750, 500, 250, shifted by 5
HOLDING = replace(SETTINGS, flow=FlowSettings(shift=5.0, first_frame_conditioning=0.5))
SHAPES = {"wan": (2, 3, 6, 10, 4), "flux": (2, 1, 8, 10, 4)}


@pytest.fixture(autouse=True)
def _frequencies(monkeypatch):
    use_rounded_frequencies(monkeypatch)


@partial(jax.jit, static_argnames=("loss", "settings"))
def ours(loss, trained, frozen, batch, key, settings=SETTINGS):
    return jax.value_and_grad(loss, has_aux=True)(trained, frozen, batch, key, settings=settings)


def last_step(key) -> int:
    return int(jax.random.randint(jax.random.split(jax.random.split(key)[0])[0], (), 0, 4))


def key_of(step: int) -> jax.Array:
    """A key whose roll-out ends at this step."""
    return next(key for key in map(jax.random.key, range(100)) if last_step(key) == step)


def holding(batch, held):
    """What puts the first frames of the batch into those of samples that are held."""
    given, which = torch.tensor(batch["latents"]), torch.zeros(batch["latents"].shape, dtype=torch.bool)
    if held is not None:
        which[torch.tensor(np.asarray(held)), 0] = True
    return lambda latents: torch.where(which, given, latents)


def torch_rollout(kind, batch, key, leaves=None, held=None):
    """The student's clean prediction at the last step of its roll-out; autograd sees that step alone."""
    noise_key = jax.random.split(jax.random.split(key)[0])[1]
    student, clean, hold = twin(kind, 1), torch.zeros(SHAPES[kind]), holding(batch, held)
    for step in range(last_step(key) + 1):
        noise = torch.tensor(np.asarray(jax.random.normal(jax.random.fold_in(noise_key, step), SHAPES[kind])))
        level = float(LEVELS[step])
        noisy, levels = hold((1 - level) * clean.detach() + level * noise), np.full(2, LEVELS[step])
        told = told_levels(at_levels(jnp.zeros(SHAPES[kind]), noise.numpy(), jnp.asarray(levels), held), noisy.shape)
        gates = None if leaves is None else router_gates(leaves, kind, noisy, levels, batch, LIMITS)
        with torch.set_grad_enabled(step == last_step(key)):
            clean = hold(noisy - level * velocity(student, noisy, told, batch, gates)[0])
    return clean


def torch_scores(kind, batch, key, clean, held=None):
    """(noisy latents, levels [B], the true velocity, clean predictions of the guided teacher and of the fake score)."""
    at = noised(jnp.asarray(clean.detach().numpy()), jax.random.split(key)[1], SETTINGS.flow, held)
    noisy, levels, hold = torch.tensor(np.asarray(at.latents)), told_levels(at, clean.shape), holding(batch, held)
    empty = batch | {name: batch[f"empty_{name}"] for name in ("text", "pooled") if name in batch}
    found = velocity(twin(kind, 2), noisy, levels, batch)[0]
    with torch.no_grad():
        told, untold = (velocity(twin(kind, 0), noisy, levels, of)[0] for of in (batch, empty))
    scale = torch.tensor(np.asarray(at.levels))[:, None, None, None, None]
    real, fake = hold(noisy - scale * (untold + 3 * (told - untold))), hold(noisy - scale * found.detach())
    return torch.tensor(np.asarray(at.velocity)), found, real, fake


@pytest.mark.parametrize(("kind", "step"), [("wan", 2), ("flux", 0), pytest.param("flux", 3, marks=pytest.mark.long)])
@pytest.mark.parametrize("routed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_students_update_is_pytorchs(kind, step, routed):
    batch, key = batch_of(kind, empty=True), key_of(step)
    trained = {"student": twin(kind, 1).model} | ({"router": router_of(kind)} if routed else {})
    frozen = {"teacher": twin(kind, 0).model, "fake": twin(kind, 2).model}
    (loss, metrics), gradients = ours(step_distill, trained, frozen, as_jax(batch), key)

    leaves = torch_leaves(router_of(kind)) if routed else None
    clean = torch_rollout(kind, batch, key, leaves)
    _, _, real, fake = torch_scores(kind, batch, key, clean)
    x = clean.detach()
    g = ((x - real) - (x - fake)) / (x - real).abs().mean((1, 2, 3, 4), keepdim=True)
    expected = 0.5 * (clean - (x - g)).square().mean()
    expected.backward()
    assert relative(loss, expected.detach()) <= 1e-4 and relative(metrics["loss_distribution"], loss) == 0
    assert relative(gradients["student"], twin(kind, 1).gradients()) <= 1e-4
    if routed:
        assert relative(gradients["router"], gradients_of(leaves)) <= 1e-4
    x64, r64, f64 = (each.numpy().astype(np.float64) for each in (x, real, fake))
    slow = np.stack([(f - r) / np.mean(np.abs(x - r)) for x, r, f in zip(x64, r64, f64, strict=True)])
    assert relative(metrics["loss_distribution"], 0.5 * np.mean(slow**2)) <= 1e-4
    assert relative(metrics["real_distance"], np.mean((x64 - r64) ** 2)) <= 1e-4
    assert relative(metrics["fake_distance"], np.mean((x64 - f64) ** 2)) <= 1e-4
    # A roll-out that ends at another step is the same program.
    programs = ours._cache_size()
    ours(step_distill, trained, frozen, as_jax(batch), key_of(1))
    assert ours._cache_size() == programs


@pytest.mark.parametrize(("kind", "routed"), [("wan", True), pytest.param("flux", False, marks=pytest.mark.long)])
def test_the_fake_scores_update_is_pytorchs(kind, routed):
    batch, key = batch_of(kind, empty=True), key_of(1)
    frozen = {"student": twin(kind, 1).model} | ({"router": router_of(kind)} if routed else {})
    (loss, metrics), gradients = ours(fake_score, {"fake": twin(kind, 2).model}, frozen, as_jax(batch), key)
    clean = torch_rollout(kind, batch, key, torch_leaves(router_of(kind)) if routed else None).detach()
    truth, found, _, _ = torch_scores(kind, batch, key, clean)
    expected = (found - truth).square().mean()
    expected.backward()
    assert relative(loss, expected.detach()) <= 1e-4 and metrics["loss_fake"] == loss
    assert relative(gradients["fake"], twin(kind, 2).gradients()) <= 1e-4
    twin(kind, 1).gradients()
    slow = np.mean((found.detach().numpy().astype(np.float64) - truth.numpy()) ** 2)
    assert relative(metrics["loss_fake"], slow) <= 1e-4


@pytest.mark.parametrize("step", [2, pytest.param(0, marks=pytest.mark.long)])
def test_both_updates_with_first_frames_that_are_held_are_pytorchs(step):
    batch, key = batch_of("wan", empty=True), key_of(step)
    student, teacher, fake = (twin("wan", seed).model for seed in (1, 0, 2))
    held = held_samples(key, SHAPES["wan"], HOLDING.flow)
    assert sorted(held.tolist()) == [False, True]
    frozen = {"teacher": teacher, "fake": fake}
    (loss, metrics), gradients = ours(step_distill, {"student": student}, frozen, as_jax(batch), key, HOLDING)

    clean = torch_rollout("wan", batch, key, held=held)
    truth, found, real, fakes = torch_scores("wan", batch, key, clean, held)
    x = clean.detach()
    assert (x[:, 0] == torch.tensor(batch["latents"])[:, 0])[np.asarray(held)].all()
    sizes = torch.stack([counted_mean((x - real).abs()[[row]], [held[row]]) for row in range(2)])
    g = (fakes - real) / sizes[:, None, None, None, None]
    expected = 0.5 * counted_mean((clean - (x - g)).square(), held)
    expected.backward()
    assert relative(loss, expected.detach()) <= 1e-4
    assert relative(gradients["student"], twin("wan", 1).gradients()) <= 1e-4
    for name, other in (("real_distance", real), ("fake_distance", fakes)):
        assert relative(metrics[name], counted_mean((x - other).square(), held)) <= 1e-4

    (loss, _), gradients = ours(fake_score, {"fake": fake}, {"student": student}, as_jax(batch), key, HOLDING)
    expected = counted_mean((found - truth).square(), held)
    expected.backward()
    assert relative(loss, expected.detach()) <= 1e-4
    assert relative(gradients["fake"], twin("wan", 2).gradients()) <= 1e-4


def test_timesteps_are_shifted():
    np.testing.assert_allclose(SETTINGS.levels, LEVELS, rtol=1e-6)
    np.testing.assert_allclose(SETTINGS.levels * 1000, [1000, 937.5, 833.3333, 625], rtol=1e-6)


def test_equal_scores_leave_the_student_as_it_is():
    batch, teacher = as_jax(batch_of("wan")), twin("wan", 0).model
    plain = replace(SETTINGS, guidance_scale=1.0)
    trained, frozen = {"student": twin("wan", 1).model}, {"teacher": teacher, "fake": teacher}
    (loss, metrics), gradients = ours(step_distill, trained, frozen, batch, key_of(0), plain)
    assert loss == 0 and metrics["real_distance"] > 0.1
    assert all((leaf == 0).all() for leaf in map(np.asarray, jax.tree.leaves(gradients)))
    with pytest.raises(UserError, match="guidance of 3 on the real score needs empty_text, found a batch of l"):
        ours(step_distill, trained, frozen, batch, key_of(0), SETTINGS)


def test_the_gradient_is_divided_by_each_samples_own_distance():
    x, real, fake = np.random.default_rng(0).standard_normal((3, 2, 1, 3, 3, 2)).astype(np.float32)
    real[1] *= 100
    found = matching_gradient(jnp.asarray(x), jnp.asarray(real), jnp.asarray(fake))
    for sample in range(2):
        p_real, p_fake = x[sample] - real[sample], x[sample] - fake[sample]
        np.testing.assert_allclose(found[sample], (p_real - p_fake) / np.mean(np.abs(p_real)), rtol=1e-4, atol=1e-6)
    assert np.isfinite(matching_gradient(jnp.asarray(x), jnp.asarray(x), jnp.asarray(fake))).all()


def test_a_roll_out_ends_at_every_step():
    assert {last_step(jax.random.key(seed)) for seed in range(40)} == {0, 1, 2, 3}
