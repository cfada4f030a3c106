"""PARE, stage I: a model that `dit-prune` made narrower learns to do what the whole one does (arXiv 2605.27336).

    dit-prune --model demo-wan --prompts prompts.txt --heads 0.3 --ffn 0.3 --out pruned
    dit-train pare_stage1 --set model=demo-wan --set student=pruned --set data=data --set variant=demo --set export=s1

Block outputs, velocities, the data and the change from frame to frame are matched (docs/losses.md). The paper trains
7,000 steps of batch 4.

Reached on demo-flux in 300 steps, `features=10`, without a quarter of the heads and 31 % of the neurons: 73.8 % of the
digits right, of the teacher's 80.5 %. On demo-wan in 2,400 steps as narrow: 78.7 of 82.4 % (1,000 prompts;
docs/distillation.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from dit_jax.config import UserError
from dit_jax.models.wan import WanConfig
from train import recipe
from train.loop import Outcome
from train.models import Source, check_student
from train.pare_loss import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, PareSettings, PareWeights, pare
from train.recipe import DEMO, RecipeConfig, Training
from train.results import with_student
from train.step import Plan, Update

PRUNED = (0.3, 0.3)  # shares of heads and neurons that a preset's student lacks

VARIANTS = {"demo": {**DEMO, "steps": 300, "learning_rate": 5e-4, "features": 0.5}}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of the recipe.

    student         the pruned model
    sampled_blocks  of how many blocks, others at every step, the outputs are compared (0: of all)
    features        weight of that comparison, beside those of velocities
    """

    LEAST: ClassVar[Mapping[str, int]] = {**RecipeConfig.LEAST, "sampled_blocks": 0}

    out: str = "runs/pare-stage1"
    student: str = ""
    steps: int = 7000
    sampled_blocks: int = 4
    features: float = TEXT_TO_VIDEO.features

    def settings(self, source: Source) -> PareSettings:
        """Of the losses, for this model."""
        weights = replace(weights_for(source.config), features=self.features)
        return PareSettings(flow=self.flow, sampled_blocks=self.sampled_blocks or sum(source.stacks), weights=weights)


def weights_for(config: Any) -> PareWeights:
    """The paper's for image-to-video, text-to-video, and without the term of motion for pictures."""
    if not isinstance(config, WanConfig):
        return replace(TEXT_TO_VIDEO, motion=0.0)
    return IMAGE_TO_VIDEO if config.in_channels > config.out_channels else TEXT_TO_VIDEO


def training(config: Config, source: Source) -> Training:
    """The pruned student learns from the whole model."""
    student = student_of(config.student, source)
    update = Update(
        loss=partial(pare, settings=config.settings(source)),
        optimizer=config.adamw(config.learning_rate),
        microbatches=config.microbatches,
    )
    return Training(
        trained={"student": student.transformer()},
        frozen={"teacher": source.transformer(config.compute)},
        plan=Plan(updates=(update,), dtype=config.compute, ema_decay=config.ema_decay),
        target=student,
        result=partial(with_student, student.component_name),
        facts=student.kept_of(source),
    )


def student_of(name: str, source: Source) -> Source:
    """The student by its folder, or where sizes are enough the pruned model; UserError for one that is none."""
    if not name and not source.abstract:
        raise UserError("there is no student: expected --set student=DIR; make one with `dit-prune`")
    pruned = (0.0, 0.0) if name else PRUNED
    student = Source(name or source.model, source.mesh, pruned=pruned, planned=source.planned, expert=source.expert)
    check_student(student, source, ("width",))
    if student.stacks != source.stacks:
        found, expected = (" + ".join(map(str, each.stacks)) for each in (student, source))
        raise UserError(
            f"{name} is no student of {source.model}: it has {found} blocks, expected {expected}; prune that model"
        )
    return student


def run(config: Config) -> Outcome:
    """Trains and exports."""
    return recipe.run(config, training)
