"""A student of four steps and no guidance, by distribution matching (Self-Forcing, arXiv 2506.08009; PARE's stage III,
arXiv 2605.27336).

    dit-train step_distill --set model=demo-wan --set data=data --set variant=demo --set export=four-steps
    dit-generate --model four-steps --prompt "a red 7 moving left" --out out.mp4

The student starts from the model, or from `student`, whose router, if its checkpoint has one, stays active and learns
too. A fake score, which starts from the model, follows the student's own pictures, five updates to one of the
student's. A model of two experts is refused, as no expert runs from noise to data.

Reached on demo-flux in 200 steps: 77.5 % of the digits right in four unguided steps, of the teacher's 80.5 % in forty
guided ones; behind stage II, with its router, 68.2 %. On demo-wan, in as many steps, 75.9 of 82.4 % (1,000 prompts;
docs/distillation.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint
from convert.method_parts import FEW_STEP, part_files
from dit_jax.config import UserError
from dit_jax.methods.method import Part
from dit_jax.methods.routing import ROUTER, Routing, trained_router
from dit_jax.models.flux import FluxConfig
from dit_jax.models.wan import WanConfig
from infer.random_pipeline import TEXT_TOKENS
from infer.side_files import DEFAULTS_FILE, SCHEDULER_FILE, read_settings
from train import recipe
from train.loop import Outcome
from train.models import Source, check_student
from train.optimizers import adamw, constant
from train.recipe import RecipeConfig, Training, is_guided
from train.results import with_files, with_transformer
from train.step import LossFunction, Plan, Update
from train.step_distill_loss import StepDistillSettings, fake_score, step_distill

BETAS = (0.0, 0.999)
TEACHER_SCALE = 3.0
EMPTY = ("empty_text", "empty_pooled")

VARIANTS = {
    "demo": {
        "model": "demo-wan", "steps": 200, "batch": 8, "learning_rate": 2e-5, "fake_rate": 1e-4, "dtype": "float32",
        "save_every": 25,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of the recipe.

    student        what the student starts from; empty: the model
    fake_rate      learning rate of the fake score, of which there are `fake_turns` updates a step
    teacher_scale  guidance of the real score; None: 3, or 1 of a model that is told its guidance (FLUX.1 dev)
    """

    LEAST: ClassVar[Mapping[str, int]] = {**RecipeConfig.LEAST, "fake_turns": 1}

    out: str = "runs/step-distill"
    student: str = ""
    steps: int = 3000
    learning_rate: float = 2e-6
    fake_rate: float = 4e-7
    fake_turns: int = 5
    teacher_scale: float | None = None
    ema_decay: float = 0.99
    shift: float = 5.0
    caption_dropout: float = 0.0
    warmup: int = 0
    least: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert or self.levels != (0, 1):
            levels = "noise levels are from {:g} to {:g}".format(*self.levels)
            found = f"expert is {self.expert!r}" if self.expert else levels
            raise UserError(
                f"{found}, and step_distill rolls its student out over the whole range: expected a model of one "
                "transformer at levels from 0 to 1; leave expert, lowest_level and highest_level out"
            )

    @property
    def settings(self) -> StepDistillSettings:
        """Of the losses."""
        return StepDistillSettings(
            shift=self.shift,
            guidance_scale=TEACHER_SCALE if self.teacher_scale is None else self.teacher_scale,
            flow=self.flow,
            routing=Routing(least=self.least, most=self.most),
        )


