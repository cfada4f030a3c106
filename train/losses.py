"""What training minimises. Losses are means over the batch, with a dict of scalars to report.

Here are flow matching and what every loss of a transformer shares, and the autoencoder's; distillation has files of its
own (`pare_loss`, `coredit_loss`, `ddit_loss`, `step_distill_loss`).

Shapes: B batch, T Y X frames and pixels or latent grid, C channels, L text tokens, E text width, I image tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.lora import beside
from dit_jax.models.network import Aux, Conditioning, NetworkCall, State, layout, network, unlayout
from dit_jax.sampling.schedules import TRAIN_STEPS, shifted

Models = Mapping[str, Any]
"""Models (or other pytrees) by what they are to a loss: `student`, `teacher`, `router`."""

Batch = Mapping[str, jax.Array]
"""Arrays of B samples by name: `latents` [B, T, Y, X, C], normalised, and what a transformer is told (`predicted`)."""

Metrics = dict[str, jax.Array]

TOLD_GUIDANCE = 3.5  # what a guidance-distilled model is told where the batch does not say


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """Noise levels are logit-normal, then shifted towards noise: level ← shift·level / (1 + (shift − 1)·level)."""

    shift: float = 3.0
    spread: float = 1.0
    call: NetworkCall = field(default_factory=NetworkCall)


@dataclass(frozen=True, kw_only=True)
class AutoencoderWeights:
    """Weights of the autoencoder's losses; pixels run from -1 to 1."""

    absolute: float = 1.0
    squared: float = 4.0
    edges: float = 0.3
    divergence: float = 5e-4


def noise_levels(key: jax.Array, batch: int, settings: FlowSettings) -> jax.Array:
    """Noise levels in (0, 1), [B], spread evenly over the batch (one in each of B equal quantiles)."""
    offset = jax.random.uniform(key, ())
    quantiles = (jnp.arange(batch) + offset) / batch
    levels = jax.nn.sigmoid(settings.spread * jax.scipy.special.ndtri(jnp.clip(quantiles, 1e-4, 1 - 1e-4)))
    return shifted(levels, settings.shift)


class Noised(NamedTuple):
    """Latents at noise levels σ [B]: x_σ = (1 − σ)·x0 + σ·ε, and the velocity there, ε − x0, [B, T, Y, X, C] each."""

    latents: jax.Array
    velocity: jax.Array
    levels: jax.Array


def noised(latents: jax.Array, key: jax.Array, settings: FlowSettings) -> Noised:
    """Latents with random noise at random levels, in fp32."""
    level_key, noise_key = jax.random.split(key)
    levels = noise_levels(level_key, latents.shape[0], settings)
    return at_levels(latents, jax.random.normal(noise_key, latents.shape), levels)


def at_levels(latents: jax.Array, noise: jax.Array, levels: jax.Array) -> Noised:
    """Latents with this noise at these levels [B], in fp32."""
    latents, weight = latents.astype(jnp.float32), per_sample(levels)
    return Noised((1 - weight) * latents + weight * noise, noise - latents, levels)


def per_sample(values_B: jax.Array) -> jax.Array:
    """Numbers of each sample [B] beside its latents [B, 1, 1, 1, 1]."""
    return values_B[:, None, None, None, None]


def predicted(
    model,
    at: Noised,
    batch: Batch,
    call: NetworkCall = NetworkCall(),
    aux: Aux = Aux(),
    state: State = State(),
) -> tuple[jax.Array, State]:
    """(the velocity [B, T, Y, X, C] that a transformer predicts, the state of its network).

    It is told, of the batch, `text` [B, L, E], and where they are there `pooled` [B, E'], `image` [B, I, E'] ([B, 2, I,
    E'] of a first and a last one), `guidance` [B], and `extra` [B, T, Y, X, C'], channels behind the latents. `origin`
    [B, 3] is where the first token of latents lies that are windows of larger ones, (t, y, x) in tokens.
    """
    patch, told = model.config.patch, conditioning_of(batch)
    if getattr(model.config, "guidance", False) and told.guidance is None:
        told = told._replace(guidance=jnp.full(at.levels.shape, TOLD_GUIDANCE))
    tokens = layout(with_extra(at.latents, batch), patch)
    if "origin" in batch:
        tokens = tokens._replace(positions=tokens.positions + batch["origin"][:, None])
    rows, state = network(model, call, tokens, at.levels * TRAIN_STEPS, told, state, aux)
    return unlayout(rows, at.latents.shape, patch), state


