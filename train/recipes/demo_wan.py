"""Trains the diffusion transformer of demo-wan by flow matching, on captioned clips of moving digits.

    dit-train demo_wan --set vae=runs/demo-vae --set text=runs/demo-text --set out=runs/demo-wan
    dit-train demo_wan --set init=demo-wan --set vae=demo-wan --set text=demo-wan     (goes on from the shipped weights)

The first latent frame of a clip is an image's latent (the autoencoder is causal), so the run starts on single pictures:
close-ups of 64 pixels that one digit fills, a quarter of the tokens of a frame and four times the share of them on
digits; then windows of first frames, parts as large as a close-up at their own places (as in patch diffusion, Wang et
al., arXiv 2304.12526), which teach digits everywhere, with whole frames in between, which teach layout; then windows of
clips, which teach motion; then clips. A batch of the kind before comes every few steps.
Latents are made once and kept under runs/cache, text embeddings in memory. The weights shipped are the running mean.
On a CPU one device leaves cores idle; two (XLA_FLAGS=--xla_force_host_platform_device_count=2, --set mesh=data=2)
keep both busy.
Some two hours on 2 idle CPU cores, minutes on a GPU.
Score: `dit-eval --model FOLDER --suite moving-digits` after `python -m train.export_demo`. Reached by what ships, in
two runs of 13,300 steps together: 80.0 % of 200 prompts with all digits right, 98.5 % with all colours, 99.0 % with all
directions (docs/demo-wan.md).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from flax import nnx

from convert.checkpoint import load_model, open_checkpoint
from dit_jax.config import UserError
from dit_jax.models.network import NetworkCall
from dit_jax.models.wan import Wan, WanConfig
from dit_jax.parameters import with_leaves
from infer.digit_grammar import caption, random_scene
from infer.digit_pictures import CLOSE_UP, close_up
from infer.digit_reader import load_reader
from infer.digit_scores import read_clip
from train.batches import Batches, Kind, Stage, Window, in_groups
from train.checkpoints import newest_step
from train.data import LatentSet, clip_maker
from train.demo_models import FREE, folder_of, latents_of, of_run_or_checkpoint, picture_latents, smooth_start, trained
from train.demo_tokenizer import token_ids
from train.export_demo import export_pipeline
from train.loop import Hook, Outcome, RunConfig, train
from train.losses import FlowSettings, flow_matching
from train.optimizers import muon, schedule
from train.placement import training_mesh
from train.preview import Preview
from train.recipes.demo_text import TOKENIZER, load_text_encoder
from train.recipes.demo_vae import load_vae
from train.step import TrainStep, alone

SHIPPED = WanConfig(blocks=10, width=192, heads=8, head_width=24, mlp_width=512, text_width=128)
STILL, CLIP = 1, 17  # frames
CLOSE_UP_SHAPE, STILL_SHAPE, CLIP_SHAPE = (1, 8, 8, 16), (1, 16, 16, 16), (5, 16, 16, 16)  # of latents
WINDOW = 4  # tokens a side, of the 8 of a frame
ON_DIGITS = 0.8  # of the windows
PREVIEW_SEED = 5


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Options of the recipe; `init`, `vae` and `text` are runs, or a pipeline's folder, or demo-wan."""

    FREE: ClassVar[frozenset[str]] = FREE

    out: str = "runs/demo-wan"
    steps: int = 8500
    close_up_steps: int = 1000
    image_steps: int = 2500
    window_steps: int = 3000
    decay_steps: int = 1500
    earlier_every: int = 4
    close_up_batch: int = 64
    image_batch: int = 32
    image_window_batch: int = 112
    window_batch: int = 24
    clip_batch: int = 8
    close_ups: int = 16_384
    stills: int = 16_384
    clips: int = 3072
    learning_rate: float = 2e-3
    shift: float = 3.0
    caption_dropout: float = 0.1
    vae: str = "runs/demo-vae"
    text: str = "runs/demo-text"
    init: str = ""
    cache: str = "runs/cache"
    encode_only: bool = False
    preview_every: int = 200
    export_every: int = 200
    export: str = ""


