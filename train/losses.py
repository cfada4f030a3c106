"""What training minimises. Losses are means over the batch, with a dict of scalars to report.

Here are flow matching and what every loss of a transformer shares, and the autoencoder's; distillation has files of its
own (`pare_loss`, `coredit_loss`, `ddit_loss`, `step_distill_loss`).

Shapes: B batch, T Y X frames and pixels or latent grid, C channels, M tokens with padding, L text tokens, E text
width, I image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.lora import beside
from dit_jax.models.network import (
    Aux,
    Conditioning,
    NetworkCall,
    Patch,
    State,
    Timesteps,
    Tokens,
    TokenTimesteps,
    layout,
    network,
    unlayout,
)
from dit_jax.ops import mesh as meshes
from dit_jax.sampling.schedules import TRAIN_STEPS, shifted

Models = Mapping[str, Any]
"""Models (or other pytrees) by what they are to a loss: `student`, `teacher`, `router`."""

Batch = Mapping[str, jax.Array]
"""Arrays of B samples by name: `latents` [B, T, Y, X, C], normalised, and what a transformer is told (`predicted`)."""


class PartMean(NamedTuple):
    """A mean over some of the rows, to report: what a step adds up over its microbatches before it divides."""

    total: jax.Array
    rows: jax.Array

    def value(self) -> jax.Array:
        """NaN where there are no such rows."""
        return self.total / self.rows


Metrics = dict[str, jax.Array]
Terms = Mapping[str, jax.Array | PartMean]
"""What a loss reports beside its value; a step makes `Metrics` of them."""

TOLD_GUIDANCE = 3.5  # what a guidance-distilled model is told where the batch does not say
HELD = 2  # beside a batch's key, whose halves are the levels' and the noise's: for the samples with a first frame held


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """Noise levels are logit-normal, then shifted towards noise: level ← shift·level / (1 + (shift − 1)·level).

    lowest, highest           levels that there are: of an expert, which runs at no others
    first_frame_conditioning  share of the samples whose first latent frame is held: given clean, as to a model that
                              makes a video of a first frame so (Wan2.2-TI2V-5B)
    """

    shift: float = 3.0
    spread: float = 1.0
    lowest: float = 0.0
    highest: float = 1.0
    first_frame_conditioning: float = 0.0
    call: NetworkCall = field(default_factory=NetworkCall)


@dataclass(frozen=True, kw_only=True)
class AutoencoderWeights:
    """Weights of the autoencoder's losses; pixels run from -1 to 1."""

    absolute: float = 1.0
    squared: float = 4.0
    edges: float = 0.3
    divergence: float = 5e-4


def noise_levels(key: jax.Array, batch: int, settings: FlowSettings) -> jax.Array:
    """Noise levels from `lowest` to `highest`, [B], spread evenly over the batch (one in each of B equal quantiles)."""
    offset = jax.random.uniform(key, ())
    first, last = (_quantile(level, settings) for level in (settings.lowest, settings.highest))
    quantiles = first + (last - first) * (jnp.arange(batch) + offset) / batch
    levels = jax.nn.sigmoid(settings.spread * jax.scipy.special.ndtri(jnp.clip(quantiles, 1e-4, 1 - 1e-4)))
    return shifted(levels, settings.shift)


def _quantile(level: float, settings: FlowSettings) -> float:
    """How many of all levels are below this one."""
    before = level / (settings.shift - (settings.shift - 1) * level)
    if before in (0, 1):
        return before
    return NormalDist().cdf(math.log(before / (1 - before)) / settings.spread)


class Noised(NamedTuple):
    """Latents at noise levels σ [B]: x_σ = (1 − σ)·x0 + σ·ε, and the velocity there, ε − x0, [B, T, Y, X, C] each.

    held  samples whose first frame is held [B], at σ = 0 and with nothing to be predicted; None: none of them
    """

    latents: jax.Array
    velocity: jax.Array
    levels: jax.Array
    held: jax.Array | None = None


def noised(latents: jax.Array, key: jax.Array, settings: FlowSettings, held: jax.Array | None = None) -> Noised:
    """Latents with random noise at random levels, in fp32; of samples that are `held` [B], or that are drawn."""
    level_key, noise_key = jax.random.split(key)
    levels = noise_levels(level_key, latents.shape[0], settings)
    held = held_samples(key, latents.shape, settings) if held is None else held
    return at_levels(latents, jax.random.normal(noise_key, latents.shape), levels, held)


