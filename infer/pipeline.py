"""Text or an image to video: the whole of a Wan pipeline from a checkpoint, each stage one compiled program a shape.

Shapes: B samples, R batch rows (guidance branches of a sample next to each other), L text tokens, E text width, T Y X
latent grid, C latent channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import html
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from convert.checkpoint import Checkpoint, checkpoint_hash, load_model, open_checkpoint
from dit_jax.config import UserError
from dit_jax.models.clip import preprocess
from dit_jax.models.network import Conditioning, grid
from dit_jax.models.wan import TEXT_TOKENS_WITH_IMAGE
from dit_jax.ops import mesh as meshes
from dit_jax.sampling.sampler import Carry, Guided, noise, sample, start
from dit_jax.sampling.schedules import Schedule, Shift
from dit_jax.sampling.solvers import SOLVERS
from dit_jax.sharding import batch_sharding, leaf_sharding
from infer import media
from infer.programs import Programs
from infer.request import Defaults, Job, Request, Strides, check, fill

DEFAULTS_FILE = "generation_defaults.json"
SEGMENT = 4  # steps a program runs at most before it reports progress
VAE_CHUNK = 1  # latent frames that the VAE works on at a time
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, kw_only=True)
class Result:
    """A pipeline's output: `.frames` uint8 [B, F, H, W, 3], `.latents` fp32 [B, T, Y, X, C], and what made them."""

    frames: np.ndarray
    latents: np.ndarray
    metadata: list[dict[str, Any]]
    fps: int

    def save(self, path: Path | str) -> list[Path]:
        """Writes each video; several get `-0`, `-1`, … before the suffix. Returns the files."""
        path = Path(path)
        names = (
            [path] if len(self.frames) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(len(self.frames))]
        )
        for name, frames, metadata in zip(names, self.frames, self.metadata, strict=True):
            media.save(name, frames, self.fps, metadata)
        return names


def load_pipeline(path: str | Path, *, mesh: jax.sharding.Mesh | None = None, dtype: Any = None) -> WanPipeline:
    """A pipeline from a diffusers directory, a native checkpoint, the original Wan files, a hub id or "demo-wan".

    dtype  of the transformer and the text encoder; by default fp32 on a CPU, bf16 elsewhere. The VAE and CLIP stay in
           fp32.
    """
    checkpoint = open_checkpoint(path)
    if not checkpoint.is_pipeline:
        raise UserError(
            f"{path} is a lone model: expected a whole pipeline (transformer, VAE, text encoder, tokenizer)"
        )
    if dtype is None:
        platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
        dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    return WanPipeline(checkpoint, mesh, dtype)


