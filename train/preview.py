"""A look at a model while it trains: prompts sampled, decoded and drawn side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dit_jax.sampling.sampler import Guided, noise, sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import SOLVERS
from train.batches import Told
from train.losses import conditioning_of

GROUP = 4  # prompts sampled at once


@dataclass(frozen=True, kw_only=True)
class Preview:
    """`preview(model, prompts, latent shape, step)` samples the prompts, draws `STEP.png` and returns the pictures.

    `embed` turns prompts into what the transformer is told. Uint8 [B, T, Y, X, 3].
    """

    vae: object
    embed: Callable[[list[str]], Told]
    shift: float
    folder: Path
    mesh: Mesh
    steps: int = 20
    guidance: float = 4.0

    def __call__(self, model, prompts: list[str], shape: tuple[int, int, int, int], taken: int) -> np.ndarray:
        parts = []
        for first in range(0, len(prompts), GROUP):
            texts = prompts[first : first + GROUP]
            # Sample-major: each prompt, then the empty one.
            pairs = self.embed([text for prompt in texts for text in (prompt, "")])
            latents = noise(np.arange(first, first + len(texts), dtype=np.uint32), shape)
            parts.append(np.asarray(self._generate(model, pairs, latents)))
        video = np.concatenate(parts)
        draw(video, self.folder / f"{taken:06d}.png")
        (self.folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
        return video

    def _generate(self, model, pairs: Told, latents: jax.Array) -> jax.Array:
        schedule = SOLVERS["euler"].schedule(self.steps, Shift(constant=self.shift), 0)
        with jax.set_mesh(self.mesh):
            return _program(model, self.vae, pairs, latents, schedule, self.guidance, self.steps)


@partial(jax.jit, static_argnums=6)
def _program(model, vae, pairs, latents, schedule, guidance, steps):
    denoiser = Guided(model=model, conditioning=conditioning_of(pairs), guidance_scale=guidance, branches=2)
    solver = SOLVERS["euler"]
    final = sample(denoiser, solver, start(denoiser, solver, latents), schedule, jnp.int32(0), steps).latents
    video = vae.decode(vae.denormalise(final))
    return jnp.round((video + 1) * 127.5).astype(jnp.uint8)


def draw(video: np.ndarray, path: Path) -> None:
    """Stills in a grid of four columns; of clips five frames each, two clips a row."""
    shown = video[:, np.linspace(0, video.shape[1] - 1, min(5, video.shape[1])).round().astype(int)]
    strips = [np.concatenate(list(frames), axis=1) for frames in shown]
    columns = 4 if video.shape[1] == 1 else 2
    strips += [np.zeros_like(strips[0])] * (-len(strips) % columns)
    rows = [np.concatenate(strips[i : i + columns], axis=1) for i in range(0, len(strips), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)
