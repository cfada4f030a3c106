"""Trains the diffusion transformer of demo-flux by flow matching, on captioned pictures of digits.

    dit-train demo_flux --set vae=runs/demo-flux-vae --set text=runs/demo-flux-text --set out=runs/demo-flux
    dit-train demo_flux --set init=demo-flux --set vae=demo-flux --set text=demo-flux    (goes on from what ships)

Close-ups come first, pictures of 64 pixels that one digit fills: a quarter of the tokens, and four times the share of
them on digits. Then windows, as large parts of whole pictures of 128 pixels at their own places (as in patch diffusion,
Wang et al., arXiv 2304.12526), teach where what stands; and whole pictures, with windows every few steps, how it hangs
together. The weights shipped are the running mean.
On a CPU one device leaves cores idle; two (XLA_FLAGS=--xla_force_host_platform_device_count=2, --set mesh=data=2)
keep both busy.
Score: `dit-eval --model FOLDER --suite digits` after `python -m train.export_demo_flux`. Reached by what ships: 77 % of
200 prompts with all digits right, 98 % with all colours (docs/demo-flux.md).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.checkpoint import load_model, open_checkpoint
from dit_jax.config import UserError
from dit_jax.models.flux import Flux, FluxConfig
from dit_jax.models.network import NetworkCall
from dit_jax.parameters import with_leaves
from infer.digit_grammar import Scene, caption, random_picture
from infer.digit_pictures import CLOSE_UP, SIZE, close_up
from infer.digit_reader import load_reader
from infer.picture_scores import read_picture
from train.batches import Batches, Kind, Stage, Window, in_groups
from train.checkpoints import newest_step
from train.data import LatentSet
from train.demo_models import FREE, folder_of, of_run_or_checkpoint, picture_latents, smooth_start, trained
from train.demo_tokenizer import token_ids
from train.export_demo_flux import export_pipeline
from train.loop import Hook, Outcome, RunConfig, train
from train.losses import FlowSettings, flow_matching
from train.optimizers import muon, schedule
from train.placement import training_mesh
from train.preview import Preview
from train.recipes.demo_flux_text import CLIP_TOKENIZER, T5_TOKENIZER, TextEncoders, load_text_encoders
from train.recipes.demo_flux_vae import load_vae
from train.step import TrainStep, alone

# Heads rotate by y and x alone: t is 0 in every picture, and four frequencies an axis tell 16 places apart.
SHIPPED = FluxConfig(
    double_blocks=4,
    single_blocks=8,
    width=128,
    heads=8,
    head_width=16,
    mlp_width=512,
    in_channels=4,
    out_channels=4,
    text_width=96,
    pooled_width=64,
    guidance=False,
    rope_widths=(0, 8, 8),
)
WINDOW = 7  # tokens a side, of the 16 of a picture: about as large as a digit
ON_DIGITS = 0.8  # of the windows
PREVIEW_SEED = 5


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Options of the recipe; `init`, `vae` and `text` are runs, or a pipeline's folder, or demo-flux."""

    FREE: ClassVar[frozenset[str]] = FREE

    out: str = "runs/demo-flux"
    steps: int = 12_000
    close_up_steps: int = 1000
    window_steps: int = 4000
    decay_steps: int = 1500
    window_every: int = 3
    close_up_batch: int = 64
    window_batch: int = 80
    picture_batch: int = 16
    close_ups: int = 32_768
    pictures: int = 24_576
    learning_rate: float = 2e-3
    shift: float = 2.0
    caption_dropout: float = 0.1
    vae: str = "runs/demo-flux-vae"
    text: str = "runs/demo-flux-text"
    init: str = ""
    cache: str = "runs/cache"
    encode_only: bool = False
    preview_every: int = 400
    export_every: int = 400
    export: str = ""


