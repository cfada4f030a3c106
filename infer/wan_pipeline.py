"""Wan 2.1 and 2.2: text, or an image and text, to video.

Shapes: B samples, R batch rows (guidance branches of a sample next to each other), L text tokens, E text width, I image
tokens, T Y X latent grid, C latent channels.
"""

from __future__ import annotations

import html
import re
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import ftfy
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from PIL import Image

from convert.wan import HIGH_NOISE, LOW_NOISE
from dit_jax.models.clip import preprocess
from dit_jax.models.network import Conditioning
from dit_jax.models.wan import TEXT_TOKENS_WITH_IMAGE
from dit_jax.sampling.sampler import Guided
from dit_jax.sampling.schedules import Schedule, Shift
from infer.experts import Experts
from infer.loras import Held
from infer.pipeline import VAE_CHUNK, Pipeline, interleaved, put
from infer.request import Defaults, Job, Limits
from infer.segments import Stage, stages_between
from infer.side_files import load_tokenizer, read_shift
from infer.wan_variant import WanVariant, wan_variant


class WanPipeline(Pipeline):
    """A Wan pipeline: one transformer or two experts, from text or from a first frame and text."""

    @cached_property
    def variant(self) -> WanVariant:
        """Which of Wan's pipelines it is."""
        return wan_variant(self.checkpoint)

    def _usual(self) -> Defaults:
        return self.variant.usual

    def _read_shift(self) -> Shift:
        return read_shift(self.checkpoint)

    def _load_models(self, dtype: Any, offload_expert: bool) -> None:
        self.tokenizer = load_tokenizer(self.checkpoint, "tokenizer")
        names = (HIGH_NOISE, LOW_NOISE) if self.variant.boundary is not None else (HIGH_NOISE,)
        self.experts = Experts({name: partial(self._load, name, dtype) for name in names}, offload_expert)
        self.text_encoder = self._load("text_encoder", dtype)
        self.vae = self._load("vae", jnp.float32)
        has_image_branch = self.transformer_config.image_width is not None
        self.image_encoder = self._load("image_encoder", jnp.float32) if has_image_branch else None

    def lora_models(self) -> dict[str, Held]:
        experts = {name: (self.experts.resident, name) for name in self.experts}
        return experts | {"text_encoder": (vars(self), "text_encoder")}

    @property
    def transformer(self) -> Any:
        """The only transformer, or the high-noise expert."""
        return self.experts[HIGH_NOISE]

    @property
    def limits(self) -> Limits:
        variant = self.variant
        return replace(super().limits, image=variant.image, last_image=variant.last_image, experts=len(self.experts))

    @property
    def text_tokens(self) -> int:
        """Length that text is padded to: Wan's 512, or the tokenizer's own limit where that is shorter."""
        if self.variant.image == "always":
            return TEXT_TOKENS_WITH_IMAGE
        return min(512, self.tokenizer.model_max_length)

    def encode_text(self, prompts: list[str]) -> jax.Array:
        """Text embeddings [B, L, E]; zero behind each prompt's end, as Wan's pipelines have them."""
        texts = self.tokenizer(
            [clean(prompt) for prompt in prompts], padding="max_length", max_length=self.text_tokens, truncation=True,
            return_tensors="np",
        )  # fmt: skip
        ids, valid = texts["input_ids"].astype(np.int32), texts["attention_mask"].astype(bool)
        return self.programs.run("text", _encode_text, self.text_encoder, self.rows(ids), self.rows(valid))

    def stages(self, job: Job, schedule: Schedule) -> list[Stage]:
        told = self._told(job)

        def denoiser(expert: str, scale: float) -> Guided:
            return replace(told, model=self.experts[expert], guidance_scale=self.replicated(np.float32(scale)))

        high, low = job.guidance_scales
        denoisers = [partial(denoiser, HIGH_NOISE, high)]
        if self.variant.boundary is None:
            return stages_between([0, job.steps], denoisers)
        crossing = int(np.count_nonzero(schedule.timesteps >= self.variant.boundary))
        stages = stages_between([0, crossing, job.steps], [*denoisers, partial(denoiser, LOW_NOISE, low)])
        return [replace(stage, component=HIGH_NOISE if stage.first < crossing else LOW_NOISE) for stage in stages]

    def _told(self, job: Job) -> Guided:
        """The denoiser without a model and its guidance scale: what all experts are told alike."""
        branches = 2 if max(job.guidance_scales) > 1 else 1
        text = self.embedded(job.prompts)
        if branches == 2:
            text = interleaved(text, self.embedded(job.negative_prompts))
        as_channels = self.variant.image == "always"
        return Guided(
            model=None,
            conditioning=Conditioning(self.rows(text), self._image_states(job, branches)),
            guidance_scale=self.replicated(np.float32(1)),
            extra=self._given_frames(job) if as_channels else None,
            held=None if as_channels or job.images is None else self._held_frame(job),
            branches=branches,
        )

    def _image_states(self, job: Job, branches: int) -> jax.Array | None:
        """The image encoder's states of the first frames [R, I, E], of the last ones behind each where there are any
        [2R, I, E]; None for a model that has none."""
        if self.image_encoder is None:
            return None
        assert job.images is not None
        given = [job.images] if job.last_images is None else [job.images, job.last_images]
        seen = [image for of_sample in zip(*given, strict=True) for image in of_sample]
        side = self.image_encoder.config.image_size
        pixels = np.concatenate([preprocess(np.asarray(image.convert("RGB"))[None], side) for image in seen])
        states = self.programs.run("image", _encode_image, self.image_encoder, self.rows(pixels))
        by_sample = jnp.repeat(states.reshape(len(job.images), -1, *states.shape[1:]), branches, axis=0)
        return self.rows(by_sample.reshape(-1, *states.shape[1:]))

    def _given_frames(self, job: Job) -> jax.Array:
        """Mask of the frames that are given, and the encoded video of them [B, T, Y, X, 4 + C]."""
        first = _at_size(job.images, job.size)
        video = np.zeros((len(first), job.frames, *first.shape[2:]), np.float32)
        video[:, :1] = first
        if job.last_images is not None:
            video[:, -1:] = _at_size(job.last_images, job.size)
        spread = self._spread(job)
        encoded = self._encode(video, spread)
        # A channel for each frame of a latent one; the first latent frame is of one frame alone.
        mask = np.zeros((*encoded.shape[:-1], self.vae.config.time_factor), np.float32)
        mask[:, 0] = 1
        if job.last_images is not None:
            mask[:, -1, ..., -1] = 1
        return self.rows(jnp.concatenate([put(mask, spread), encoded], axis=-1))

    def _held_frame(self, job: Job) -> jax.Array:
        """The encoded first frame [B, 1, Y, X, C]."""
        return self.rows(self._encode(_at_size(job.images, job.size), self._spread(job)))

    def _encode(self, video: np.ndarray, spread: NamedSharding | None) -> jax.Array:
        return self.programs.run("encode", _encode_video, self.vae, put(video, spread), out_shardings=spread)


def _encode_text(encoder, ids_BL, valid_BL):
    return jnp.where(valid_BL[..., None], encoder(ids_BL, valid_BL), 0)


def _encode_image(encoder, pixels):
    return encoder(pixels)


def _encode_video(vae, video):
    return vae.normalise(vae.encode(video, chunk=VAE_CHUNK)[0])


def _at_size(images: list[Image.Image] | None, size: tuple[int, int]) -> np.ndarray:
    """Images at the video's size, [B, 1, H, W, 3] in [-1, 1]."""
    assert images is not None
    resized = [image.convert("RGB").resize(size, Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image, np.float32) / 127.5 - 1 for image in resized])[:, None]


def clean(prompt: str) -> str:
    """A prompt with plain quotes, mended characters, no HTML escapes and single spaces, as diffusers cleans it."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
