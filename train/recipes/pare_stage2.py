"""PARE, stage II: a router learns which blocks a step needs, and the student to do without the others
(arXiv 2605.27336).

    dit-train pare_stage2 --set model=demo-wan --set student=s1 --set data=data --set variant=demo --set export=s2
    dit-generate --model s2 --plan routing --prompt "a red 7 moving left" --out out.mp4

The student is what stage I made (or, to compare with, the raw pruned model). `least` and `most` are the blocks that run
without noise and at pure noise: 20 and 35 of 40 in the paper, as many of another model. With `content=False` the router
is told the timestep alone (the paper's ablation).

A new router begins with the blocks ranked: left out one after the other, each time the one without which the velocity
stays nearest to the teacher's (ours; `ranked=False` leaves that out). A router that the student has is trained further.

Reached on demo-flux in 4,800 steps behind stage I, with `learning_rate=1.5e-3` and 5 to 10 of 12 blocks: 72.6 % of the
digits right, of the teacher's 80.5 % and stage I's 73.8 %. On demo-wan in 2,400 steps and 5 to 8 of 10 blocks: 74.5 %
with `router_rate=1e-6`, which keeps the ranking, of 82.4 % and 78.7 %; with a router that learns, 68.0 % (1,000
prompts; docs/distillation.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from convert.checkpoint import Checkpoint
from convert.method_parts import part_files
from dit_jax.config import UserError
from dit_jax.methods.method import Part
from dit_jax.methods.routing import ROUTER, Routing, router_config, trained_router
from train import recipe
from train.block_ranking import Ranked
from train.loop import Outcome
from train.models import Source
from train.optimizers import by_module
from train.pare_loss import PareSettings, pare
from train.recipe import Driven, Training
from train.recipes.pare_stage1 import VARIANTS as STAGE1
from train.recipes.pare_stage1 import Config as Stage1
from train.recipes.pare_stage1 import student_of
from train.results import with_files, with_transformer
from train.step import Plan, Update

VARIANTS = {name: {**settings, "router_rate": 2e-3} for name, settings in STAGE1.items()}


@dataclass(frozen=True, kw_only=True)
class Config(Stage1):
    """Options of the recipe, besides those of stage I.

    content  whether the router is told more than the timestep
    ranked   whether a new router begins with blocks ranked by what leaving them out costs
    """

    out: str = "runs/pare-stage2"
    router_rate: float = 5e-4
    least: int | None = None
    most: int | None = None
    content: bool = True
    ranked: bool = True

    @property
    def routing(self) -> Routing:
        """How many blocks run."""
        return Routing(least=self.least, most=self.most)

    def settings(self, source: Source) -> PareSettings:
        """Of the losses, for this model."""
        return replace(super().settings(source), routing=self.routing)


def training(config: Config, source: Source) -> Training:
    """Student and router learn together, the router faster."""
    student = student_of(config.student, source)
    router = _router_part(config, student)
    settings = config.settings(source)
    settings = replace(settings, routing=settings.routing.told({ROUTER: router}))
    rates = {"student": config.learning_rate, "router": config.router_rate}
    optimizers = {name: config.adamw(rate) for name, rate in rates.items()}
    update = Update(
        loss=partial(pare, settings=settings),
        optimizer=by_module(optimizers),
        microbatches=config.microbatches,
    )
    new = ROUTER not in student.parts
    return Training(
        trained={"student": student.transformer(), "router": student.router(config.seed, config.content)},
        frozen={"teacher": source.transformer(config.compute)},
        plan=Plan(updates=(update,), dtype=config.compute, ema_decay=config.ema_decay),
        target=student,
        result=partial(_result, router, settings.routing, student.component_name),
        around=partial(_ranked, config, source) if config.ranked and new else None,
        facts=student.kept_of(source),
    )


def _ranked(config: Config, source: Source, driven: Driven) -> Ranked:
    return Ranked(out=config.out, driven=driven, settings=config.settings(source))


def _router_part(config: Config, student: Source) -> Part:
    """The student's router, or an untrained one; UserError where it has one of the other kind."""
    router = student.part(ROUTER, config.seed, content=config.content)
    told = router_config({ROUTER: router}, sum(student.stacks)).content
    if config.content != (told != "none"):
        alone, also = "the timestep alone", "content too"
        found, expected = (alone, also) if config.content else (also, alone)
        raise UserError(
            f"content is {config.content}, and the router of {student.model} is told {found}: expected {expected}; set "
            f"content={not config.content}, or give a student without a router"
        )
    return router


def _result(
    router: Part, routing: Routing, component: str, checkpoint: Checkpoint, trained: Mapping[str, Any]
) -> Checkpoint:
    files = part_files({ROUTER: trained_router(router, routing, trained["router"])}, component)
    return with_files(with_transformer(checkpoint, trained["student"], component), files)


def run(config: Config) -> Outcome:
    """Trains and exports."""
    return recipe.run(config, training)
