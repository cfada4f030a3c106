"""A student of four steps and no guidance, by distribution matching (Self-Forcing, arXiv 2506.08009; PARE's stage III,
arXiv 2605.27336).

    dit-train step_distill --set model=demo-wan --set data=data --set variant=demo --set export=four-steps
    dit-generate --model four-steps --prompt "a red 7 moving left" --out out.mp4

The student starts from the model, or from `student`, whose router, if its checkpoint has one, stays active and learns
too. A fake score, which starts from the model, follows the student's own pictures, five updates to one of the
student's.

Reached on demo-flux in 200 steps: 77.5 % of the digits right in four unguided steps, of the teacher's 80.5 % in forty
guided ones; behind stage II, with its router, 68.2 % (1,000 prompts; docs/distillation.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint
from convert.method_parts import FEW_STEP, part_files
from dit_jax.methods.method import Part
from dit_jax.methods.routing import ROUTER, Routing
from dit_jax.models.flux import FluxConfig
from infer.random_pipeline import TEXT_TOKENS
from infer.side_files import DEFAULTS_FILE, SCHEDULER_FILE, read_settings
from train import recipe
from train.loop import Outcome
from train.models import Source
from train.optimizers import adamw
from train.recipe import RecipeConfig, Training, with_files, with_transformer
from train.step import LossFunction, Plan, Update
from train.step_distill_loss import StepDistillSettings, fake_score, step_distill

BETAS = (0.0, 0.999)
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
    teacher_scale  guidance of the real score
    """

    out: str = "runs/step-distill"
    student: str = ""
    steps: int = 3000
    learning_rate: float = 2e-6
    fake_rate: float = 4e-7
    fake_turns: int = 5
    teacher_scale: float = 3.0
    ema_decay: float = 0.99
    shift: float = 5.0
    caption_dropout: float = 0.0
    least: int | None = None
    most: int | None = None

    @property
    def settings(self) -> StepDistillSettings:
        """Of the losses."""
        return StepDistillSettings(
            shift=self.shift,
            guidance_scale=self.teacher_scale,
            flow=self.flow,
            routing=Routing(least=self.least, most=self.most),
        )


def training(config: Config, source: Source) -> Training:
    """Student (with its router) and fake score, by turns."""
    student = Source(config.student, source.mesh, planned=source.planned) if config.student else source
    trained: dict[str, Any] = {"student": student.transformer(), "fake": source.transformer()}
    moved = ["student"]
    if ROUTER in student.parts:
        trained[ROUTER] = student.router()
        moved.append(ROUTER)

    def optimizer(rate: float):
        return adamw(rate, betas=BETAS, weight_decay=config.weight_decay, clip=config.clip)

    updates = (
        Update(
            loss=_told_empty(partial(fake_score, settings=config.settings)),
            optimizer=optimizer(config.fake_rate),
            trains=("fake",),
            turns=config.fake_turns,
            microbatches=config.microbatches,
        ),
        Update(
            loss=_told_empty(partial(step_distill, settings=config.settings)),
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
        result=partial(_result, config, student.parts.get(ROUTER)),
        extra=_abstract_empty(source),
        facts=student.kept_of(source) if config.student else {},
        # The roll-out ends at a random one of the steps.
        trips=(len(config.settings.timesteps) - 1) / 2,
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


def _result(config: Config, router: Part | None, checkpoint: Checkpoint, trained: Mapping[str, Any]) -> Checkpoint:
    """The student, with what it is run with as its defaults."""
    settings, sampler = config.settings, "renoise"
    told = {"timesteps": list(settings.timesteps), "shift": settings.shift, "guidance_scale": 1.0, "sampler": sampler}
    parts = {FEW_STEP: Part(told, {})}
    if router is not None:
        parts[ROUTER] = router._replace(leaves=trained[ROUTER])
    usual = {"steps": len(settings.timesteps), "guidance": 1.0, "true_cfg": 1.0, "solver": sampler}
    shift = {"shift": settings.shift, "flow_shift": settings.shift, "use_dynamic_shifting": False}
    files = part_files(parts) | _changed(checkpoint, DEFAULTS_FILE, usual) | _changed(checkpoint, SCHEDULER_FILE, shift)
    return with_files(with_transformer(checkpoint, trained["student"]), files)


def _changed(checkpoint: Checkpoint, file: str, settings: Mapping[str, Any]) -> dict[str, bytes]:
    return {file: json.dumps(read_settings(checkpoint, file) | dict(settings), indent=2).encode() + b"\n"}


def run(config: Config) -> Outcome:
    """Trains and exports."""
    return recipe.run(config, training)