class WanPipeline:
    """`pipe(prompt, size=(W, H), frames=…, steps=…, guidance=…, solver=…, seed=…)`; see `Request` for every option."""

    def __init__(self, checkpoint: Checkpoint, mesh: jax.sharding.Mesh | None, dtype: Any):
        self.checkpoint, self.mesh, self.programs = checkpoint, mesh, Programs()
        self.transformer = self._load("transformer", dtype)
        self.text_encoder = self._load("text_encoder", dtype)
        self.vae = self._load("vae", jnp.float32)
        self.takes_image = self.transformer.config.image_width is not None
        self.image_encoder = self._load("image_encoder", jnp.float32) if self.takes_image else None
        self.defaults = _read_defaults(checkpoint)
        self.shift = _read_shift(checkpoint)

    def _load(self, name: str, dtype: Any):
        table = self.checkpoint.component(name).axes
        placed = partial(leaf_sharding, table=table, mesh=self.mesh) if self.mesh is not None and table else None
        return load_model(self.checkpoint, name, mesh=self.mesh, shardings=placed, dtype=dtype)

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        for name, file in self.checkpoint.files.items():
            if name.startswith("tokenizer/") and isinstance(file, Path):
                return AutoTokenizer.from_pretrained(file.parent)
        raise UserError(f"{self.checkpoint.folder} has no tokenizer: expected its files in the folder tokenizer")

    @cached_property
    def hash(self) -> str:
        """Short hash of the checkpoint's contents."""
        return checkpoint_hash(self.checkpoint.folder)

    @property
    def text_tokens(self) -> int:
        """Length that text is padded to: Wan's 512, or the tokenizer's own limit where that is shorter."""
        return TEXT_TOKENS_WITH_IMAGE if self.takes_image else min(512, self.tokenizer.model_max_length)

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
        check(job, self.strides, self.takes_image)
        return job

    def denoise(self, job: Job, progress: Progress | None = None) -> np.ndarray:
        """Final latents [B, T, Y, X, C] of a job, fp32 in the sampler's normalised units."""
        with self._on_mesh():
            denoiser = self._denoiser(job)
            solver = SOLVERS[job.solver]
            schedule = solver.schedule(job.steps, self.shift, self.tokens(job.size, job.frames))
            schedule = jax.tree.map(self._replicated, schedule)
            carry = self._pin(start(denoiser, solver, self._starting_noise(job)))
            count = max(n for n in range(1, SEGMENT + 1) if job.steps % n == 0)
            run = _segment(solver, count)
            for first in range(0, job.steps, count):
                if progress:
                    progress("denoise", first, job.steps)
                step = self._replicated(np.int32(first))
                carry = self.programs.run(
                    (run.__name__, solver, count), run, denoiser, carry, schedule, step, donate=(1,)
                )
            if progress:
                jax.block_until_ready(carry)
                progress("denoise", job.steps, job.steps)
            return np.asarray(carry.latents)

    def decode(self, job: Job, latents: np.ndarray, progress: Progress | None = None) -> Result:
        """Video of final latents."""
        if not np.isfinite(latents).all():
            raise UserError(
                "the final latents are not finite: check the checkpoint with `dit-convert inspect`, or use fp32"
            )
        if progress:
            progress("decode", 0, 1)
        with self._on_mesh():
            video = self.programs.run("decode", _decode, self.vae, self._spread(latents))
            frames = np.asarray(video)
        if progress:
            progress("decode", 1, 1)
        return Result(frames=frames, latents=latents, metadata=self._metadata(job), fps=self.defaults.fps)

    def encode_text(self, prompts: list[str]) -> jax.Array:
        """Text embeddings [B, L, E]; zero behind each prompt's end, as Wan's pipelines have them."""
        texts = self.tokenizer(
            [clean(prompt) for prompt in prompts], padding="max_length", max_length=self.text_tokens, truncation=True,
            return_tensors="np",
        )  # fmt: skip
        ids, valid = texts["input_ids"].astype(np.int32), texts["attention_mask"].astype(bool)
        return self.programs.run("text", _encode_text, self.text_encoder, self._rows(ids), self._rows(valid))

    def _denoiser(self, job: Job) -> Guided:
        branches = 2 if job.guidance > 1 else 1
        text = self.encode_text(job.prompts)
        if branches == 2:
            negative = self.encode_text([job.negative_prompt] * len(job.prompts))
            text = jnp.stack([text, negative], axis=1).reshape(-1, *text.shape[1:])
        image, extra = self._image_conditioning(job, branches) if self.takes_image else (None, None)
        conditioning = Conditioning(self._rows(text), None if image is None else self._rows(image))
        return Guided(
            model=self.transformer,
            conditioning=conditioning,
            guidance_scale=self._replicated(np.float32(job.guidance)),
            extra=extra,
            branches=branches,
        )

    def _image_conditioning(self, job: Job, branches: int) -> tuple[jax.Array, jax.Array]:
        """(image encoder's states [R, I, E], mask and encoded first frame [B, T, Y, X, 4 + C])."""
        assert job.images is not None and self.image_encoder is not None
        images = [image.convert("RGB") for image in job.images]
        side = self.image_encoder.config.image_size
        pixels = np.concatenate([preprocess(np.asarray(image)[None], side) for image in images])
        states = self.programs.run("image", _encode_image, self.image_encoder, self._rows(pixels))
        resized = [image.resize(job.size, Image.Resampling.LANCZOS) for image in images]
        first = np.stack([np.asarray(image, np.float32) / 127.5 - 1 for image in resized])[:, None]
        video = np.concatenate([first, np.zeros((len(images), job.frames - 1, *first.shape[2:]), np.float32)], axis=1)
        encoded = self.programs.run("encode", _encode_video, self.vae, self._rows(video))
        mask = np.zeros((*encoded.shape[:-1], self.vae.config.time_factor), np.float32)
        mask[:, 0] = 1
        return jnp.repeat(states, branches, axis=0), jnp.concatenate([self._rows(mask), encoded], axis=-1)

    def _starting_noise(self, job: Job) -> jax.Array:
        shape = self.latents_shape(job.size, job.frames)
        count = len(job.prompts)
        if job.latents is None:
            return noise([job.seed + i for i in range(count)], shape)
        if job.latents.shape != (count, *shape):
            raise UserError(f"latents have shape {job.latents.shape}: expected {(count, *shape)}, channels last")
        return jnp.asarray(job.latents, jnp.float32)

    def _metadata(self, job: Job) -> list[dict[str, Any]]:
        shared = {"model": self.checkpoint.folder.name, "checkpoint": self.hash, "plan": "dense"}
        told = {name: value for name, value in job.describe().items() if name != "prompts"} | shared
        return [told | {"prompt": prompt, "seed": job.seed + i} for i, prompt in enumerate(job.prompts)]

    def _on_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def _place(self, value, spec: PartitionSpec) -> jax.Array:
        if self.mesh is None:
            return jnp.asarray(value)
        return jax.device_put(value, NamedSharding(self.mesh, spec))

    def _replicated(self, value) -> jax.Array:
        return self._place(value, PartitionSpec())

    def _rows(self, value) -> jax.Array:
        """An array of batch rows on the batch axes of the mesh."""
        if self.mesh is None:
            return jnp.asarray(value)
        return jax.device_put(value, batch_sharding(self.mesh, value.shape[0]))

    def _spread(self, latents) -> jax.Array:
        """Latents or a video [B, T, Y, X, C] over batch and, where they divide, rows of the picture: how the VAE is
        split."""
        if self.mesh is None:
            return jnp.asarray(latents)
        batch, rest = meshes.activation_axes(self.mesh, latents.shape[0])
        rows = rest if latents.shape[2] % meshes.axis_size(self.mesh, rest) == 0 else ()
        return self._place(latents, PartitionSpec(batch or None, None, rows or None))

    def _pin(self, carry: Carry) -> Carry:
        """The carry on the shardings that a segment gives back, so that the next one is the same program."""
        return jax.tree.map(self._rows, carry)


