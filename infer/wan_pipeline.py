"""Wan 2.1: text, or an image and text, to video.

Shapes: B samples, R batch rows (guidance branches of a sample next to each other), L text tokens, E text width, I image
tokens, T Y X latent grid, C latent channels.
"""

from __future__ import annotations

import html
import re
from typing import Any

import ftfy
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dit_jax.models.clip import preprocess
from dit_jax.models.network import Conditioning
from dit_jax.models.wan import TEXT_TOKENS_WITH_IMAGE
from dit_jax.sampling.sampler import Guided
from infer.pipeline import VAE_CHUNK, Pipeline, interleaved, put
from infer.request import Job
from infer.side_files import check_supported, load_tokenizer, read_shift


class WanPipeline(Pipeline):
    """A Wan 2.1 pipeline, with an image branch or without."""

    def _load_models(self, dtype: Any) -> None:
        check_supported(self.checkpoint)
        self.shift = read_shift(self.checkpoint)
        self.tokenizer = load_tokenizer(self.checkpoint, "tokenizer")
        self.transformer = self._load("transformer", dtype)
        self.text_encoder = self._load("text_encoder", dtype)
        self.vae = self._load("vae", jnp.float32)
        self.takes_image = self.transformer.config.image_width is not None
        self.image_encoder = self._load("image_encoder", jnp.float32) if self.takes_image else None

    @property
    def text_tokens(self) -> int:
        """Length that text is padded to: Wan's 512, or the tokenizer's own limit where that is shorter."""
        return TEXT_TOKENS_WITH_IMAGE if self.takes_image else min(512, self.tokenizer.model_max_length)

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
            text = interleaved(text, self.encode_text([job.negative_prompt] * len(job.prompts)))
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
        spread = self._spread(job)
        encoded = self.programs.run("encode", _encode_video, self.vae, put(video, spread), out_shardings=spread)
        mask = np.zeros((*encoded.shape[:-1], self.vae.config.time_factor), np.float32)
        mask[:, 0] = 1
        extra = self._rows(jnp.concatenate([put(mask, spread), encoded], axis=-1))
        return jnp.repeat(states, branches, axis=0), extra


def _encode_text(encoder, ids_BL, valid_BL):
    return jnp.where(valid_BL[..., None], encoder(ids_BL, valid_BL), 0)


def _encode_image(encoder, pixels):
    return encoder(pixels)


def _encode_video(vae, video):
    return vae.normalise(vae.encode(video, chunk=VAE_CHUNK)[0])


def clean(prompt: str) -> str:
    """A prompt with plain quotes, mended characters, no HTML escapes and single spaces, as diffusers cleans it."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
