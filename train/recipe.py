"""What the recipes of distillation share: their options, what a training is made of, and how it is run and ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from convert.checkpoint import Checkpoint
from dit_jax.config import UserError
from dit_jax.flops import Config
from dit_jax.models.flux import FluxConfig
from dit_jax.models.network import NetworkCall
from dit_jax.models.remat import parse_remat
from infer.loading import load_pipeline
from infer.program_costs import matmul_flops
from infer.random_pipeline import IMAGE_TOKENS, TEXT_TOKENS, usual
from infer.tpu_programs import latents_shape
from train.checkpoints import newest_step
from train.encoders import encoder_hashes
from train.hosts import wait_for_all
from train.loader import BatchSettings, ShardBatches, batches, padded
from train.loop import Hook, Outcome, RunConfig, train
from train.losses import FlowSettings, Metrics
from train.models import Source
from train.optimizers import adamw, cosine
from train.placement import training_mesh
from train.results import check_export, export
from train.samples import Samples, SampleSettings
from train.shards import Shards, open_shards
from train.step import Plan, StepFunction, TrainState, TrainStep

POSITION = "position"  # of a batch, beside its arrays
EMPTY = "empty_"  # before the names of what is told of the empty caption
DEMO: dict[str, Any] = {"model": "demo-wan", "batch": 8, "warmup": 20, "dtype": "float32", "save_every": 50}
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
FIRST_FRAME_CONDITIONING = 0.5  # of a model that is for both


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(RunConfig):
    """Options of every recipe of distillation.

    variant        `full` (the paper's scale) or `demo` (two cores)
    model          what is learnt from: a pipeline's folder, a hub id, a shipped model; for dit-plan also a preset
    data           folder that dit-encode made of this model
    batch          rows of one update, of all hosts; in so many `microbatches`, one after the other
    warmup         steps in which rates grow to their peak; optimizer steps, as all of a schedule
    clip           norm that gradients are clipped to; 0 leaves them as they are
    remat          what of a block is kept for its gradient (dit_jax/models/remat.py)
    dtype          that the transformers compute in; the weights that are trained are fp32
    expert         which of a model's two experts is trained, of `model` and of a student: `transformer` (high noise) or
                   `transformer_2` (low noise); the export has the other as it was
    shift          of random noise levels towards noise, which lie between `lowest_level` and `highest_level` (σ behind
                   the shift); None: 0 and 1, of an expert the pipeline's boundary on its side
    first_frame_conditioning  share of the samples whose first latent frame is given clean, so that a model such as
                   Wan2.2-TI2V-5B learns image to video beside text to video; None: half, 0 of any other model
    guidance       scale that a model with embedded guidance (FLUX.1 dev) is told
    sample_every   steps between two looks at samples (0: none): of the lines of the file `prompts`, and the scores of
                   `scored` prompts of the model's suite, with `sample_plan`
    export         folder that the result is written to
    size, frames   pixels WxH and frames, for dit-plan without data
    """

    FREE: ClassVar[frozenset[str]] = RunConfig.FREE | {
        "variant", "remat", "sample_every", "prompts", "scored", "sample_plan", "export", "size", "frames"
    }  # fmt: skip

    LEAST: ClassVar[Mapping[str, int]] = {"batch": 1, "microbatches": 1, "warmup": 0, "clip": 0}  # that options have

    variant: str = "full"
    model: str = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    expert: str = ""
    data: str = ""
    batch: int = 4
    microbatches: int = 1
    learning_rate: float = 3e-5
    warmup: int = 100
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decay: float = 0.999
    dtype: str = "bfloat16"
    remat: str = "blocks"
    shift: float = 3.0
    lowest_level: float | None = None
    highest_level: float | None = None
    caption_dropout: float = 0.1
    first_frame_conditioning: float | None = None
    guidance: float = 3.5
    sample_every: int = 0
    prompts: str = ""
    scored: int = 0
    sample_plan: str = ""
    export: str = ""
    size: str = ""
    frames: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in self.LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name):g}: expected {least} or more")
        lowest, highest = self.levels
        if not 0 <= lowest < highest <= 1:
            raise UserError(
                f"noise levels are from {lowest:g} to {highest:g}: expected 0 <= lowest_level < highest_level <= 1; "
                "give both, or neither"
            )

    @property
    def levels(self) -> tuple[float, float]:
        """The lowest and the highest noise level; all that there are, where they are not given."""
        lowest, highest = self.lowest_level, self.highest_level
        return 0.0 if lowest is None else lowest, 1.0 if highest is None else highest

    @property
    def compute(self) -> Any:
        """The dtype that the transformers compute in."""
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        return DTYPES[self.dtype]

    @property
    def flow(self) -> FlowSettings:
        """Random noise levels, and how transformers are called."""
        return FlowSettings(
            shift=self.shift,
            lowest=self.levels[0],
            highest=self.levels[1],
            first_frame_conditioning=self.first_frame_conditioning or 0.0,
            call=NetworkCall(remat=parse_remat(self.remat)),
        )

    def adamw(self, rate: float) -> optax.GradientTransformation:
        """AdamW with this peak rate, warmed up and decayed over the run."""
        schedule = cosine(rate, self.steps, self.warmup)
        return adamw(schedule, weight_decay=self.weight_decay, clip=self.clip)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a recipe trains, and how.

    trained, frozen  modules by name, arrays or shapes alone
    plan             of a step
    target           checkpoint that the trained modules are written into, and `result` of (it, these modules by name)
    write            writes (these modules by name) to a folder, where that is something else than `result`
    turn             which of the plan's updates a step does, of its number; None: all
    around           what stands between the loop and the step, if anything does
    trips            how often a loop of the step runs on average whose length only a run tells
    extra            shapes of what a batch has besides data, of the whole step; `empty_...` is of the empty caption
    facts            numbers by name that the log of a run begins with, such as what was pruned
    closing          of (what was prepared, the state, the steps taken): numbers by name that the log ends with
    """

    trained: dict[str, Any]
    frozen: dict[str, Any]
    plan: Plan
    target: Source
    result: Callable[[Checkpoint, Mapping[str, Any]], Checkpoint]
    write: Callable[[Mapping[str, Any], Path], Any] | None = None
    turn: Callable[[int], int] | None = None
    around: Callable[[Driven], StepFunction] | None = None
    extra: Mapping[str, jax.ShapeDtypeStruct] = field(default_factory=dict)
    trips: float | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    closing: Callable[[Prepared, TrainState, int], dict[str, float]] | None = None

    @property
    def first_turn(self) -> int | None:
        """An update that a step does alone; None where it does all of them."""
        return None if self.turn is None else 0


Recipe = Callable[[Any, Source], Training]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A training that is ready to begin: the state before its first step, the step and the batches."""

    mesh: Mesh
    training: Training
    step: TrainStep
    state: TrainState
    driven: StepFunction
    batch_at: Callable[[int], dict[str, Any]]


def prepared(config: RecipeConfig, recipe: Recipe) -> Prepared:
    """A recipe with its models loaded and its data opened; UserError for options and data that do not fit."""
    mesh = training_mesh(config.mesh)
    source = source_of(config, mesh)
    shards = _shards(config, source)
    training = made(config, recipe, source)
    rows = rows_of(config, training)
    step = TrainStep(training.trained, training.plan, mesh, training.frozen, rows)
    feed = _feed(config, shards, rows, step.own_rows(rows, training.first_turn))
    state = step.init(training.trained)
    training.trained.clear()  # the state holds them now
    driven: Any = Driven(step, training.turn)
    if training.around is not None:
        driven = training.around(driven)
    empty = any(name.startswith(EMPTY) for name in training.extra)
    extra = _empty(feed) if empty else {}
    if is_guided(source.config):
        extra["guidance"] = np.full(len(feed(0)["latents"]), config.guidance, np.float32)
    batch_at = partial(told, feed, extra)
    return Prepared(mesh=mesh, training=training, step=step, state=state, driven=driven, batch_at=batch_at)


def run(config: RecipeConfig, recipe: Recipe, hooks: tuple[Hook, ...] = ()) -> Outcome:
    """Trains, and writes the result to `config.export` once the last step is done; UserError as `prepared`."""
    if config.best and not (config.sample_every and config.scored):
        raise UserError(
            f"best is {config.best!r} with sample_every={config.sample_every} and scored={config.scored}: expected "
            "both above 0, since samples are what is scored"
        )
    ready = prepared(config, recipe)
    if config.export:
        check_export(Path(config.export), ready.training)
    if config.sample_every:
        hooks += (Hook(config.sample_every, samples_of(config, ready)),)
    closing = ready.training.closing and partial(ready.training.closing, ready)
    flops = _by_shape(partial(model_flops, config, recipe, ready.mesh))
    outcome = train(config, ready.state, ready.driven, ready.batch_at, hooks, flops, ready.training.facts, closing)
    if config.export and not outcome.stopped:
        try:
            if jax.process_index() == 0:
                export(config, ready.training)
        finally:  # jax waits five minutes at most for whoever ends later
            wait_for_all("exported")
    return outcome


def model_flops(config: RecipeConfig, recipe: Recipe, mesh: Mesh, batch: Mapping[str, Any]) -> float:
    """FLOPs of the matrix products of a step on such a batch of this host's, of all hosts and the mean over its turns;
    what is only computed again for gradients left out, as in the usual meaning of MFU."""
    training = made(replace(config, remat="none"), recipe, source_of(config, mesh, planned=True))
    rows = rows_of(config, training)
    step = TrainStep(training.trained, training.plan, mesh, training.frozen)

    def shape(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *np.shape(array)[1:]), np.asarray(array).dtype)

    arrays = {name: shape(array) for name, array in batch.items() if name not in (POSITION, *training.extra)}
    turns = [None] if training.turn is None else range(len(training.plan.updates))
    traced = [step.trace({**arrays, **training.extra}, turn) for turn in turns]
    return float(np.mean([matmul_flops(each.jaxpr, training.trips) for each in traced]))


def _by_shape(flops: Callable[[Mapping[str, Any]], float]) -> Callable[[Mapping[str, Any]], float]:
    """FLOPs of a step on a batch, found once for all batches of its shape."""
    known: dict[tuple[int, ...], float] = {}

    def of(batch: Mapping[str, Any]) -> float:
        shape = np.shape(batch["latents"])
        return known[shape] if shape in known else known.setdefault(shape, flops(batch))

    return of


def source_of(config: RecipeConfig, mesh: Mesh, planned: bool = False) -> Source:
    """What is learnt from."""
    return Source(config.model, mesh, planned=planned, expert=config.expert)


def made(config: RecipeConfig, recipe: Recipe, source: Source) -> Training:
    """What a recipe makes of a model, which decides what noise levels and `first_frame_conditioning` are where they are
    not given; UserError for a share that it does not take."""
    share, holds = config.first_frame_conditioning, source.holds_first_frame
    if share is None:
        share = FIRST_FRAME_CONDITIONING if holds else 0.0
    if not 0 <= share <= (1 if holds else 0):
        expected = "a share from 0 to 1" if holds else "0, or a model such as Wan2.2-TI2V-5B (expand_timesteps)"
        of = "" if holds else f" for {config.model}, whose latents hold no first frame"
        raise UserError(f"first_frame_conditioning is {share:g}{of}: expected {expected}")
    lowest, highest = source.noise_levels
    lowest = lowest if config.lowest_level is None else config.lowest_level
    highest = highest if config.highest_level is None else config.highest_level
    told = replace(config, first_frame_conditioning=share, lowest_level=lowest, highest_level=highest)
    return recipe(told, source)


def _shards(config: RecipeConfig, source: Source) -> Shards:
    if not config.data:
        raise UserError("there are no data: expected --set data=DIR; make them with `dit-encode --model ...`")
    whole = newest_step(config.out) is None  # whoever goes on finds what was damaged since when it is read
    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    shards = open_shards(config.data, checksums=whole, **place)
    shards.check_matches(encoder_hashes(source.checkpoint), config.model)
    return shards


def rows_of(config: RecipeConfig, training: Training) -> int:
    """Rows of a step, of all processes."""
    return config.batch * (1 if training.turn else sum(update.turns for update in training.plan.updates))


def _feed(config: RecipeConfig, shards: Shards, rows: int, own: np.ndarray) -> ShardBatches:
    dropout = config.caption_dropout
    return batches(
        shards, BatchSettings(batch=rows, caption_dropout=dropout, seed=config.seed, own=tuple(own.tolist()))
    )


@dataclass(frozen=True)
class Driven:
    """A step that is told of a batch's position by which of its updates are due."""

    step: TrainStep
    turn: Callable[[int], int] | None

    def __call__(self, state: TrainState, batch: Mapping[str, Any], key: jax.Array) -> tuple[TrainState, Metrics]:
        position = batch[POSITION]
        return self.step(state, without_position(batch), key, turn=None if self.turn is None else self.turn(position))


def without_position(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a batch, without its number."""
    return {name: array for name, array in batch.items() if name != POSITION}


def samples_of(config: RecipeConfig, ready: Prepared) -> Samples:
    """What looks at samples of the model that will be exported."""
    settings = SampleSettings(prompts=config.prompts, scored=config.scored, plan=config.sample_plan)
    target, result = ready.training.target, ready.training.result
    pipe = load_pipeline(target.model, mesh=ready.mesh, dtype=config.compute)
    out, component = Path(config.out), target.component_name
    return Samples(out=out, settings=settings, step=ready.step, pipe=pipe, result=result, component=component)


def _empty(feed: ShardBatches) -> dict[str, np.ndarray]:
    """What is told of the empty caption, its text with the padding that captions have."""
    empty = feed.shards.empty
    text = padded([empty["text"]], feed.shards.manifest.text)[0]
    return {EMPTY + name: array for name, array in {**empty, "text": text}.items()}


def told(feed: ShardBatches, extra: Mapping[str, np.ndarray], position: int) -> dict[str, Any]:
    """A batch as the losses take it, with its position: what is made of first frames are the channels behind the
    latents."""
    batch: dict[str, Any] = {**feed(position), **extra, POSITION: position}
    if "first_frame" in batch:
        batch["extra"] = batch.pop("first_frame")
    return batch


def is_guided(model: Config) -> bool:
    """Whether a model is told a guidance scale."""
    return isinstance(model, FluxConfig) and model.guidance


def abstract_batch(config: RecipeConfig, model: Config, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of so many rows of `config.size` and `config.frames` (the model's usual, where not given), as
    `told` gives them; UserError for a size that does not fit."""
    defaults = usual(model)
    size = config.size or "{}x{}".format(*defaults.size)
    _, *grid, channels = latents_shape(size, config.frames or defaults.frames, model.out_channels)

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *sizes), jnp.float16)

    batch = {"latents": shape(*grid, channels), "text": shape(TEXT_TOKENS, model.text_width)}
    if isinstance(model, FluxConfig):
        guidance = {"guidance": jax.ShapeDtypeStruct((rows,), jnp.float32)} if is_guided(model) else {}
        return batch | {"pooled": shape(model.pooled_width)} | guidance
    if model.image_width:
        batch["image"] = shape(IMAGE_TOKENS, model.image_width)
    if model.in_channels > model.out_channels:
        batch["extra"] = shape(*grid, model.in_channels - model.out_channels)
    return batch
