"""From a prompt to pictures: what every backbone's pipeline shares, each stage one compiled program a shape.

Shapes: B samples, F frames, T Y X latent grid, C latent channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from convert.checkpoint import Checkpoint, checkpoint_hash, leaf_reader
from convert.lora_keys import Target
from convert.method_parts import read_parts, transformers
from dit_jax.config import UserError
from dit_jax.flops import Cost, Shape, plan_cost, step_cost
from dit_jax.lora import Lora, merged_leaf, of_leaf
from dit_jax.methods.method import Measured, Part, RunRecord
from dit_jax.models.network import grid
from dit_jax.models.wan import WanConfig
from dit_jax.parameters import with_leaves
from dit_jax.sampling.schedules import Schedule, Shift
from dit_jax.sampling.solvers import SOLVERS
from dit_jax.sharding import batch_sharding, fetched, leaf_sharding, replicated
from infer.denoising import Denoising, Watch
from infer.loras import Held, LoraChoice, read_choice, replace_leaves
from infer.placement import picture_sharding
from infer.programs import Programs
from infer.request import Defaults, Job, Limits, Request, Scales, check, fill
from infer.result import Result
from infer.segments import Stage
from infer.side_files import read_defaults
from infer.text_cache import TextCache
from infer.variants import Chosen

NOT_FINITE = (
    "the final latents hold NaN or infinity: expected numbers; look for NaN weights with `dit-convert to-jax`, which "
    "names them, or load the pipeline with dtype=float32"
)
VAE_CHUNK = 1  # latent frames that the VAE works on at a time
Progress = Callable[[str, int, int], None]  # stage, done, total


class Pipeline(ABC):
    """`pipe(prompt, size=(W, H), steps=…, guidance=…, solver=…, seed=…)`; see `Request` for every option.

    A backbone's pipeline says which models it has (`_load_models`), what its transformers are told and when each runs
    (`stages`), and how its noise levels are shifted (`shift`); everything else is here.
    """

    vae: Any
    shift: Shift

    def __init__(
        self, checkpoint: Checkpoint, name: str, mesh: jax.sharding.Mesh | None, dtype: Any, offload_expert: bool
    ):
        self.checkpoint, self.name, self.mesh, self.programs = checkpoint, name, mesh, Programs()
        self.hash = checkpoint_hash(checkpoint)
        self._read_settings()
        self.loras: list[dict[str, Any]] = []  # name, hash and strength of each that is merged
        self._chosen: dict[str, list[tuple[Lora, float]]] = {}  # component -> what is merged into it
        self._read_leaf: dict[str, Callable[[str], jax.Array]] = {}
        self._merged_leaves: dict[str, frozenset[str]] = {}
        self.texts = TextCache()
        self._load_models(dtype, offload_expert)

    @abstractmethod
    def _load_models(self, dtype: Any, offload_expert: bool) -> None: ...

    @abstractmethod
    def stages(self, job: Job, schedule: Schedule) -> list[Stage]: ...

    @abstractmethod
    def _read_shift(self) -> Shift: ...

    def _read_settings(self) -> None:
        """How the checkpoint is sampled, and what methods need of it."""
        self.defaults, self.shift = read_defaults(self.checkpoint, self._usual()), self._read_shift()
        self.parts = {name: self._read_parts(name) for name in transformers(self.checkpoint)}

    def _usual(self) -> Defaults:
        """What the backbone is run with unless the model or the request says otherwise."""
        return Defaults()

    def _load(self, name: str, dtype: Any):
        model = self.checkpoint.component(name)
        placed = None
        if self.mesh is not None and model.axes:
            placed = partial(leaf_sharding, table=model.axes, mesh=self.mesh)
        read = leaf_reader(self.checkpoint, name, mesh=self.mesh, shardings=placed, dtype=dtype)
        self._read_leaf[name] = read
        loras = self._chosen.get(name, [])
        self._merged_leaves[name] = _names(loras)
        with self.on_mesh():
            leaves = {leaf: merged_leaf(read(leaf), of_leaf(leaf, loras)) for leaf in model.shapes}
        return with_leaves(model.abstract, leaves)

    def _read_parts(self, component: str) -> dict[str, Part]:
        parts = read_parts(self.checkpoint, component)
        return {name: part._replace(leaves=jax.tree.map(self.replicated, part.leaves)) for name, part in parts.items()}

    def take_settings(self, checkpoint: Checkpoint) -> None:
        """How this checkpoint is sampled and what methods need of it, in place of what came with the pipeline's own."""
        held, self.checkpoint = self.checkpoint, checkpoint
        try:
            self._read_settings()
        finally:
            self.checkpoint = held

    def lora_models(self) -> dict[str, Held]:
        """Component that a LoRA may add to -> where its model is held."""
        held = vars(self)
        return {"transformer": (held, "transformer"), "text_encoder": (held, "text_encoder")}

    def set_loras(self, loras: Sequence[LoraChoice], *, allow_unmatched: bool = False) -> None:
        """Merges these LoRAs, in place of those merged before; none unmerges.

        loras  files at strength 1, (file, strength) or, for the low-noise expert, (file, strength, "transformer_2")
        Merging starts from the checkpoint's own weights, which are read again where a LoRA had been added: nothing
        drifts, no second copy is kept, and nothing compiles again. An expert that is not on the devices gets them when
        it is read. Raises UserError, with the models as they were, for a LoRA that cannot be read or does not fit;
        `allow_unmatched` makes keys that match no layer, or that do not fit theirs, a warning.
        """
        models = self.lora_models()
        targets = {name: Target.of(self.checkpoint.component(name)) for name in models}
        chosen = [read_choice(choice, targets, allow_unmatched) for choice in loras]
        for component, held in models.items():
            parts = [(lora.parts[component], lora.strength) for lora in chosen if component in lora.parts]
            self._chosen[component] = parts
            if held[1] in held[0]:
                self._merge(component, held, parts)
        self.loras = [lora.describe() for lora in chosen]

    def _merge(self, component: str, held: Held, loras: Sequence[tuple[Lora, float]]) -> None:
        read, merged, wanted = self._read_leaf[component], self._merged_leaves[component], _names(loras)
        # Until all is done every one of them may have been merged into: an interruption is mended by the next call.
        self._merged_leaves[component] = merged | wanted

        def value(name: str, leaf: jax.Array) -> jax.Array:
            return merged_leaf(read(name) if name in merged else leaf, of_leaf(name, loras))

        with self.on_mesh():
            replace_leaves(held, merged | wanted, value)
        self._merged_leaves[component] = wanted
        self.texts.clear()

    def encode_text(self, prompts: list[str]) -> Any:
        """What the text encoders make of prompts: arrays with a row for each."""
        raise NotImplementedError(f"{type(self).__name__} has no text encoder")

    def embedded(self, prompts: Sequence[str]) -> Any:
        """`encode_text`, each prompt by itself and lately seen ones not again, so that what it gives does not depend on
        its neighbours."""
        found = [
            self.texts.get(prompt, lambda prompt: jax.tree.map(fetched, self.encode_text([prompt])))
            for prompt in prompts
        ]
        return jax.tree.map(lambda *rows: np.concatenate(rows), *found)

    def encode_ahead(self, job: Job) -> None:
        """Encodes what a job will ask for, so that it is there by then."""
        with self.on_mesh():
            self.embedded(job.prompts + job.negative_prompts)

    @property
    def transformer_config(self) -> Any:
        """Sizes of the transformer (of every expert)."""
        return self.checkpoint.component("transformer").config

    @property
    def limits(self) -> Limits:
        return Limits(
            space=self.vae.config.space_factor * self.transformer_config.patch[1],
            time=self.vae.config.time_factor,
            video=self.defaults.video,
            scales=scales_of(self.transformer_config),
        )

    def latents_shape(self, size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
        """(T, Y, X, C) of the latents of a video."""
        space, time = self.vae.config.space_factor, self.vae.config.time_factor
        return (frames - 1) // time + 1, size[1] // space, size[0] // space, self.vae.config.z_dim

    def tokens(self, size: tuple[int, int], frames: int) -> int:
        """Tokens of a video in the transformer."""
        return math.prod(grid((1, *self.latents_shape(size, frames)), self.transformer_config.patch))

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
        job = fill(request, self.defaults, self.limits.scales)
        check(job, self.limits)
        if job.plan.chooser:
            job.plan.chooser.breaks(job.steps)
        for name, parts in self.parts.items():
            model: Any = self.checkpoint.component(name).abstract
            job.plan.check(model.stacks, parts)
        return job

    def schedule(self, job: Job) -> Schedule:
        """The noise levels of a job."""
        shift = self.shift if job.shift is None else replace(self.shift, constant=job.shift, dynamic=False)
        return SOLVERS[job.solver].schedule(job.steps, shift, self.tokens(job.size, job.frames))

    def denoise(
        self,
        job: Job,
        progress: Progress | None = None,
        watch: Watch | None = None,
        chosen: Chosen | None = None,
    ) -> np.ndarray:
        """Final latents [B, T, Y, X, C] of a job, fp32 in the sampler's normalised units.

        watch   looks into every stage's denoiser
        chosen  is told which variant each step ran with, where the plan chooses among some (patch sizes), sample by
                sample
        """
        chooser = job.plan.chooser
        if chooser and chooser.by_latents and len(job.prompts) > 1:
            return self._one_by_one(job, progress, watch, chosen)
        run = Denoising(self, job, watch=watch, chosen=chosen)
        while not run.finished:
            if progress:
                progress("denoise", run.done, job.steps)
            run.advance()
            if progress:
                jax.block_until_ready(run.carry)
        if progress:
            progress("denoise", job.steps, job.steps)
        final = run.final()
        if not np.isfinite(final).all():
            raise UserError(NOT_FINITE)
        return final

    def _one_by_one(self, job: Job, progress: Progress | None, *told) -> np.ndarray:
        count = len(job.prompts)

        def of_sample(index: int) -> Progress | None:
            return progress and (lambda stage, done, total: progress(stage, index * total + done, count * total))

        return np.concatenate([self.denoise(job.single(index), of_sample(index), *told) for index in range(count)])

    @property
    def _cost_of_step(self) -> Callable[..., Cost]:
        return step_cost

    def cost(self, job: Job, record: RunRecord | None = None) -> Cost:
        """What denoising a job costs by arithmetic, and by what a run of it has shown where that decides."""
        with self.on_mesh():
            schedule = self.schedule(job)
            stages = self.stages(job, schedule)
            shape = Shape.of(stages[0].denoiser(), (len(job.prompts), *self.latents_shape(job.size, job.frames)))
        components = {stage.first: stage.component for stage in stages}
        methods = job.plan.told(self.parts[stages[0].component]).methods
        measured = {m.name: m.measured(record) for m in methods if isinstance(m, Measured)} if record else {}
        return plan_cost(
            self.transformer_config, shape, methods, job.steps,
            timesteps=list(map(float, schedule.timesteps)), stages=components, measured=measured,
            of_step=self._cost_of_step,
        )  # fmt: skip

    def decode(self, job: Job, latents: np.ndarray, progress: Progress | None = None, *, tiled: bool = False) -> Result:
        """Videos or images of final latents, `tiled` in overlapping tiles that take less memory."""
        if progress:
            progress("decode", 0, 1)
        frames = self.frames(self.decoding(job, latents, tiled=tiled))
        if progress:
            progress("decode", 1, 1)
        return Result(frames=frames, latents=latents, metadata=self.metadata(job), fps=self.defaults.fps)

    def decoding(self, job: Job, latents: np.ndarray, *, tiled: bool = False) -> jax.Array:
        """What `frames` makes frames of; it may still be on its way."""
        name, program = ("decode in tiles", _decode_tiled) if tiled else ("decode", _decode)
        with self.on_mesh():
            spread = self._spread(job)
            return self.programs.run(name, program, self.vae, put(latents, spread), out_shardings=spread)

    def frames(self, decoded: jax.Array) -> np.ndarray:
        """Videos uint8 [B, F, H, W, 3] or images [B, H, W, 3]."""
        frames = fetched(decoded)
        return frames if self.defaults.video else frames[:, 0]

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """The picture uint8 [H, W, 3] of a latent frame [Y, X, C]."""
        with self.on_mesh():
            video = self.programs.run("decode", _decode, self.vae, self.replicated(latents[None, None]))
            return np.asarray(video)[0, 0]

    def compile(self, job: Job) -> None:
        """Compiles all that a job needs, and does none of it but encode its text."""
        run = Denoising(self, job)
        run.compile()
        with self.on_mesh():
            spread = self._spread(job)
            latents = np.zeros(run.carry.latents.shape, np.float32)
            self.programs.compiled("decode", _decode, self.vae, put(latents, spread), out_shardings=spread)
            self.programs.compiled("decode", _decode, self.vae, self.replicated(latents[:1, :1]))  # for previews

    def metadata(self, job: Job) -> list[dict[str, Any]]:
        """What made each sample of a job, as JSON can hold it."""
        shared: dict[str, Any] = {"model": self.name, "checkpoint": self.hash}
        if self.loras:
            shared |= {"loras": self.loras}
        of_samples = ("prompts", "negative_prompts", "seeds")
        told = {name: value for name, value in job.describe().items() if name not in of_samples} | shared
        return [
            told | {"prompt": prompt, "negative_prompt": negative, "seed": seed if job.latents is None else None}
            for prompt, negative, seed in zip(job.prompts, job.negative_prompts, job.seeds, strict=True)
        ]

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """Puts the pipeline's mesh in force, if it has one."""
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def replicated(self, value) -> jax.Array:
        return put(value, None if self.mesh is None else replicated(self.mesh))

    def rows(self, value) -> jax.Array:
        """An array of batch rows on the batch axes of the mesh."""
        return put(value, None if self.mesh is None else batch_sharding(self.mesh, value.shape[0]))

    def _spread(self, job: Job) -> NamedSharding | None:
        """How the VAE's latents and videos [B, T, Y, X, C] are split."""
        _, rows, columns, _ = self.latents_shape(job.size, job.frames)
        return None if self.mesh is None else picture_sharding(self.mesh, len(job.prompts), rows, columns)


def scales_of(config: Any) -> Scales:
    """Which guidance scales a transformer of this config has."""
    if isinstance(config, WanConfig):
        return "guidance"
    return "both" if config.guidance else "true_cfg"


def _names(loras: Sequence[tuple[Lora, float]]) -> frozenset[str]:
    return frozenset(name for lora, _ in loras for name in lora)


def put(value, sharding: NamedSharding | None) -> jax.Array:
    """The value as an array with this sharding (None: on the default device)."""
    return jax.device_put(value, sharding)


def interleaved(conditional: np.ndarray, unconditional: np.ndarray) -> np.ndarray:
    """Rows of both guidance branches, those of a sample next to each other."""
    return np.stack([conditional, unconditional], axis=1).reshape(-1, *conditional.shape[1:])


def _decode(vae, latents):
    return _levels(vae.decode(vae.denormalise(latents), chunk=VAE_CHUNK))


def _decode_tiled(vae, latents):
    # Half a picture at most: tiles that hold it whole would take what decoding without them takes.
    tile = min(vae.decode_tile, max(*latents.shape[2:4], 2) // 2)
    return _levels(vae.decode_tiled(vae.denormalise(latents), tile, chunk=VAE_CHUNK))


def _levels(video: jax.Array) -> jax.Array:
    return jnp.round((video + 1) * 127.5).astype(jnp.uint8)
