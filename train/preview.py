"""A look at a model while it trains: fixed prompts, sampled, decoded, drawn side by side and scored."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dit_jax.models.network import Conditioning
from dit_jax.sampling.sampler import Guided, noise, sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import SOLVERS
from infer.digit_grammar import caption, random_scene
from infer.digit_reader import cache_path, load_reader
from infer.digit_scores import read_clip

SEED = 5
GROUP = 4  # prompts sampled at once
LATENT_GRID = (16, 16, 16)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a preview needs besides the transformer; `embed` turns prompts into text states."""

    vae: object
    embed: Callable[[list[str]], np.ndarray]
    shift: float
    folder: Path
    mesh: Mesh
    prompts: int = 12
    steps: int = 20
    guidance: float = 4.0


def write_preview(preview: Preview, model, latent_frames: int, taken: int) -> dict[str, float]:
    """Samples the prompts of a fixed seed, draws `STEP.png`, and returns the shares of right digits.

    No shares unless the reader of `dit-eval` is at hand: it is not trained for a look. A still has no direction.
    """
    rng = random.Random(SEED)
    scenes = [random_scene(rng) for _ in range(preview.prompts)]
    texts = [caption(scene, rng) for scene in scenes]
    text = np.stack([preview.embed(texts), np.repeat(preview.embed([""]), len(texts), 0)], axis=1).astype(np.float32)
    shape = (latent_frames, *LATENT_GRID)
    parts = []
    for first in range(0, len(texts), GROUP):
        seeds = list(range(first, first + GROUP))
        pairs = text[first : first + GROUP].reshape(-1, *text.shape[2:])
        parts.append(np.asarray(_generate(preview, model, pairs, noise(seeds, shape))))
    video = np.concatenate(parts)
    _draw(video, preview.folder / f"{taken:06d}.png")
    (preview.folder / "prompts.txt").write_text("\n".join(texts) + "\n")
    if not cache_path().exists():
        return {}
    clips = np.repeat(video, 5, axis=1) if latent_frames == 1 else video
    reader = load_reader()
    right = np.concatenate([read_clip(clip, scene, reader).right for clip, scene in zip(clips, scenes, strict=True)])
    names = ("digit", "colour") if latent_frames == 1 else ("digit", "colour", "direction")
    return {f"preview_{name}": float(share) for name, share in zip(names, right.mean(0), strict=False)}


def _generate(preview: Preview, model, pairs: np.ndarray, latents: jax.Array) -> jax.Array:
    """Video uint8 by Euler; `pairs` holds each prompt's text states and the empty prompt's."""
    solver = SOLVERS["euler"]
    schedule = solver.schedule(preview.steps, Shift(constant=preview.shift), 0)
    with jax.set_mesh(preview.mesh):
        return _program(model, preview.vae, pairs, latents, schedule, preview.guidance, preview.steps)


@partial(jax.jit, static_argnums=6)
def _program(model, vae, pairs, latents, schedule, guidance, steps):
    denoiser = Guided(model=model, conditioning=Conditioning(pairs), guidance_scale=guidance, branches=2)
    solver = SOLVERS["euler"]
    final = sample(denoiser, solver, start(denoiser, solver, latents), schedule, jnp.int32(0), steps).latents
    video = vae.decode(vae.denormalise(final))
    return jnp.round((video + 1) * 127.5).astype(jnp.uint8)


def _draw(video: np.ndarray, path: Path) -> None:
    """Stills in a grid of four columns; of clips five frames each, two clips a row."""
    shown = video[:, np.linspace(0, video.shape[1] - 1, min(5, video.shape[1])).round().astype(int)]
    strips = [np.concatenate(list(frames), axis=1) for frames in shown]
    columns = 4 if video.shape[1] == 1 else 2
    rows = [np.concatenate(strips[i : i + columns], axis=1) for i in range(0, len(strips), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)