def _segment(solver, count: int):
    def segment(denoiser: Guided, carry: Carry, schedule: Schedule, first: jax.Array) -> Carry:
        pinned = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, carry)
        after = sample(denoiser, solver, carry, schedule, first, count)
        return jax.lax.with_sharding_constraint(after, pinned) if meshes.current_mesh() else after

    return segment


def _encode_text(encoder, ids_BL, valid_BL):
    return jnp.where(valid_BL[..., None], encoder(ids_BL, valid_BL), 0)


def _encode_image(encoder, pixels):
    return encoder(pixels)


def _encode_video(vae, video):
    return vae.normalise(vae.encode(video, chunk=VAE_CHUNK)[0])


def _decode(vae, latents):
    video = vae.decode(vae.denormalise(latents), chunk=VAE_CHUNK)
    return jnp.round((video + 1) * 127.5).astype(jnp.uint8)


def clean(prompt: str) -> str:
    """A prompt without HTML escapes and with single spaces."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def _read_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    source = checkpoint.files.get(name)
    if source is None:
        return {}
    return json.loads(source if isinstance(source, bytes) else source.read_text())


def _read_defaults(checkpoint: Checkpoint) -> Defaults:
    settings = _read_json(checkpoint, DEFAULTS_FILE)
    if "size" in settings:
        settings["size"] = tuple(settings["size"])
    return Defaults(**settings)


def _read_shift(checkpoint: Checkpoint) -> Shift:
    settings = _read_json(checkpoint, "scheduler/scheduler_config.json")
    return Shift(constant=float(settings.get("flow_shift") or settings.get("shift") or 1.0))
