"""What turns media and captions into what a transformer is trained on: a pipeline's VAE and encoders, without its
transformers.

Shapes: B examples, T Y X latent grid, C latent channels, L text tokens, E text width, I image tokens, H W pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.method_parts import transformers
from dit_jax.config import UserError
from infer.loading import BACKBONES
from infer.pipeline import VAE_CHUNK, Pipeline, put
from infer.placement import picture_sharding
from infer.request import Job
from train.buckets import Bucket
from train.losses import pixels

_WHOLE = 1 << 30  # bytes of a component that are hashed to the last


class Encoders(Pipeline):
    """A pipeline that encodes and never denoises; it stands before a backbone's class.

    What the transformer is told comes from the pipeline's own denoiser, so that training tells it the very same.
    """

    def _load(self, name: str, dtype: Any):
        # The transformers stay on disk: only their sizes are asked for.
        if name in transformers(self.checkpoint):
            return self.checkpoint.component(name).abstract
        return super()._load(name, dtype)

    def embedded(self, prompts: Sequence[str]) -> Any:
        """All captions in one batch: none comes again soon."""
        return self.encode_text(list(prompts))

    def encode(self, captions: Sequence[str], bucket: Bucket, video: np.ndarray) -> dict[str, np.ndarray]:
        """Latents of uint8 [B, T, H, W, 3], and what the transformer is told beside them; all fp32.

        latents      [B, T, Y, X, C], normalised
        text         embeddings [B, L, E]
        pooled       of FLUX: an embedding of each caption as a whole [B, E']
        image        of a Wan with an image encoder: its states of the first (and last) frame [B, I, E'']
        first_frame  of a Wan that is given frames as channels: these channels [B, T, Y, X, C']
        """
        with self.on_mesh():
            _, rows, columns, _ = self.latents_shape(bucket.size, bucket.frames)
            spread = None if self.mesh is None else picture_sharding(self.mesh, len(video), rows, columns)
            latents = self.programs.run("latents", _latents, self.vae, put(video, spread), out_shardings=spread)
        return {"latents": np.asarray(latents)} | self.told(captions, bucket, video)

    def told(self, captions: Sequence[str], bucket: Bucket, video: np.ndarray) -> dict[str, np.ndarray]:
        """What `encode` gives besides latents."""
        job = self._job(list(captions), bucket, video)
        with self.on_mesh():
            denoiser = self.stages(job, self.schedule(job))[0].denoiser()
        text, image, pooled, _ = denoiser.conditioning
        arrays = {"text": text, "pooled": pooled, "image": image, "first_frame": denoiser.extra}
        return {name: np.asarray(array, np.float32) for name, array in arrays.items() if array is not None}

    def _job(self, captions: list[str], bucket: Bucket, video: np.ndarray) -> Job:
        """One step without guidance, so that a caption has one row."""
        given = self.limits
        return Job(
            prompts=captions,
            negative_prompts=[""] * len(captions),
            seeds=[0] * len(captions),
            size=bucket.size,
            frames=bucket.frames,
            steps=1,
            guidance=1.0,
            true_cfg=1.0,
            solver=self.defaults.solver,
            images=_images(video[:, 0]) if given.image == "always" else None,
            last_images=_images(video[:, -1]) if given.last_image == "always" else None,
        )


def _images(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


def _latents(vae, video):
    return vae.normalise(vae.encode(pixels(video), chunk=VAE_CHUNK)[0]).astype(jnp.float32)


# Class of the transformer -> what encodes for it.
ENCODERS: dict[str, Any] = {
    name: type(f"{backbone.__name__}Encoders", (Encoders, backbone), {}) for name, backbone in BACKBONES.items()
}


def load_encoders(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> Encoders:
    """The VAE and the encoders of a pipeline; `path`, `mesh` and dtypes as of `infer.load_pipeline`."""
    checkpoint = open_checkpoint(path)
    if not checkpoint.is_pipeline:
        raise UserError(
            f"{path} is a lone model: expected a whole pipeline (transformer, VAE, text encoder, tokenizer)"
        )
    found = checkpoint.component("transformer").class_name
    if found not in ENCODERS:
        raise UserError(f"{path} has a {found}: expected {' or '.join(ENCODERS)}; use one of these models")
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    folder = Path(path).expanduser()
    name = folder.resolve().name if folder.exists() else str(path)
    return ENCODERS[found](checkpoint, name, mesh, dtype, False)


def encoder_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Component -> ten hex digits of its config and weights, of all that encode; the VAE first.

    Of a component larger than 1 GiB only the first slice of each leaf is hashed: this tells models apart and proves no
    integrity. The same weights in two layouts have one hash.
    """
    names = [name for name in checkpoint.settings if name not in transformers(checkpoint)]
    return {name: _hash(checkpoint, name) for name in sorted(names, key=lambda name: (name != "vae", name))}


def _hash(checkpoint: Checkpoint, name: str) -> str:
    digest = hashlib.sha256(repr(dataclasses.asdict(checkpoint.component(name).config)).encode())
    leaves = sorted(checkpoint.leaves(name).items())
    large = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves) > _WHOLE
    for path, leaf in leaves:
        digest.update(f"{path} {leaf.shape} {leaf.dtype}".encode())
        first = tuple(slice(0, 1) if large and axis == 0 else slice(None) for axis in range(len(leaf.shape)))
        digest.update(leaf.rectangle(first).tobytes())
    return digest.hexdigest()[:10]