def at_levels(latents: jax.Array, noise: jax.Array, levels: jax.Array, held: jax.Array | None = None) -> Noised:
    """Latents with this noise at these levels [B], in fp32, but for the first frames of samples that are held [B]."""
    latents, weight = latents.astype(jnp.float32), frame_levels(levels, held, latents.shape[1])
    return Noised((1 - weight) * latents + weight * noise, noise - latents, levels, held)


def held_samples(key: jax.Array, latents_shape: tuple[int, ...], settings: FlowSettings) -> jax.Array | None:
    """Samples whose first frame is held [B]: their share of a batch to the nearest sample, whichever their levels are.

    None where the share is 0, and of latents of one frame, of which nothing would be left.
    """
    batch, frames = latents_shape[:2]
    if not settings.first_frame_conditioning or frames == 1:
        return None
    order_key, offset_key = jax.random.split(jax.random.fold_in(key, HELD))
    order = jax.random.permutation(order_key, batch)
    return order + jax.random.uniform(offset_key, ()) < settings.first_frame_conditioning * batch


def held_frames(held_B: jax.Array, frames: int) -> jax.Array:
    """Which frames are held [B, T]: the first of these samples."""
    return held_B[:, None] & (np.arange(frames) == 0)


def frame_levels(levels_B: jax.Array, held_B: jax.Array | None, frames: int) -> jax.Array:
    """Noise levels beside the latents [B, 1, 1, 1, 1], of every frame [B, T, 1, 1, 1] where some are held."""
    levels = levels_B[:, None] if held_B is None else levels_B[:, None] * ~held_frames(held_B, frames)
    return levels[..., None, None, None]


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
    rows, state = network(model, call, tokens, timesteps(at, tokens, patch), told, state, aux)
    return unlayout(rows, at.latents.shape, patch), state


def timesteps(at: Noised, tokens: Tokens, patch: Patch) -> Timesteps:
    """Timesteps [B], or of every token where some are of frames that are held: 0 for these, as the sampler has it."""
    t = at.levels * TRAIN_STEPS
    if at.held is None:
        return t
    which_BM = at.held[:, None] & (tokens.positions[..., 0] * patch[0] < 1)
    return TokenTimesteps(
        jnp.stack([t, jnp.zeros_like(t)], axis=1), meshes.constrain_tokens(which_BM.astype(jnp.int32))
    )


def with_extra(latents: jax.Array, batch: Batch) -> jax.Array:
    """All that a backbone sees: the latents, and the batch's `extra` channels behind them."""
    if "extra" not in batch:
        return latents
    return jnp.concatenate([latents, batch["extra"].astype(latents.dtype)], axis=-1)


def mean_square(error: jax.Array, held: jax.Array | None = None) -> jax.Array:
    """Mean over all elements [B, T, Y, X, C], in fp32; over samples of their `sample_means` where some are held [B]."""
    squared = jnp.square(error.astype(jnp.float32))
    return jnp.mean(squared) if held is None else jnp.mean(sample_means(squared, held))


def sample_means(values: jax.Array, held: jax.Array | None = None) -> jax.Array:
    """Means over each sample's elements [B], without its first frame where that is held [B]; 0 where none is left.

    However a batch is divided, the mean of these is the same.
    """
    if held is None:
        return jnp.mean(values, axis=(1, 2, 3, 4))
    counted_BT = ~held_frames(held, values.shape[1])
    total_B = jnp.sum(jnp.mean(values, axis=(2, 3, 4)), axis=1, where=counted_BT)
    return total_B / jnp.maximum(jnp.sum(counted_BT, axis=1), 1)


def flow_matching(model, batch: Batch, key: jax.Array, settings: FlowSettings):
    """Mean squared error of the velocity (noise − data) at a random noise level (Lipman et al., arXiv 2210.02747).

    `batch` has `latents` [B, T, Y, X, C], normalised, and what the model is told (`predicted`).
    """
    at = noised(batch["latents"], key, settings)
    velocity, _ = predicted(model, at, batch, settings.call)
    error = sample_means(jnp.square(velocity - at.velocity), at.held)
    low = at.levels < 0.5
    return jnp.mean(error), {
        "loss_low_noise": PartMean(jnp.sum(error, where=low), jnp.sum(low)),
        "loss_high_noise": PartMean(jnp.sum(error, where=~low), jnp.sum(~low)),
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