def run(config: Config) -> Outcome | None:
    """Encodes what is missing from the cache, then trains."""
    if config.earlier_every < 2:
        raise UserError(
            f"earlier_every is {config.earlier_every}, expected 2 or more: one batch in so many is of an earlier kind"
        )
    vae = of_run_or_checkpoint(config.vae, "vae", load_vae)
    text, tokenizer = _text(config.text)
    if config.encode_only:
        _close_ups(config, vae)
        _latents(config, vae, STILL, config.stills)
        _latents(config, vae, CLIP, config.clips)
        return None
    mesh = training_mesh(config.mesh)
    model = load_wan(config.init) if config.init else smooth_start(lambda: Wan(SHIPPED, nnx.Rngs(config.seed)))
    rate = schedule(config.learning_rate, config.steps, warmup=50, decay=config.decay_steps)
    optimizer = muon(rate, rate)
    # On a CPU computing blocks again, all but attention, is quicker than writing down what their gradients need.
    settings = FlowSettings(shift=config.shift, call=NetworkCall(remat="attention"))
    loss = partial(flow_matching, settings=settings)
    step = TrainStep(model, alone(loss, optimizer, ema_decay=0.998), mesh)
    embed = _embedder(text, tokenizer)
    stills = partial(_latents, config, vae, STILL, config.stills)
    clips = partial(_latents, config, vae, CLIP, config.clips)
    window = Window(tokens=WINDOW, patch=SHIPPED.patch[-1], on=ON_DIGITS)
    batches = Batches(
        kinds={
            "close-ups": Kind(load=partial(_close_ups, config, vae), batch=config.close_up_batch),
            "stills": Kind(load=stills, batch=config.image_batch),
            "windows of stills": Kind(load=stills, batch=config.image_window_batch, window=window),
            "windows": Kind(load=clips, batch=config.window_batch, window=window),
            "clips": Kind(load=clips, batch=config.clip_batch),
        },
        stages=(
            Stage(kind="close-ups", steps=config.close_up_steps),
            Stage(kind="windows of stills", steps=config.image_steps, beside="stills", every=config.earlier_every),
            Stage(kind="windows", steps=config.window_steps, beside="windows of stills", every=config.earlier_every),
            Stage(kind="clips", beside="windows", every=config.earlier_every),
        ),
        embed=embed,
        caption_dropout=config.caption_dropout,
        seed=config.seed,
    )
    preview = Preview(vae=vae, embed=embed, shift=config.shift, folder=Path(config.out) / "previews", mesh=mesh)

    stills_end = config.close_up_steps + config.image_steps

    def show(state, taken: int) -> dict[str, float] | None:
        trained = with_leaves(model, state.ema)
        if taken <= config.close_up_steps:
            return _preview(preview, trained, CLOSE_UP_SHAPE, taken)
        return _preview(preview, trained, STILL_SHAPE if taken <= stills_end else CLIP_SHAPE, taken)

    def export(state, taken: int) -> None:
        if config.export:
            export_pipeline(config.export, with_leaves(model, state.ema), vae, text, folder_of(config.text) / TOKENIZER)

    hooks = (Hook(config.export_every, export), Hook(config.preview_every, show))
    return train(config, step.init(model), step, batches, hooks)


def load_wan(source: str) -> Wan:
    """The transformer of a run (its running mean), or of a pipeline's folder or demo-wan, in fp32."""
    return of_run_or_checkpoint(source, "transformer", partial(trained, make=lambda: Wan(SHIPPED, nnx.Rngs(0))))


def _close_ups(config: Config, vae) -> LatentSet:
    return picture_latents(vae, config.cache, CLOSE_UP, config.seed, config.close_ups)


def _latents(config: Config, vae, frames: int, count: int) -> LatentSet:
    seed, group = config.seed + frames, 32 if frames == STILL else 4
    return latents_of(vae, config.cache, f"{frames}f-{seed}", clip_maker(seed, frames), count, group)


def _text(source: str):
    if newest_step(source) is not None:
        return load_text_encoder(source)
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(source)
    return load_model(checkpoint, "text_encoder"), AutoTokenizer.from_pretrained(checkpoint.folder / TOKENIZER)


def _embedder(text, tokenizer):
    """Captions to embeddings fp16 [N, 32, 128], zero behind each caption's end, as Wan's pipelines have them."""
    return in_groups(lambda captions: {"text": _states(text, *token_ids(tokenizer, captions))})


def _preview(preview: Preview, model, shape: tuple[int, int, int, int], taken: int) -> dict[str, float]:
    """Draws a fixed set of prompts; the shares of right digits if the reader of `dit-eval` is at hand.

    It is not trained for a look. A still has no direction.
    """
    rng = random.Random(PREVIEW_SEED)
    scenes = [random_scene(rng) for _ in range(12)]
    if shape == CLOSE_UP_SHAPE:
        scenes = [close_up(scene) for scene in scenes]
    prompts = [caption(scene, rng, of_picture=shape == CLOSE_UP_SHAPE) for scene in scenes]
    video = preview(model, prompts, shape, taken)
    still = shape[0] == 1
    clips = np.repeat(video, 5, axis=1) if still else video
    reader = load_reader()
    right = np.concatenate([read_clip(clip, scene, reader).right for clip, scene in zip(clips, scenes, strict=True)])
    names = ("digit", "colour") if still else ("digit", "colour", "direction")
    return {f"preview_{name}": float(share) for name, share in zip(names, right.mean(0), strict=False)}


@jax.jit
def _states(text, ids, valid) -> jax.Array:
    return text(ids, valid) * valid[..., None]
