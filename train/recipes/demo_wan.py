"""Trains the diffusion transformer of demo-wan by flow matching, on captioned clips of moving digits.

    dit-train demo_wan --set vae=runs/demo-vae --set text=runs/demo-text --set out=runs/demo-wan
    dit-train demo_wan --set init=demo-wan --set vae=demo-wan --set text=demo-wan     (goes on from the shipped weights)

The first latent frame of a clip is an image's latent (the autoencoder is causal), so the run starts on first frames
alone, which cost a sixth of a clip and teach digits, colours and layout; then come clips, with a batch of first frames
every few steps. Latents are made once and kept under runs/cache, text embeddings in memory. The weights shipped
are the running mean.
On a CPU one device leaves cores idle; two (XLA_FLAGS=--xla_force_host_platform_device_count=2, --set data=2)
keep both busy.
About 1.5 hours on 2 CPU cores, minutes on a GPU; more steps still help.
Score: `dit-eval --model FOLDER --suite moving-digits` after `python -m train.export_demo`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.checkpoint import load_model, open_checkpoint
from dit_jax.config import UserError
from dit_jax.models.network import NetworkCall
from dit_jax.models.wan import Wan, WanConfig
from dit_jax.parameters import with_leaves
from train.data import LatentSet, LatentSource, cached_latents
from train.export_demo import export_pipeline
from train.loop import Hook, RunConfig, load_ema, newest_step, train
from train.losses import FlowSettings, flow_matching, pixels
from train.preview import Preview, write_preview
from train.recipes.demo_text import TOKENIZER, load_text_encoder, tokenized
from train.recipes.demo_vae import load_vae
from train.step import build_step, init_state, muon, params_of, schedule, training_mesh

SHIPPED = WanConfig(blocks=10, width=192, heads=8, head_width=24, mlp_width=512, text_width=128)
STILL, CLIP = 1, 17  # frames
LATENT_FRAMES = 5


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Options of the recipe; `init`, `vae` and `text` are runs, or a pipeline's folder, or demo-wan."""

    out: str = "runs/demo-wan"
    steps: int = 3000
    image_steps: int = 1400
    decay_steps: int = 400
    image_every: int = 4
    image_batch: int = 32
    clip_batch: int = 12
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


def run(config: Config) -> None:
    """Encodes what is missing from the cache, then trains."""
    if config.image_every < 2:
        raise UserError(f"image_every is {config.image_every}, expected 2 or more: one batch in so many is of stills")
    vae = _vae(config.vae)
    text, tokenizer = _text(config.text)
    if config.encode_only:
        _latents(config, vae, STILL, config.stills)
        _latents(config, vae, CLIP, config.clips)
        return
    mesh = training_mesh(config.data, config.fsdp)
    model = fresh_wan(config.seed) if not config.init else load_wan(config.init)
    rate = schedule(config.learning_rate, config.steps, warmup=50, decay=config.decay_steps)
    optimizer = muon(rate, rate)
    # On a CPU recomputing the blocks is quicker than writing down what their gradients need.
    settings = FlowSettings(shift=config.shift, call=NetworkCall(remat=True))
    loss = partial(flow_matching, settings=settings)
    step = build_step(model, loss, optimizer, mesh, ema_decay=0.998)
    embed = _embedder(text, tokenizer)
    batches = Batches(config, vae, embed)
    preview = Preview(vae=vae, embed=embed, shift=config.shift, folder=Path(config.out) / "previews", mesh=mesh)

    def show(state, taken: int) -> dict[str, float] | None:
        frames = 1 if taken <= config.image_steps else LATENT_FRAMES
        return write_preview(preview, with_leaves(model, state.ema), frames, taken)

    def export(state, taken: int) -> None:
        if config.export:
            export_pipeline(config.export, with_leaves(model, state.ema), vae, text, _tokenizer_folder(config.text))

    hooks = (Hook(config.export_every, export), Hook(config.preview_every, show))
    train(config, init_state(model, optimizer, mesh), step, batches, hooks)


def fresh_wan(seed: int) -> Wan:
    """Random weights; what feeds the residual stream and the output starts small, so that training starts smoothly."""

    def start() -> Wan:
        model = Wan(SHIPPED, nnx.Rngs(seed))
        return with_leaves(model, {name: leaf * _start_scale(name) for name, leaf in params_of(model).items()})

    return jax.jit(start)()


