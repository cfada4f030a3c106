"""What the recipes of the demo models share: a smooth start, weights of a run or a checkpoint, latents kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from convert.checkpoint import load_model, open_checkpoint
from dit_jax.parameters import with_leaves
from train.checkpoints import load_ema, newest_step
from train.data import LatentSet, LatentSource, Maker, cached_latents, picture_maker, weights_hash
from train.loop import RunConfig
from train.losses import pixels
from train.step import params_of

FREE = RunConfig.FREE | {"cache", "encode_only", "preview_every", "export_every", "export"}  # of the transformers


def smooth_start(make: Callable[[], Any]) -> Any:
    """Random weights; what feeds the residual stream and the output starts small, so that training starts smoothly."""

    def start():
        model = make()
        return with_leaves(model, {name: leaf * _start_scale(name) for name, leaf in params_of(model).items()})

    return jax.jit(start)()


def _start_scale(name: str) -> float:
    if name == "out.kernel":
        return 0.05
    return 0.3 if name.endswith(("o.kernel", "mlp.down.kernel")) else 1.0


def trained(out: str, make: Callable[[], Any], part: str = "") -> Any:
    """A model with the running mean of a run, or of the `part.` of it."""
    weights, abstract = load_ema(out), nnx.eval_shape(make)
    prefix = part and f"{part}."
    return with_leaves(abstract, {name: jnp.asarray(weights[prefix + name]) for name in params_of(abstract)})


def of_run_or_checkpoint(source: str, component: str, of_run: Callable[[str], Any]) -> Any:
    """What `of_run` makes of a run; of a pipeline's folder or a shipped model, its component in fp32."""
    if newest_step(source) is not None:
        return of_run(source)
    return load_model(open_checkpoint(source), component, dtype=jnp.float32)


def folder_of(source: str) -> Path:
    """The folder of a run, of a pipeline or of a shipped model."""
    return Path(source) if newest_step(source) is not None else open_checkpoint(source).folder


def latents_of(vae, cache: str, name: str, make: Maker, count: int, group: int = 32) -> LatentSet:
    """The first `count` examples as normalised latents, kept under `cache` by the VAE's weights, `name` and the look of
    the first example."""
    look = hashlib.sha256(make(range(1))[0].tobytes()).hexdigest()[:6]
    source = LatentSource(folder=Path(cache) / f"{weights_hash(vae)}-train-{name}-{look}", make=make, group=group)
    return cached_latents(source, count, partial(_encode, vae))


def picture_latents(vae, cache: str, size: int, seed: int, count: int) -> LatentSet:
    """Pictures of standing digits of `size` pixels as latents."""
    return latents_of(vae, cache, f"{size}px-{seed + size}", picture_maker(seed + size, size), count)


@jax.jit
def _encode(vae, video) -> jax.Array:
    return vae.normalise(vae.encode(pixels(video))[0])
