"""CoReDiT: a model learns to do without its most coherent tokens in self-attention, ever more of them
(arXiv 2605.14191).

    dit-train coredit --set model=demo-wan --set data=data --set variant=demo --set export=coherent
    dit-generate --model coherent --plan coredit --prompt "a red 7 moving left" --out out.mp4

Every `ramp_every` steps one block more skips 64 tokens more (as large a share of a smaller model's): the one whose next
tokens are most like their neighbours in the batch at hand. No block skips more than 60 %; the ramp ends where their
mean is `ratio`, after 29 turns a block for 0.45. With `adaptive=False` as many tokens are shared out evenly instead, so
that all blocks skip alike (the paper's uniform ratios). Skipped tokens are masked while it lasts, so that nothing is
compiled again; the result carries the ratios, and a run with the plan `coredit` gathers the kept tokens. The log ends
with what gathering them makes of the student on its last microbatch (`gathered_error`, `gathered_loss_teacher`).
Samples at the noise levels of a run's last quarter of steps skip a quarter, as they do when sampled: `shift` is to be
the sampler's.

Reached on demo-flux in 1,200 steps at 0.45: 55.4 % of the digits right, with `adaptive=False` 63.8 %, of the teacher's
80.5 % (1,000 prompts; its lattice has 16x16 tokens; docs/distillation.md).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from convert.checkpoint import Checkpoint
from convert.method_parts import part_files, transformers
from dit_jax.config import UserError
from dit_jax.methods.coherence import Lattice
from dit_jax.methods.coredit import Coredit
from dit_jax.methods.coredit_ratios import CAP, STEPS_TO_ALL, most_skipped, ramped, ramped_alike, ratios_file, ratios_of
from dit_jax.methods.method import Part
from dit_jax.sharding import replicated
from train import recipe
from train.coredit_loss import CoreditSettings, coredit, gathered, sorted_coherence
from train.loop import Outcome
from train.losses import Metrics
from train.models import Source
from train.placement import in_dtype
from train.recipe import (
    DEMO,
    POSITION,
    Driven,
    Prepared,
    RecipeConfig,
    Training,
    without_position,
)
from train.results import with_files, with_transformer
from train.shards import write_whole
from train.step import Plan, TrainState, Update

SKIPPED = "skipped"
RAMP = "ramp.json"

VARIANTS = {"demo": {**DEMO, "steps": 600, "learning_rate": 1e-3}}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of the recipe.

    ratio           mean share of the tokens that blocks skip in the end
    ramp_every      steps between two turns of the ramp; None: the paper's 15, or fewer where the ramp would not end
                    within two thirds of all steps
    adaptive        whether coherence says which block skips more, or all are ramped alike
    sampled_blocks  of how many blocks attention outputs are compared (0: of all, as in the paper)
    attention       weight of that comparison, beside those of velocities
    """

    LEAST: ClassVar[Mapping[str, int]] = {**RecipeConfig.LEAST, "sampled_blocks": 0}

    out: str = "runs/coredit"
    steps: int = 10000
    learning_rate: float = 1e-5
    ratio: float = 0.45
    ramp_every: int | None = None
    adaptive: bool = True
    sampled_blocks: int = 0
    attention: float = CoreditSettings.attention

    def every(self, blocks: int) -> int:
        """Steps between two turns of the ramp of so many blocks."""
        turns = math.ceil(self.ratio * blocks * STEPS_TO_ALL)
        return max(1, min(15, 2 * self.steps // (3 * turns))) if self.ramp_every is None else self.ramp_every

    @property
    def settings(self) -> CoreditSettings:
        """Of the loss."""
        return CoreditSettings(flow=self.flow, sampled_blocks=self.sampled_blocks or None, attention=self.attention)


@dataclass(kw_only=True)
class Ramp:
    """A step that is told how many tokens each block skips, and makes them more from time to time.

    Every change is written to ramp.json in the run's folder: a run that goes on from a checkpoint begins with what was
    skipped there. Shares of the tokens are kept, since batches may be of several shapes.
    """

    config: Config
    driven: Driven
    source: Source
    shares: np.ndarray | None = None
    changes: list[tuple[int, list[float]]] = field(default_factory=list)
    full: bool = False

    def __call__(self, state: TrainState, batch: Mapping[str, Any], key: jax.Array) -> tuple[TrainState, Metrics]:
        position = batch[POSITION]
        if self.shares is None:
            self._resume(position)
        assert self.shares is not None
        lattice = self.config.settings.lattice(np.shape(batch["latents"]), self.source.config.patch)
        batch = {**batch, SKIPPED: self._skipped(lattice)}
        if position % self.config.every(sum(self.source.stacks)) == 0 and not self.full:
            self._turn(state, batch, jax.random.fold_in(key, position), lattice)
            batch[SKIPPED] = self._skipped(lattice)
        return self.driven(state, batch, key)

    def _skipped(self, lattice: Lattice) -> np.ndarray:
        assert self.shares is not None
        return np.minimum(np.rint(self.shares * lattice.tokens), most_skipped(lattice)).astype(np.int32)

    @cached_property
    def _coherence(self):
        step, settings = self.driven.step, self.config.settings

        def sorted_of(params, batch, key):
            student = in_dtype(step.rebuilt(params), step.plan.dtype)["student"]
            return sorted_coherence(student, step.first(batch), key, settings=settings)

        return jax.jit(sorted_of, out_shardings=replicated(step.mesh))

    def _more(self, state: TrainState, batch: Mapping[str, Any], key: jax.Array, lattice: Lattice) -> np.ndarray:
        ratio, most = self.config.ratio, most_skipped(lattice)
        if not self.config.adaptive:
            return ramped_alike(batch[SKIPPED], lattice.tokens, ratio, most)
        step = self.driven.step
        with jax.set_mesh(step.mesh):
            coherence = np.asarray(self._coherence(state.params, step.place(without_position(batch)), key))
        return ramped(coherence, batch[SKIPPED], ratio, most)

    def _turn(self, state: TrainState, batch: Mapping[str, Any], key: jax.Array, lattice: Lattice) -> None:
        assert self.shares is not None
        more = self._more(state, batch, key, lattice)
        self.full = bool((more == batch[SKIPPED]).all())
        # Of blocks that go on as they are, another shape's rounding and cap change nothing.
        self.shares = self.shares + (more - batch[SKIPPED]) / lattice.tokens
        self.changes.append((batch[POSITION], self.shares.tolist()))
        if jax.process_index() == 0:
            write_whole(Path(self.config.out) / RAMP, json.dumps(self.changes).encode())

    def _resume(self, position: int) -> None:
        self.changes = [(step, shares) for step, shares in read_ramp(self.config.out) if step < position]
        self.shares = np.array(self.changes[-1][1] if self.changes else [0.0] * sum(self.source.stacks))


def read_ramp(out: str) -> list[tuple[int, list[float]]]:
    """(step, share of the tokens that each block skipped from there on) of the run in this folder, if it has begun."""
    file = Path(out) / RAMP
    return [(step, shares) for step, shares in json.loads(file.read_text())] if file.exists() else []


def training(config: Config, source: Source) -> Training:
    """A student in the masked form learns from its dense self."""
    if not 0 < config.ratio <= CAP:
        raise UserError(f"ratio is {config.ratio}, expected above 0 and at most {CAP}")
    if config.ramp_every is not None and config.ramp_every < 1:
        raise UserError(
            f"ramp_every is {config.ramp_every}, expected at least 1; leave it out to let the ramp end in time"
        )
    update = Update(
        loss=partial(coredit, settings=config.settings),
        optimizer=config.adamw(config.learning_rate),
        microbatches=config.microbatches,
    )
    return Training(
        trained={"student": source.transformer()},
        frozen={"teacher": source.transformer(config.compute)},
        plan=Plan(updates=(update,), dtype=config.compute, ema_decay=config.ema_decay, whole=(SKIPPED,)),
        target=source,
        result=partial(_result, config, source),
        around=lambda driven: Ramp(config=config, driven=driven, source=source),
        extra={SKIPPED: jax.ShapeDtypeStruct((sum(source.stacks),), np.int32)},
        closing=partial(_gathered, config),
    )


def _gathered(config: Config, ready: Prepared, state: TrainState, taken: int) -> dict[str, float]:
    """`coredit_loss.gathered` of the running mean on the first microbatch of the last step."""
    assert isinstance(ready.driven, Ramp) and ready.driven.shares is not None
    step, ratios = ready.step, tuple(ready.driven.shares.tolist())

    def found(params, frozen, batch):
        student = in_dtype(step.rebuilt(params), step.plan.dtype)["student"]
        key = jax.random.key(config.seed)
        return gathered(student, frozen["teacher"], batch, key, settings=config.settings, ratios=ratios)

    batch = step.first(step.place(without_position(ready.batch_at(taken - 1))))
    with jax.set_mesh(step.mesh):
        told = jax.jit(found, out_shardings=replicated(step.mesh))({**state.params, **state.ema}, step.frozen, batch)
    return {name: float(value) for name, value in told.items()}


def _result(config: Config, source: Source, checkpoint: Checkpoint, trained: Mapping[str, Any]) -> Checkpoint:
    """The student, with the share of the tokens that each block skips in the end."""
    ratios = [round(share, 6) for share in read_ramp(config.out)[-1][1]]
    if np.mean(ratios) < config.ratio - 1 / STEPS_TO_ALL:
        warnings.warn(
            f"blocks skip {np.mean(ratios):.3f} of the tokens on average, expected {config.ratio}, where the ramp "
            "ends; train more steps, or leave ramp_every out",
            stacklevel=2,
        )
    component = source.component_name
    of_experts = {name: ratios if name == component else _held(source, name) for name in transformers(checkpoint)}
    part = Part(ratios_file(of_experts, config.settings.stride), {})
    return with_files(with_transformer(checkpoint, trained["student"], component), part_files({Coredit.name: part}))


def _held(source: Source, other: str) -> list[float]:
    """The ratios that the other expert has in the checkpoint; zeros, where it has none."""
    if Coredit.name not in source.parts:
        return [0.0] * sum(source.stacks)
    held = ratios_of(source.parts[Coredit.name].settings, f"{Coredit.name} of {source.model}")
    return list(dict(held.experts).get(other, held.ratios))


def run(config: Config) -> Outcome:
    """Trains and exports."""
    return recipe.run(config, training)
