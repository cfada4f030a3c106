"""FLUX.1: text to images, with the guidance that dev is told, and real guidance (`true_cfg`) for either.

Shapes: B samples, R batch rows (guidance branches of a sample next to each other), L text tokens, E text width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.network import Conditioning
from dit_jax.sampling.sampler import Guided
from dit_jax.sampling.schedules import Schedule, Shift
from infer.loras import Held
from infer.pipeline import Pipeline, interleaved
from infer.request import Defaults, Job
from infer.segments import Stage
from infer.side_files import load_tokenizer, read_flux_shift

TEXT_TOKENS = 512  # of T5, at most
USUAL = Defaults(size=(1024, 1024), frames=1, steps=28, guidance=3.5, solver="euler", video=False)


class FluxPipeline(Pipeline):
    """A FLUX.1 pipeline: CLIP tells the text as a whole, T5 its words."""

    def _usual(self) -> Defaults:
        return USUAL

    def _read_shift(self) -> Shift:
        return read_flux_shift(self.checkpoint)

    def lora_models(self) -> dict[str, Held]:
        held = vars(self)
        return {
            "transformer": (held, "transformer"),
            "text_encoder": (held, "clip"),
            "text_encoder_2": (held, "text_encoder"),
        }

    def _load_models(self, dtype: Any, offload_expert: bool) -> None:
        self.clip_tokenizer = load_tokenizer(self.checkpoint, "tokenizer")
        self.tokenizer = load_tokenizer(self.checkpoint, "tokenizer_2")
        self.transformer = self._load("transformer", dtype)
        self.clip = self._load("text_encoder", dtype)
        self.text_encoder = self._load("text_encoder_2", dtype)
        self.vae = self._load("vae", jnp.float32)

    def encode_text(self, prompts: list[str]) -> tuple[jax.Array, jax.Array]:
        """(text embeddings [B, L, E] with those of the padding, pooled embeddings [B, E'])."""
        length = min(TEXT_TOKENS, self.tokenizer.model_max_length)
        ids = self._token_ids(self.tokenizer, prompts, length)
        clip_ids = self._token_ids(self.clip_tokenizer, prompts, self.clip.config.positions)
        text = self.programs.run("text", _encode, self.text_encoder, ids)
        return text, self.programs.run("pooled", _pool, self.clip, clip_ids)

    def _token_ids(self, tokenizer, prompts: list[str], length: int) -> jax.Array:
        ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        return self.rows(ids["input_ids"].astype(np.int32))

    def stages(self, job: Job, schedule: Schedule) -> list[Stage]:
        denoiser = self._denoiser(job)
        return [Stage(first=0, stop=job.steps, denoiser=lambda: denoiser)]

    def _denoiser(self, job: Job) -> Guided:
        branches = 2 if job.true_cfg > 1 else 1
        text, pooled = self.embedded(job.prompts)
        if branches == 2:
            negative_text, negative_pooled = self.embedded(job.negative_prompts)
            text, pooled = interleaved(text, negative_text), interleaved(pooled, negative_pooled)
        text, pooled = self.rows(text), self.rows(pooled)
        told = self.rows(np.full(len(pooled), job.guidance, np.float32)) if self.transformer.config.guidance else None
        return Guided(
            model=self.transformer,
            conditioning=Conditioning(text, pooled=pooled, guidance=told),
            guidance_scale=self.replicated(np.float32(job.true_cfg)),
            branches=branches,
        )


def _encode(encoder, ids_BL):
    return encoder(ids_BL)


def _pool(encoder, ids_BL):
    return encoder(ids_BL).pooled