def _start_scale(name: str) -> float:
    if name == "out.kernel":
        return 0.05
    return 0.3 if name.endswith(("o.kernel", "mlp.down.kernel")) else 1.0


def load_wan(source: str) -> Wan:
    """The transformer of a run (its running mean), or of a pipeline's folder or demo-wan, in fp32."""
    if newest_step(source) is None:
        return load_model(open_checkpoint(source), "transformer", dtype=jnp.float32)  # type: ignore[return-value]
    abstract = nnx.eval_shape(lambda: Wan(SHIPPED, nnx.Rngs(0)))
    return with_leaves(abstract, {name: jnp.asarray(leaf) for name, leaf in load_ema(source).items()})


class Batches:
    """The host batch of any step: first frames until `image_steps`, then clips and, each `image_every`-th, first
    frames.
    """

    def __init__(self, config: Config, vae, embed):
        self.config, self.vae, self.embed = config, vae, embed
        self.sets: dict[int, tuple[LatentSet, np.ndarray]] = {}
        self.blank = embed([""])[0]

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        config = self.config
        into_clips = position - config.image_steps
        between = max(0, into_clips + 1) // config.image_every  # batches of stills among those of clips so far
        if into_clips < 0:
            return self._batch(STILL, config.image_batch, position, position)
        if into_clips % config.image_every == config.image_every - 1:
            return self._batch(STILL, config.image_batch, position, config.image_steps + between - 1)
        return self._batch(CLIP, config.clip_batch, position, into_clips - between)

    def _batch(self, frames: int, size: int, position: int, turn: int) -> dict[str, np.ndarray]:
        latents, text = self._set(frames)
        picked = latents.indices(size, self.config.seed, turn)
        dropped = np.random.default_rng([self.config.seed, position]).random(size) < self.config.caption_dropout
        embedded = np.where(dropped[:, None, None], self.blank, text[picked])
        return {"latents": latents.latents[picked], "text": embedded}

    def _set(self, frames: int) -> tuple[LatentSet, np.ndarray]:
        if frames not in self.sets:
            count = self.config.stills if frames == STILL else self.config.clips
            latents = _latents(self.config, self.vae, frames, count)
            self.sets[frames] = latents, self.embed(latents.captions)
        return self.sets[frames]


def _latents(config: Config, vae, frames: int, count: int) -> LatentSet:
    source = LatentSource(folder=Path(config.cache), tag=_hash(vae), seed=config.seed + frames, frames=frames)
    return cached_latents(source, count, partial(_encode, vae))


@jax.jit
def _encode(vae, video) -> jax.Array:
    return vae.normalise(vae.encode(pixels(video))[0])


def _hash(vae) -> str:
    """Names a cache after the weights that made it."""
    digest = hashlib.sha256(repr(dataclasses.asdict(vae.config)).encode())
    for name, leaf in params_of(vae).items():
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:10]


def _vae(source: str):
    if newest_step(source) is not None:
        return load_vae(source)
    return load_model(open_checkpoint(source), "vae", dtype=jnp.float32)


def _text(source: str):
    if newest_step(source) is not None:
        return load_text_encoder(source)
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(source)
    return load_model(checkpoint, "text_encoder"), AutoTokenizer.from_pretrained(checkpoint.folder / TOKENIZER)


def _tokenizer_folder(source: str) -> Path:
    return (Path(source) if newest_step(source) is not None else open_checkpoint(source).folder) / TOKENIZER


def _embedder(text, tokenizer):
    """Captions to embeddings fp16 [N, 32, 128], zero behind each caption's end, as Wan's pipelines have them."""

    def embed(captions: list[str]) -> np.ndarray:
        group = 256 if len(captions) > 64 else 16
        padded = captions + [""] * (-len(captions) % group)
        parts = [_states(text, *tokenized(tokenizer, padded[i : i + group])) for i in range(0, len(padded), group)]
        return np.concatenate([np.asarray(part, np.float16) for part in parts])[: len(captions)]

    return embed


@jax.jit
def _states(text, ids, valid) -> jax.Array:
    return text(ids, valid) * valid[..., None]