def run(config: Config) -> Outcome | None:
    """Encodes what is missing from the cache, then trains."""
    if config.window_every < 2:
        raise UserError(
            f"window_every is {config.window_every}, expected 2 or more: one batch in so many is of windows"
        )
    vae, text = of_run_or_checkpoint(config.vae, "vae", load_vae), load_text(config.text)
    close_ups = Kind(load=partial(_latents, config, vae, CLOSE_UP, config.close_ups), batch=config.close_up_batch)
    load = partial(_latents, config, vae, SIZE, config.pictures)
    pictures = Kind(load=load, batch=config.picture_batch)
    windows = Kind(
        load=load, batch=config.window_batch, window=Window(tokens=WINDOW, patch=SHIPPED.patch[-1], on=ON_DIGITS)
    )
    if config.encode_only:
        _ = close_ups.latents, pictures.latents
        return None
    mesh = training_mesh(config.mesh)
    model = load_flux(config.init) if config.init else smooth_start(lambda: Flux(SHIPPED, rngs=nnx.Rngs(config.seed)))
    rate = schedule(config.learning_rate, config.steps, warmup=50, decay=config.decay_steps)
    optimizer = muon(rate, rate)
    # On a CPU computing blocks again, all but attention, is quicker than writing down what their gradients need.
    settings = FlowSettings(shift=config.shift, call=NetworkCall(remat="attention"))
    loss = partial(flow_matching, settings=settings)
    step = TrainStep(model, alone(loss, optimizer, ema_decay=0.998), mesh)
    embed = in_groups(partial(_embed, text))
    batches = Batches(
        kinds={"close-ups": close_ups, "windows": windows, "pictures": pictures},
        stages=(
            Stage(kind="close-ups", steps=config.close_up_steps),
            Stage(kind="windows", steps=config.window_steps, beside="pictures", every=config.window_every),
            Stage(kind="pictures", beside="windows", every=config.window_every),
        ),
        embed=embed,
        caption_dropout=config.caption_dropout,
        seed=config.seed,
    )
    folder = Path(config.out) / "previews"
    preview = Preview(vae=vae, embed=embed, shift=config.shift, folder=folder, mesh=mesh, guidance=3.0)

    def show(state, taken: int) -> dict[str, float]:
        size = CLOSE_UP if taken <= config.close_up_steps else SIZE
        return _preview(preview, with_leaves(model, state.ema), size, taken)

    def export(state, taken: int) -> None:
        if config.export:
            export_pipeline(config.export, with_leaves(model, state.ema), vae, text, folder_of(config.text))

    hooks = (Hook(config.export_every, export), Hook(config.preview_every, show))
    return train(config, step.init(model), step, batches, hooks)


def load_flux(source: str) -> Flux:
    """The transformer of a run (its running mean), or of a pipeline's folder or demo-flux, in fp32."""
    return of_run_or_checkpoint(source, "transformer", partial(trained, make=lambda: Flux(SHIPPED, rngs=nnx.Rngs(0))))


def _latents(config: Config, vae, size: int, count: int) -> LatentSet:
    return picture_latents(vae, config.cache, size, config.seed, count)


def load_text(source: str) -> TextEncoders:
    """The text encoders of a run, of a pipeline's folder or of demo-flux."""
    if newest_step(source) is not None:
        return load_text_encoders(source)
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(source)
    return TextEncoders(
        t5=load_model(checkpoint, "text_encoder_2", dtype=jnp.float32),  # type: ignore[arg-type]
        clip=load_model(checkpoint, "text_encoder", dtype=jnp.float32),  # type: ignore[arg-type]
        t5_tokenizer=AutoTokenizer.from_pretrained(checkpoint.folder / T5_TOKENIZER),
        clip_tokenizer=AutoTokenizer.from_pretrained(checkpoint.folder / CLIP_TOKENIZER),
    )


def _embed(text: TextEncoders, captions: list[str]) -> dict[str, jax.Array]:
    """Text [N, 16, 96] with the states of the padding, and pooled text [N, 64], as FLUX's pipelines have them."""
    ids, clip_ids = token_ids(text.t5_tokenizer, captions)[0], token_ids(text.clip_tokenizer, captions)[0]
    return {"text": _states(text.t5, ids), "pooled": _pooled(text.clip, clip_ids)}


@jax.jit
def _states(encoder, ids) -> jax.Array:
    return encoder(ids)


@jax.jit
def _pooled(encoder, ids) -> jax.Array:
    return encoder(ids).pooled


def _preview(preview: Preview, model, size: int, taken: int) -> dict[str, float]:
    """Draws a fixed set of prompts; the share of them fully right if the reader of `dit-eval` is at hand.

    It is not trained for a look.
    """
    rng = random.Random(PREVIEW_SEED)
    scenes: list[Scene] = [random_picture(rng) for _ in range(24)]
    if size == CLOSE_UP:
        scenes = [close_up(scene) for scene in scenes]
    side = size // preview.vae.config.space_factor  # type: ignore[attr-defined]
    prompts = [caption(scene, rng, of_picture=True) for scene in scenes]
    pictures = preview(model, prompts, (1, side, side, SHIPPED.in_channels), taken)[:, 0]
    reader = load_reader()
    readings = [read_picture(picture, scene, reader) for picture, scene in zip(pictures, scenes, strict=True)]
    right = np.concatenate([reading.right for reading in readings]).mean(0)
    everything = float(np.mean([reading.everything for reading in readings]))
    return {"preview_all": everything, "preview_digit": float(right[0]), "preview_colour": float(right[1])}
