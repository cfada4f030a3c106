"""DDiT: adapters with which a model works on patches of two and four times the size (arXiv 2602.16968).

    dit-train ddit --set model=demo-wan --set data=data --set variant=demo --set export=adapted
    dit-calibrate ddit --model adapted --prompts prompts.txt --tokens 0.5 --out ddit.json
    dit-generate --model adapted --plan ddit:ddit.json --prompt "a red 7 moving left" --out out.mp4

The model stays as it is. Each step trains one of the `sizes`, which come up as often as each other; adapters that the
checkpoint has are trained further. `rank` is that of the LoRA on the MLPs; 0 trains adapters without (the paper's
ablation). The paper uses AdamW at 1e-4 for Wan, and Prodigy for FLUX (`--set optimizer=prodigy --set
learning_rate=1`).

Reached on demo-flux in 1,800 steps with `sizes=2p`, by a threshold at which runs have 0.33 of the tokens
(`dit-calibrate ddit --sizes 2p`): 64.2 % of the digits right, of the model's own 80.5 %, 2.12 times as fast (1,000
prompts; docs/distillation.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import optax

from convert.checkpoint import Checkpoint
from convert.method_parts import part_files
from dit_jax.config import UserError
from dit_jax.methods.ddit import CHOICES, SCALES, Ddit, written_sizes
from dit_jax.methods.method import Part
from dit_jax.methods.patch_adapters import AdapterSettings, size_name
from train import recipe
from train.ddit_loss import ddit
from train.loop import Outcome
from train.models import Source
from train.recipe import DEMO, RecipeConfig, Training
from train.results import with_files
from train.step import LossFunction, Plan, Update

OPTIMIZERS = ("adamw", "prodigy")
LEAST_FACTOR = 0.1  # of Prodigy's own rate
DRAWN = 4  # beside the run's seed, for the sizes of its steps

VARIANTS = {"demo": {**DEMO, "steps": 300, "learning_rate": 3e-3}}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of the recipe."""

    out: str = "runs/ddit"
    steps: int = 5000
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    rank: int = AdapterSettings.rank
    sizes: str = written_sizes(SCALES)


def training(config: Config, source: Source) -> Training:
    """The adapters of every size learn to give what the model gives at its own."""
    if config.rank < 0:
        raise UserError(f"rank is {config.rank}, expected a whole number from 0; 0 trains adapters without LoRA")
    if config.sizes not in CHOICES:
        raise UserError(f"sizes are {config.sizes!r}, expected one of {', '.join(CHOICES)}")
    scales = CHOICES[config.sizes]
    adapters, settings = source.adapters(config.seed, AdapterSettings(scales=scales, rank=config.rank))
    updates = tuple(
        Update(
            loss=_of_size(scale, config),
            optimizer=_optimizer(_of_one(config, len(scales))),
            trains=(size_name(scale),),
            microbatches=config.microbatches,
        )
        for scale in scales
    )
    return Training(
        trained=dict(adapters),
        frozen={"teacher": source.transformer(config.compute)},
        plan=Plan(updates=updates, dtype=config.compute, ema_decay=config.ema_decay),
        target=source,
        result=partial(_result, settings, source.component_name),
        turn=lambda position: drawn(config.seed, position, len(updates)),
    )


def drawn(seed: int, position: int, sizes: int) -> int:
    """Which of the sizes a step trains: each once in as many steps as there are sizes, in random order."""
    round_, place = divmod(position, sizes)
    return int(np.random.default_rng([seed, DRAWN, round_]).permutation(sizes)[place])


def _of_one(config: Config, sizes: int) -> Config:
    """The options of one of the sizes, whose optimizer counts its own steps alone."""
    return replace(config, steps=-(-config.steps // sizes), warmup=config.warmup // sizes)


def _of_size(scale: int, config: Config) -> LossFunction:
    def loss(trained, frozen, batch, key):
        return ddit({"adapters": trained}, frozen, batch, key, scale=scale, settings=config.flow)

    return loss


def _optimizer(config: Config) -> optax.GradientTransformation:
    if config.optimizer not in OPTIMIZERS:
        raise UserError(f"optimizer is {config.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    if config.optimizer == "prodigy":
        if config.learning_rate < LEAST_FACTOR:
            raise UserError(
                f"learning_rate is {config.learning_rate:g} with optimizer prodigy, which multiplies by it what it "
                f"finds itself: expected {LEAST_FACTOR} or more; set learning_rate=1"
            )
        return optax.chain(optax.clip_by_global_norm(config.clip), optax.contrib.prodigy(config.learning_rate))
    return config.adamw(config.learning_rate)


def _result(
    settings: AdapterSettings, component: str, checkpoint: Checkpoint, trained: Mapping[str, Any]
) -> Checkpoint:
    leaves = {f"{size}.{name}": array for size, weights in trained.items() for name, array in weights.items()}
    return with_files(checkpoint, part_files({Ddit.name: Part(asdict(settings), leaves)}, component))


def run(config: Config) -> Outcome:
    """Trains and exports."""
    return recipe.run(config, training)
