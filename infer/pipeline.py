"""From a prompt to pictures: what every backbone's pipeline shares, each stage one compiled program a shape.

Shapes: B samples, F frames, T Y X latent grid, C latent channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from convert.cache import LIMIT, Cache, with_cached_weights
from convert.checkpoint import Checkpoint, checkpoint_hash, load_model, open_checkpoint
from dit_jax.config import UserError
from dit_jax.models.network import grid
from dit_jax.sampling.sampler import Carry, Guided, noise, sample, start
from dit_jax.sampling.schedules import Schedule, Shift
from dit_jax.sampling.solvers import SOLVERS
from dit_jax.sharding import batch_sharding, batch_shardings, leaf_sharding, replicated
from infer import media
from infer.placement import picture_sharding
from infer.programs import Programs
from infer.request import Defaults, Job, Request, Strides, check, fill
from infer.side_files import read_defaults

SEGMENT = 4  # steps a program runs at most before it reports progress
VAE_CHUNK = 1  # latent frames that the VAE works on at a time
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, kw_only=True)
class Result:
    """A pipeline's output: `.frames` uint8, `.latents` fp32 [B, T, Y, X, C], and what made them.

    frames  videos [B, F, H, W, 3], or images [B, H, W, 3]
    """

    frames: np.ndarray
    latents: np.ndarray
    metadata: list[dict[str, Any]]
    fps: int

    def save(self, path: Path | str) -> list[Path]:
        """Writes each video or image; several get `-0`, `-1`, … before the suffix. Returns the files."""
        path = Path(path)
        names = (
            [path] if len(self.frames) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(len(self.frames))]
        )
        for name, frames, metadata in zip(names, self.frames, self.metadata, strict=True):
            media.save(name, frames if frames.ndim == 4 else frames[None], self.fps, metadata)
        return names


def load_pipeline(
    path: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    cache_dir: str | Path | None = None,
    cache_limit: int = LIMIT,
    progress: tqdm | None = None,
) -> Pipeline:
    """A pipeline from a diffusers directory, a native checkpoint, the original Wan files, a hub id or a shipped model.

    dtype        of the transformer and the text encoders; by default fp32 on a CPU, bf16 elsewhere. The VAE and the
                 image encoder stay in fp32.
    cache_dir    where converted weights are kept, so that they are converted once (`convert/cache.py`); None keeps none
    cache_limit  of that folder, in bytes
    progress     a bar that is told of the bytes hashed and converted for it
    """
    checkpoint = open_checkpoint(path)
    if not checkpoint.is_pipeline:
        raise UserError(
            f"{path} is a lone model: expected a whole pipeline (transformer, VAE, text encoder, tokenizer)"
        )
    if dtype is None:
        platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
        dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    if cache_dir is not None:
        cache = Cache(folder=Path(cache_dir).expanduser(), limit=cache_limit, progress=progress)
        checkpoint = with_cached_weights(checkpoint, cache)
    folder = Path(path).expanduser()
    name = folder.resolve().name if folder.exists() else str(path)
    return _backbone(checkpoint)(checkpoint, name, mesh, dtype)


def _backbone(checkpoint: Checkpoint) -> type[Pipeline]:
    from infer.flux_pipeline import FluxPipeline
    from infer.wan_pipeline import WanPipeline

    backbones = {"WanTransformer3DModel": WanPipeline, "FluxTransformer2DModel": FluxPipeline}
    found = checkpoint.component("transformer").class_name
    if found not in backbones:
        raise UserError(
            f"{checkpoint.folder} has a {found}: expected {' or '.join(backbones)}; use one of these models"
        )
    return backbones[found]


class Pipeline(ABC):
    """`pipe(prompt, size=(W, H), steps=…, guidance=…, solver=…, seed=…)`; see `Request` for every option.

    A backbone's pipeline says which models it has (`_load_models`), what its transformer is told (`_denoiser`) and how
    its noise levels are shifted (`shift`); everything else is here.
    """

    usual = Defaults()
    takes_image = False
    transformer: Any
    vae: Any
    shift: Shift

    def __init__(self, checkpoint: Checkpoint, name: str, mesh: jax.sharding.Mesh | None, dtype: Any):
        self.checkpoint, self.name, self.mesh, self.programs = checkpoint, name, mesh, Programs()
        self.hash = checkpoint_hash(checkpoint)
        self.defaults = read_defaults(checkpoint, self.usual)
        self._load_models(dtype)

    @abstractmethod
    def _load_models(self, dtype: Any) -> None: ...

    @abstractmethod
    def _denoiser(self, job: Job) -> Guided: ...

    def _load(self, name: str, dtype: Any):
        table = self.checkpoint.component(name).axes
        placed = partial(leaf_sharding, table=table, mesh=self.mesh) if self.mesh is not None and table else None
        return load_model(self.checkpoint, name, mesh=self.mesh, shardings=placed, dtype=dtype)

    @property
    def strides(self) -> Strides:
        return Strides(
            space=self.vae.config.space_factor * self.transformer.config.patch[1], time=self.vae.config.time_factor
        )

    def latents_shape(self, size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
        """(T, Y, X, C) of the latents of a video."""
        space, time = self.vae.config.space_factor, self.vae.config.time_factor
        return (frames - 1) // time + 1, size[1] // space, size[0] // space, self.vae.config.z_dim

    def tokens(self, size: tuple[int, int], frames: int) -> int:
        """Tokens of a video in the transformer."""
        return math.prod(grid((1, *self.latents_shape(size, frames)), self.transformer.config.patch))

    def __call__(self, prompt: str | list[str], *, progress: Progress | None = None, **options) -> Result:
        """Runs `Request(prompt=prompt, **options)`; `progress(stage, done, total)` is called as it goes."""
        unknown = set(options) - {field.name for field in fields(Request)}
        if unknown:
            raise UserError(
                f"unknown option {sorted(unknown)[0]!r}: expected some of {', '.join(f.name for f in fields(Request))}"
            )
        job = self.prepare(Request(prompt=prompt, **options))
        return self.decode(job, self.denoise(job, progress), progress)

    def prepare(self, request: Request) -> Job:
        """The request with the model's defaults in it; UserError if the model cannot serve it."""
        job = fill(request, self.defaults)
        check(job, self.strides, self.takes_image, self.defaults.video)
        return job

    def schedule(self, job: Job) -> Schedule:
        """The noise levels of a job."""
        return SOLVERS[job.solver].schedule(job.steps, self.shift, self.tokens(job.size, job.frames))

    def denoise(self, job: Job, progress: Progress | None = None) -> np.ndarray:
        """Final latents [B, T, Y, X, C] of a job, fp32 in the sampler's normalised units."""
        with self._on_mesh():
            denoiser = self._denoiser(job)
            solver = SOLVERS[job.solver]
            schedule = jax.tree.map(self._replicated, self.schedule(job))
            carry = start(denoiser, solver, self._starting_noise(job))
            pinned = None if self.mesh is None else batch_shardings(carry, self.mesh)
            if pinned is not None:
                carry = jax.device_put(carry, pinned)
            count = max(n for n in range(1, SEGMENT + 1) if job.steps % n == 0)
            run = _segment(solver, count)
            for first in range(0, job.steps, count):
                if progress:
                    progress("denoise", first, job.steps)
                step = self._replicated(np.int32(first))
                carry = self.programs.run(
                    (run.__name__, solver, count), run, denoiser, carry, schedule, step,
                    donate=(1,), out_shardings=pinned,
                )  # fmt: skip
                if progress:
                    jax.block_until_ready(carry)
            if progress:
                progress("denoise", job.steps, job.steps)
            latents = np.asarray(carry.latents)
        if not np.isfinite(latents).all():
            raise UserError(
                "the final latents hold NaN or infinity: expected numbers; look for NaN weights with `dit-convert "
                "to-jax`, which names them, or load the pipeline with dtype=float32"
            )
        return latents

    def decode(self, job: Job, latents: np.ndarray, progress: Progress | None = None) -> Result:
        """Videos or images of final latents."""
        if progress:
            progress("decode", 0, 1)
        with self._on_mesh():
            spread = self._spread(job)
            video = self.programs.run("decode", _decode, self.vae, put(latents, spread), out_shardings=spread)
            frames = np.asarray(video) if self.defaults.video else np.asarray(video)[:, 0]
        if progress:
            progress("decode", 1, 1)
        return Result(frames=frames, latents=latents, metadata=self._metadata(job), fps=self.defaults.fps)

    def _starting_noise(self, job: Job) -> jax.Array:
        shape = self.latents_shape(job.size, job.frames)
        count = len(job.prompts)
        if job.latents is None:
            return noise([job.seed + i for i in range(count)], shape)
        if job.latents.shape != (count, *shape):
            raise UserError(f"latents have shape {job.latents.shape}: expected {(count, *shape)}, channels last")
        return jnp.array(job.latents, jnp.float32)  # a copy: the sampler donates it

    def _metadata(self, job: Job) -> list[dict[str, Any]]:
        shared = {"model": self.name, "checkpoint": self.hash, "plan": "dense"}
        told = {name: value for name, value in job.describe().items() if name != "prompts"} | shared
        seeds = [job.seed + i if job.latents is None else None for i in range(len(job.prompts))]
        return [told | {"prompt": prompt, "seed": seed} for prompt, seed in zip(job.prompts, seeds, strict=True)]

    def _on_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def _replicated(self, value) -> jax.Array:
        return put(value, None if self.mesh is None else replicated(self.mesh))

    def _rows(self, value) -> jax.Array:
        """An array of batch rows on the batch axes of the mesh."""
        return put(value, None if self.mesh is None else batch_sharding(self.mesh, value.shape[0]))

    def _spread(self, job: Job) -> NamedSharding | None:
        """How the VAE's latents and videos [B, T, Y, X, C] are split."""
        _, rows, columns, _ = self.latents_shape(job.size, job.frames)
        return None if self.mesh is None else picture_sharding(self.mesh, len(job.prompts), rows, columns)


def put(value, sharding: NamedSharding | None) -> jax.Array:
    """The value as an array with this sharding (None: on the default device)."""
    return jnp.asarray(value) if sharding is None else jax.device_put(value, sharding)


def interleaved(conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
    """Rows of both guidance branches, those of a sample next to each other."""
    return jnp.stack([conditional, unconditional], axis=1).reshape(-1, *conditional.shape[1:])


def _segment(solver, count: int):
    def segment(denoiser: Guided, carry: Carry, schedule: Schedule, first: jax.Array) -> Carry:
        return sample(denoiser, solver, carry, schedule, first, count)

    return segment


def _decode(vae, latents):
    video = vae.decode(vae.denormalise(latents), chunk=VAE_CHUNK)
    return jnp.round((video + 1) * 127.5).astype(jnp.uint8)
