"""Trains the autoencoder of demo-wan on crops of moving digits, then measures the latents' mean and deviation.

    dit-train demo_vae --set out=runs/demo-vae

Stills come first (the causal network is an image autoencoder too), then they alternate with whole clips: trained on
fewer frames, it drifts in later ones. About 15 minutes on 2 idle CPU cores.
Score: decibels on held-out clips, printed at the end and in metrics.jsonl (`held_out_psnr`). Reached in 1,800 steps:
29.9.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.models.vae_wan import WanVAE, WanVAEConfig
from dit_jax.parameters import with_leaves
from train.data import CropSettings, clip_pool, random_crops
from train.demo_models import trained
from train.loop import Hook, Outcome, RunConfig, train
from train.losses import AutoencoderWeights, autoencoding, held_out_psnr, pixels
from train.optimizers import muon, schedule
from train.placement import training_mesh
from train.step import TrainStep, alone, params_of

# Folding 2×2 pixels into channels first (as Wan 2.2 does) costs a quarter of the pixels and gains four times the
# channels.
SHIPPED = WanVAEConfig(
    base_dim=16,
    decoder_base_dim=24,
    dim_mult=(1, 2, 2),
    temporal_downsample=(True, True),
    num_res_blocks=1,
    in_channels=12,
    out_channels=12,
    patch=2,
    latents_mean=(0.0,) * 16,
    latents_std=(1.0,) * 16,
)
STATISTICS = "statistics.json"
HELD_OUT_SEED = 77


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Options of the recipe."""

    out: str = "runs/demo-vae"
    steps: int = 1800
    save_every: int = 100
    image_steps: int = 200
    image_side: int = 64
    image_batch: int = 16
    clip_side: int = 48
    clip_batch: int = 2
    clips: int = 320
    learning_rate: float = 3e-3
    decay_steps: int = 900
    divergence: float = 5e-4
    held_out: int = 8
    init: str = ""


def run(config: Config) -> Outcome:
    """Trains, then writes the statistics."""
    mesh = training_mesh(config.mesh)
    vae = load_vae(config.init) if config.init else fresh_vae(config.seed)
    pool = clip_pool(config.seed, config.clips)
    stills = CropSettings(frames=1, side=config.image_side, batch=config.image_batch)
    clips = CropSettings(frames=pool.shape[1], side=config.clip_side, batch=config.clip_batch)
    rate = schedule(config.learning_rate, config.steps, warmup=20, decay=config.decay_steps)
    optimizer = muon(rate, rate)
    loss = partial(autoencoding, weights=AutoencoderWeights(divergence=config.divergence))
    step = TrainStep(vae, alone(loss, optimizer, ema_decay=0.98), mesh)

    def batch_at(position: int):
        still = position < config.image_steps or position % 2 == 0
        return {"video": random_crops(pool, stills if still else clips, config.seed, position)}

    held_out = clip_pool(HELD_OUT_SEED, config.held_out, "held-out")
    score = partial(_score, vae, held_out)
    outcome = train(config, step.init(vae), step, batch_at, (Hook(100, score),))
    if not outcome.stopped:
        write_statistics(config.out, with_leaves(vae, outcome.state.ema), pool)
    return outcome


def fresh_vae(seed: int) -> WanVAE:
    """Random weights, with the taps on earlier frames made small: the network starts as an image autoencoder."""

    def start() -> WanVAE:
        vae = WanVAE(SHIPPED, rngs=nnx.Rngs(seed))
        return with_leaves(vae, {name: _image_first(name, leaf) for name, leaf in params_of(vae).items()})

    return jax.jit(start)()


def _image_first(name: str, leaf: jax.Array) -> jax.Array:
    if "time_conv" in name or leaf.ndim != 5 or leaf.shape[0] != 3:
        return leaf
    return jnp.concatenate([0.1 * leaf[:-1], 3.0**0.5 * leaf[-1:]])


def load_vae(out: str) -> WanVAE:
    """The trained autoencoder of a run, with its statistics."""
    folder = Path(out)
    file = folder / STATISTICS
    measured = json.loads(file.read_text()) if file.exists() else {}
    statistics: dict[str, Any] = {name: tuple(values) for name, values in measured.items()}
    config = dataclasses.replace(SHIPPED, **statistics)
    return trained(out, lambda: WanVAE(config, rngs=nnx.Rngs(0)))


def write_statistics(out: str, vae: WanVAE, pool: np.ndarray, clips: int = 96) -> None:
    """Mean and deviation of every latent channel, of latents sampled from the encoder's distribution.

    Its own noise counts: a channel that the encoder leaves unused then has deviation 1, not one of nearly 0.
    """
    means, variances = [], []
    for start in range(0, min(clips, len(pool)), 4):
        mean, log_variance = _moments(vae, pool[start : start + 4])
        means.append(np.asarray(mean).reshape(-1, mean.shape[-1]))
        variances.append(np.exp(np.asarray(log_variance)).reshape(-1, mean.shape[-1]))
    mean, variance = np.concatenate(means), np.concatenate(variances)
    deviation = np.sqrt(mean.var(0) + variance.mean(0))
    statistics = {"latents_mean": mean.mean(0), "latents_std": deviation}
    text = json.dumps({name: [round(float(v), 5) for v in values] for name, values in statistics.items()})
    Path(out, STATISTICS).write_text(text + "\n")


def _score(abstract: WanVAE, clips: np.ndarray, state, taken: int) -> dict[str, float]:
    psnr = held_out_psnr(with_leaves(abstract, state.ema), clips)
    print(f"\nstep {taken}: {psnr:.2f} dB on held-out clips", flush=True)
    return {"held_out_psnr": psnr}


@jax.jit
def _moments(vae: WanVAE, video):
    return vae.encode(pixels(video))