def with_extra(latents: jax.Array, batch: Batch) -> jax.Array:
    """All that a backbone sees: the latents, and the batch's `extra` channels behind them."""
    if "extra" not in batch:
        return latents
    return jnp.concatenate([latents, batch["extra"].astype(latents.dtype)], axis=-1)


def mean_square(error: jax.Array) -> jax.Array:
    """Mean over all elements, in fp32."""
    return jnp.mean(jnp.square(error.astype(jnp.float32)))


def flow_matching(model, batch: Batch, key: jax.Array, settings: FlowSettings):
    """Mean squared error of the velocity (noise − data) at a random noise level (Lipman et al., arXiv 2210.02747).

    `batch` has `latents` [B, T, Y, X, C], normalised, and what the model is told (`predicted`).
    """
    at = noised(batch["latents"], key, settings)
    velocity, _ = predicted(model, at, batch, settings.call)
    error = jnp.mean(jnp.square(velocity - at.velocity), axis=(1, 2, 3, 4))
    low = at.levels < 0.5
    return jnp.mean(error), {
        "loss_low_noise": jnp.sum(error * low) / jnp.maximum(1, jnp.sum(low)),
        "loss_high_noise": jnp.sum(error * ~low) / jnp.maximum(1, jnp.sum(~low)),
    }


def finetune(trained: Models, frozen: Models, batch: Batch, key: jax.Array, *, settings: FlowSettings):
    """`flow_matching` in the form of the losses of distillation: of trained["student"], or of frozen["student"] with
    trained["lora"] (a `Lora`) beside it, whose alpha and rank get no gradient."""
    student = beside(frozen["student"], trained["lora"]) if "lora" in trained else trained["student"]
    return flow_matching(student, batch, key, settings)


def conditioning_of(told: Batch) -> Conditioning:
    """What a transformer is told, from the array `text` and perhaps `pooled`, `image` and `guidance`, in fp32."""
    pooled, image, guidance = (
        told[name].astype(jnp.float32) if name in told else None for name in ("pooled", "image", "guidance")
    )
    # The states of a first and a last image lie behind each other in rows of their own.
    image = None if image is None else image.reshape(-1, *image.shape[-2:])
    return Conditioning(told["text"].astype(jnp.float32), image, pooled, guidance)


def autoencoding(vae, batch: dict[str, jax.Array], key: jax.Array, weights: AutoencoderWeights):
    """Reconstruction of `video` uint8 [B, T, Y, X, 3] from a sampled latent: absolute, squared and edge errors.

    With the divergence of the latents' distribution from the standard normal (Kingma and Welling, arXiv 1312.6114).
    """
    video = pixels(batch["video"])
    mean, log_variance = vae.encode(video)
    log_variance = jnp.clip(log_variance, -20.0, 10.0)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = vae.decode(latents, clip=False) - video
    divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    edges = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (2, 3))
    squared = jnp.mean(jnp.square(error))
    loss = (
        weights.absolute * jnp.mean(jnp.abs(error))
        + weights.squared * squared
        + weights.edges * edges
        + weights.divergence * divergence
    )
    return loss, {"psnr": decibels(squared), "divergence": divergence, "edges": edges}


def pixels(video) -> jax.Array:
    """uint8 to fp32 in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1


def decibels(squared_error) -> jax.Array:
    """Peak signal-to-noise ratio of a mean squared error between videos in [-1, 1]."""
    return 10 * jnp.log10(4.0 / jnp.maximum(squared_error, 1e-10))


def held_out_psnr(vae, videos) -> float:
    """Mean decibels of the reconstructions from the mean latents of uint8 [N, T, Y, X, 3], one after the other."""
    return float(sum(decibels(_squared_error(vae, video[None])) for video in videos) / len(videos))


@jax.jit
def _squared_error(vae, video) -> jax.Array:
    return jnp.mean(jnp.square(vae.decode(vae.encode(pixels(video))[0]) - pixels(video)))
