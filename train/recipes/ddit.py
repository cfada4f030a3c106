"""DDiT: adapters with which a model works on patches of two and four times the size (arXiv 2602.16968).

    dit-train ddit --set model=demo-wan --set data=data --set variant=demo --set export=adapted
    dit-calibrate ddit --model adapted --prompts prompts.txt --tokens 0.5 --out ddit.json
    dit-generate --model adapted --plan ddit:ddit.json --prompt "a red 7 moving left" --out out.mp4

The model stays as it is. Each step trains one of the `sizes`, which come up as often as each other; adapters that the
checkpoint has are trained further. `rank` is that of the LoRA on the MLPs; 0 trains adapters without (the paper's
ablation). As in the paper, adapters of Wan are trained by AdamW at 1e-4, those of FLUX by Prodigy at 1; the demo takes
AdamW at a rate of its own for both.

Reached on demo-flux in 1,800 steps with `sizes=2p`, by a threshold at which runs have 0.33 of the tokens
(`dit-calibrate ddit --sizes 2p`): 64.2 % of the digits right, of the model's own 80.5 %, 2.12 times as fast. On
demo-wan, trained alike and with 0.40 of the tokens, 67.3 of 82.4 % (1,000 prompts; docs/distillation.md).
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
from dit_jax.models.flux import FluxConfig
from train import recipe
from train.ddit_loss import ddit
from train.loop import Outcome
from train.models import Source
from train.optimizers import cosine, prodigy
from train.recipe import DEMO, RecipeConfig, Training
from train.results import with_files
from train.step import LossFunction, Plan, Update

ADAMW, PRODIGY = "adamw", "prodigy"
LEAST_FACTOR = 0.1  # of Prodigy's own rate
DRAWN = 4  # beside the run's seed, for the sizes of its steps

RATES = {ADAMW: 1e-4, PRODIGY: 1.0}
VARIANTS = {"demo": {**DEMO, "steps": 300, "optimizer": ADAMW, "learning_rate": 3e-3}}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of the recipe.

    optimizer      adamw or prodigy; None: the paper's for this model
    learning_rate  None: the paper's for this optimizer
    """

    out: str = "runs/ddit"
    steps: int = 5000
    optimizer: str | None = None
    learning_rate: float | None = None  # type: ignore[assignment]
    rank: int = AdapterSettings.rank
    sizes: str = written_sizes(SCALES)


def training(config: Config, source: Source) -> Training:
    """The adapters of every size learn to give what the model gives at its own."""
    if config.rank < 0:
        raise UserError(f"rank is {config.rank}, expected a whole number from 0; 0 trains adapters without LoRA")
    if config.sizes not in CHOICES:
        raise UserError(f"sizes are {config.sizes!r}, expected one of {', '.join(CHOICES)}")
    scales = CHOICES[config.sizes]
    config = replace(config, optimizer=config.optimizer or usual_optimizer(source))
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


def usual_optimizer(source: Source) -> str:
    """The paper's for this model."""
    return PRODIGY if isinstance(source.config, FluxConfig) else ADAMW


def _of_one(config: Config, sizes: int) -> Config:
    """The options of one of the sizes, whose optimizer counts its own steps alone."""
    return replace(config, steps=-(-config.steps // sizes), warmup=config.warmup // sizes)


def _of_size(scale: int, config: Config) -> LossFunction:
    def loss(trained, frozen, batch, key):
        return ddit({"adapters": trained}, frozen, batch, key, scale=scale, settings=config.flow)

    return loss


def _optimizer(config: Config) -> optax.GradientTransformation:
    if config.optimizer not in RATES:
        raise UserError(f"optimizer is {config.optimizer!r}, expected one of {', '.join(RATES)}")
    rate = RATES[config.optimizer] if config.learning_rate is None else config.learning_rate
    if config.optimizer == ADAMW:
        return config.adamw(rate)
    if rate < LEAST_FACTOR:
        raise UserError(
            f"learning_rate is {rate:g} with optimizer prodigy, which multiplies by it what it finds itself: expected "
            f"{LEAST_FACTOR} or more; set learning_rate=1"
        )
    return prodigy(cosine(rate, config.steps, config.warmup), weight_decay=config.weight_decay, clip=config.clip)


def _result(
    settings: AdapterSettings, component: str, checkpoint: Checkpoint, trained: Mapping[str, Any]
) -> Checkpoint:
    leaves = {f"{size}.{name}": array for size, weights in trained.items() for name, array in weights.items()}
    return with_files(checkpoint, part_files({Ddit.name: Part(asdict(settings), leaves)}, component))


def run(config: Config) -> Outcome:
    """Trains and exports."""
    return recipe.run(config, training)
