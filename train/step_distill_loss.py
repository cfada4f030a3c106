"""Distribution matching of a student of few steps (Self-Forcing, arXiv 2506.08009, after DMD, arXiv 2311.18828), which
is also PARE's stage III (arXiv 2605.27336).

The student's own pictures are moved from where a fake score, trained on them, says that they come from, to where the
teacher says that they should.

Shapes: B samples, T Y X latent grid, C latent channels, S steps of the student.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import UserError
from dit_jax.methods.routing import Router, Routing
from dit_jax.models.network import Aux
from dit_jax.sampling.schedules import TRAIN_STEPS, shifted
from train.losses import (
    Batch,
    FlowSettings,
    Metrics,
    Models,
    Noised,
    at_levels,
    frame_levels,
    held_frames,
    held_samples,
    mean_square,
    noised,
    predicted,
    sample_means,
)
from train.pare_loss import active_blocks, router_gates

LEAST_DISTANCE = 1e-6  # of a picture to the real score's, which the gradient is divided by


@dataclass(frozen=True, kw_only=True)
class StepDistillSettings:
    """Settings of both updates.

    timesteps       at which the student is run, before the shift
    shift           of these towards noise, as in the sampler
    guidance_scale  of the real score
    flow            noise levels at which the scores are compared, and how the networks are called
    routing         how many blocks a routed student runs
    """

    timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0
    guidance_scale: float = 3.0
    flow: FlowSettings = field(default_factory=lambda: FlowSettings(shift=5.0))
    routing: Routing = field(default_factory=Routing)

    @property
    def levels(self) -> np.ndarray:
        """Noise levels at which the student is run [S]."""
        return shifted(np.asarray(self.timesteps) / TRAIN_STEPS, self.shift).astype(np.float32)


def step_distill(
    trained: Models, frozen: Models, batch: Batch, key: jax.Array, *, settings: StepDistillSettings
) -> tuple[jax.Array, Metrics]:
    """The student's update: L = 0.5·|x − sg(x − g)|², the mean over elements; its gradient at x is g over their number.

    x is the student's clean prediction, g (`matching_gradient`) is of two clean predictions at one more random noise
    level: of frozen["teacher"] under guidance, for which the batch tells `empty_text` [B, L, E] (and `empty_pooled`
    [B, E']), and of frozen["fake"]. trained["student"], and trained["router"] (or a frozen one) if it is routed.
    """
    rollout_key, noise_key = jax.random.split(key)
    held = held_samples(key, batch["latents"].shape, settings.flow)
    clean, gates = rolled_out(trained, frozen, batch, rollout_key, settings, held)
    at = noised(jax.lax.stop_gradient(clean), noise_key, settings.flow, held)
    real = clean_of(at, guided(frozen["teacher"], at, batch, settings))
    fake = clean_of(at, predicted(frozen["fake"], at, batch, settings.flow.call)[0])
    gradient = jax.lax.stop_gradient(matching_gradient(clean, real, fake, held))
    loss = 0.5 * mean_square(clean - jax.lax.stop_gradient(clean - gradient), held)
    told = {"real_distance": mean_square(clean - real, held), "fake_distance": mean_square(clean - fake, held)}
    told |= active_blocks(gates)
    return loss, {"loss_distribution": loss} | jax.lax.stop_gradient(told)


def fake_score(
    trained: Models, frozen: Models, batch: Batch, key: jax.Array, *, settings: StepDistillSettings
) -> tuple[jax.Array, Metrics]:
    """The fake score's update: flow matching of trained["fake"] on clean predictions of frozen["student"] (and
    "router", if it is routed)."""
    rollout_key, noise_key = jax.random.split(key)
    held = held_samples(key, batch["latents"].shape, settings.flow)
    clean = jax.lax.stop_gradient(rolled_out({}, frozen, batch, rollout_key, settings, held)[0])
    at = noised(clean, noise_key, settings.flow, held)
    loss = mean_square(predicted(trained["fake"], at, batch, settings.flow.call)[0] - at.velocity, held)
    return loss, {"loss_fake": loss}


def rolled_out(
    trained: Models,
    frozen: Models,
    batch: Batch,
    key: jax.Array,
    settings: StepDistillSettings,
    held: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The student's clean prediction [B, T, Y, X, C] at a random one of its steps, the same for the batch, and its
    gates there [B, G].

    It starts from noise; from each step to the next its clean prediction gets fresh noise. The first frames of samples
    that are `held` [B] are the batch's from beginning to end. The gradient goes through the last step that is run and
    no other.
    """
    models = {**frozen, **trained}
    student, router = models["student"], models.get("router")
    step_key, noise_key = jax.random.split(key)
    levels, shape = jnp.asarray(settings.levels), batch["latents"].shape
    last = jax.random.randint(step_key, (), 0, len(levels))

    def noisy(clean: jax.Array, step: jax.Array) -> Noised:
        noise = jax.random.normal(jax.random.fold_in(noise_key, step), shape)
        return at_levels(clean, noise, jnp.full(shape[0], levels[step]), held)

    def before(step: jax.Array, clean: jax.Array) -> jax.Array:
        return clean_prediction(*jax.lax.stop_gradient((student, router)), noisy(clean, step), batch, settings)[0]

    # Where it begins, at σ = 1, nothing is left of what is noised.
    start = jnp.zeros(shape)
    if held is not None:
        given = held_frames(held, shape[1])[..., None, None, None]
        start = jnp.where(given, batch["latents"].astype(jnp.float32), start)
    clean = jax.lax.fori_loop(0, last, before, start)
    return clean_prediction(student, router, noisy(clean, last), batch, settings)


def clean_prediction(
    student, router: Router | None, at: Noised, batch: Batch, settings: StepDistillSettings
) -> tuple[jax.Array, jax.Array | None]:
    """x0 = x_σ − σ·v of a student without guidance, gated by its router if it has one, and the gates [B, G]."""
    gates = None if router is None else router_gates(router, at, batch, settings.routing)
    return clean_of(at, predicted(student, at, batch, settings.flow.call, Aux(gates=gates))[0]), gates


def clean_of(at: Noised, velocity: jax.Array) -> jax.Array:
    """x0 = x_σ − σ·v; frames that are held as they are."""
    return at.latents - frame_levels(at.levels, at.held, at.latents.shape[1]) * velocity


def guided(teacher, at: Noised, batch: Batch, settings: StepDistillSettings) -> jax.Array:
    """Velocity under guidance, v_empty + scale·(v − v_empty), as the sampler has it; UserError for a batch without the
    empty caption."""
    velocity, _ = predicted(teacher, at, batch, settings.flow.call)
    if settings.guidance_scale == 1:
        return velocity
    needed = [f"empty_{name}" for name in ("text", "pooled") if name in batch]
    missing = [name for name in needed if name not in batch]
    if missing:
        raise UserError(
            f"guidance of {settings.guidance_scale:g} on the real score needs {missing[0]}, found a batch of "
            f"{', '.join(sorted(batch))}: add the empty caption's embedding, or set guidance_scale=1"
        )
    told = {**batch} | {name.removeprefix("empty_"): batch[name] for name in needed}
    empty, _ = predicted(teacher, at, told, settings.flow.call)
    return empty + settings.guidance_scale * (velocity - empty)


def matching_gradient(clean: jax.Array, real: jax.Array, fake: jax.Array, held: jax.Array | None = None) -> jax.Array:
    """g = (p_real − p_fake) / mean|x − x0_real|, with p = x − x0 of each score; the mean is of a sample's elements,
    without its first frame where that is held [B]."""
    p_real, p_fake = clean - real, clean - fake
    size = sample_means(jnp.abs(p_real), held)[:, None, None, None, None]
    return (p_real - p_fake) / jnp.maximum(size, LEAST_DISTANCE)
