"""A pipeline from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from convert.cache import LIMIT, Cache, with_cached_weights
from convert.checkpoint import Checkpoint, open_checkpoint
from convert.wan import LOW_NOISE
from dit_jax.config import UserError
from infer.flux_pipeline import FluxPipeline
from infer.loras import LoraChoice
from infer.pipeline import Pipeline
from infer.wan_pipeline import WanPipeline

# Class of the transformer -> the pipeline that runs it.
BACKBONES: dict[str, type[Pipeline]] = {"WanTransformer3DModel": WanPipeline, "FluxTransformer2DModel": FluxPipeline}


def load_pipeline(
    path: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    lora: Sequence[LoraChoice] = (),
    allow_unmatched: bool = False,
    offload_expert: bool = False,
    cache_dir: str | Path | None = None,
    cache_limit: int = LIMIT,
    progress: tqdm | None = None,
) -> Pipeline:
    """A pipeline from a diffusers directory, a native checkpoint, the original files, a hub id or a shipped model.

    dtype           of the transformer and the text encoders; by default fp32 on a CPU, bf16 elsewhere. The VAE and the
                    image encoder stay in fp32.
    lora            LoRAs to merge, and `allow_unmatched`: see `Pipeline.set_loras`
    offload_expert  of a model with two experts, keep one at a time on the devices and read the other from the
                    checkpoint when its turn comes
    cache_dir       where converted weights are kept, so that they are converted once (`convert/cache.py`); None keeps
                    none
    cache_limit     of that folder, in bytes
    progress        a bar that is told of the bytes hashed and converted for it
    """
    checkpoint = open_checkpoint(path)
    if not checkpoint.is_pipeline:
        raise UserError(
            f"{path} is a lone model: expected a whole pipeline (transformer, VAE, text encoder, tokenizer)"
        )
    if offload_expert and LOW_NOISE not in checkpoint.settings:
        raise UserError(
            f"{path} has one transformer: expected two where one is to be offloaded; leave out --offload-expert"
        )
    if dtype is None:
        platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
        dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    if cache_dir is not None:
        cache = Cache(folder=Path(cache_dir).expanduser(), limit=cache_limit, progress=progress)
        checkpoint = with_cached_weights(checkpoint, cache)
    folder = Path(path).expanduser()
    name = folder.resolve().name if folder.exists() else str(path)
    pipe = _backbone(checkpoint)(checkpoint, name, mesh, dtype, offload_expert)
    if lora:
        pipe.set_loras(lora, allow_unmatched=allow_unmatched)
    return pipe


def _backbone(checkpoint: Checkpoint) -> type[Pipeline]:
    found = checkpoint.component("transformer").class_name
    if found not in BACKBONES:
        raise UserError(
            f"{checkpoint.folder} has a {found}: expected {' or '.join(BACKBONES)}; use one of these models"
        )
    return BACKBONES[found]
