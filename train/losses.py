"""What training minimises. Losses are means over the batch, with a dict of scalars to report.

Shapes: B batch, T Y X frames and pixels or latent grid, C channels, L text tokens, E text width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from dit_jax.models.network import Conditioning, NetworkCall, layout, network, unlayout
from dit_jax.sampling.schedules import TRAIN_STEPS, shifted


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


def flow_matching(model, batch: dict[str, jax.Array], key: jax.Array, settings: FlowSettings):
    """Mean squared error of the velocity (noise − data) at a random noise level (Lipman et al., arXiv 2210.02747).

    `batch` has `latents` [B, T, Y, X, C], normalised, `text` [B, L, E] and, for a model that is told it, `pooled` text.
    """
    latents = batch["latents"].astype(jnp.float32)
    level_key, noise_key = jax.random.split(key)
    levels = noise_levels(level_key, latents.shape[0], settings)
    noise = jax.random.normal(noise_key, latents.shape)
    weight = levels[:, None, None, None, None]
    noisy = (1 - weight) * latents + weight * noise
    patch = model.config.patch
    rows, _ = network(
        model,
        settings.call,
        layout(noisy, patch),
        levels * TRAIN_STEPS,
        conditioning_of(batch),
    )
    error = jnp.mean(jnp.square(unlayout(rows, latents.shape, patch) - (noise - latents)), axis=(1, 2, 3, 4))
    low = levels < 0.5
    return jnp.mean(error), {
        "loss_low_noise": jnp.sum(error * low) / jnp.maximum(1, jnp.sum(low)),
        "loss_high_noise": jnp.sum(error * ~low) / jnp.maximum(1, jnp.sum(~low)),
    }


def conditioning_of(told: dict[str, jax.Array]) -> Conditioning:
    """What a transformer is told, from the arrays `text` and perhaps `pooled`, in fp32."""
    pooled = told["pooled"].astype(jnp.float32) if "pooled" in told else None
    return Conditioning(told["text"].astype(jnp.float32), pooled=pooled)


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