def training(config: Config, source: Source) -> Training:
    """Student (with its router) and fake score, by turns."""
    if config.teacher_scale is None and is_guided(source.config):
        config = replace(config, teacher_scale=1.0)
    student = Source(config.student, source.mesh, planned=source.planned) if config.student else source
    check_student(student, source)
    if ROUTER not in student.parts and not (config.least is None and config.most is None):
        raise UserError(
            f"{student.model} has no router, found least={config.least} and most={config.most}: expected a student "
            "whose blocks are routed; leave them out, or give one that pare_stage2 made"
        )
    trained: dict[str, Any] = {"student": student.transformer(), "fake": source.transformer()}
    moved, settings = ["student"], config.settings
    settings = replace(settings, routing=settings.routing.told(student.parts))
    if ROUTER in student.parts:
        trained[ROUTER] = student.router()
        moved.append(ROUTER)

    def optimizer(rate: float):
        return adamw(constant(rate, config.warmup), betas=BETAS, weight_decay=config.weight_decay, clip=config.clip)

    updates = (
        Update(
            loss=_told_empty(partial(fake_score, settings=settings)),
            optimizer=optimizer(config.fake_rate),
            trains=("fake",),
            turns=config.fake_turns,
            microbatches=config.microbatches,
        ),
        Update(
            loss=_told_empty(partial(step_distill, settings=settings)),
            optimizer=optimizer(config.learning_rate),
            trains=tuple(moved),
            microbatches=config.microbatches,
        ),
    )
    plan = Plan(updates=updates, dtype=config.compute, ema_decay=config.ema_decay, averaged=tuple(moved), whole=EMPTY)
    return Training(
        trained=trained,
        frozen={"teacher": source.transformer(config.compute)},
        plan=plan,
        target=student,
        result=partial(_result, run_with(config, student.config), student.parts.get(ROUTER), settings.routing),
        extra=_abstract_empty(source),
        facts=student.kept_of(source) if config.student else {},
        # The roll-out ends at a random one of the steps.
        trips=(len(settings.timesteps) - 1) / 2,
    )


def _told_empty(loss: LossFunction) -> LossFunction:
    """The empty caption is the same for all rows, and is told once."""

    def with_rows(trained, frozen, batch, key):
        rows = len(batch["latents"])
        empty = {name: jnp.broadcast_to(batch[name], (rows, *batch[name].shape)) for name in EMPTY if name in batch}
        return loss(trained, frozen, {**batch, **empty}, key)

    return with_rows


def _abstract_empty(source: Source) -> dict[str, jax.ShapeDtypeStruct]:
    config = source.config
    empty = {"empty_text": jax.ShapeDtypeStruct((TEXT_TOKENS, config.text_width), np.float16)}
    if isinstance(config, FluxConfig):
        empty["empty_pooled"] = jax.ShapeDtypeStruct((config.pooled_width,), np.float16)
    return empty


def run_with(config: Config, model: WanConfig | FluxConfig) -> dict[str, dict[str, Any]]:
    """What a student is run with: the settings of `few_step`, and by file the pipeline's own."""
    settings, sampler = config.settings, "renoise"
    few = {"timesteps": list(settings.timesteps), "shift": settings.shift, "guidance_scale": 1.0, "sampler": sampler}
    usual = {"steps": len(settings.timesteps), "guidance": 1.0, "true_cfg": 1.0, "solver": sampler}
    if is_guided(model):  # told what it was told in training, which is no guidance to do without
        few, usual = few | {"guidance": config.guidance}, usual | {"guidance": config.guidance}
    shift = {"shift": settings.shift, "flow_shift": settings.shift, "use_dynamic_shifting": False}
    return {FEW_STEP: few, DEFAULTS_FILE: usual, SCHEDULER_FILE: shift}


def _result(
    told: Mapping[str, dict[str, Any]],
    router: Part | None,
    routing: Routing,
    checkpoint: Checkpoint,
    trained: Mapping[str, Any],
) -> Checkpoint:
    """The student, with what it is run with as its defaults."""
    parts = {FEW_STEP: Part(told[FEW_STEP], {})}
    if router is not None:
        parts[ROUTER] = trained_router(router, routing, trained[ROUTER])
    files = part_files(parts)
    for file in (DEFAULTS_FILE, SCHEDULER_FILE):
        files |= _changed(checkpoint, file, told[file])
    return with_files(with_transformer(checkpoint, trained["student"]), files)


def _changed(checkpoint: Checkpoint, file: str, settings: Mapping[str, Any]) -> dict[str, bytes]:
    return {file: json.dumps(read_settings(checkpoint, file) | dict(settings), indent=2).encode() + b"\n"}


def run(config: Config) -> Outcome:
    """Trains and exports."""
    return recipe.run(config, training)
