"""Trains a transformer further on data of one's own, by flow matching (Lipman et al., arXiv 2210.02747).

    dit-encode --model demo-wan --videos clips --captions clips/captions.jsonl --out data
    dit-train finetune --set model=demo-wan --set data=data --set variant=demo --set export=tuned
    dit-generate --model tuned --prompt "a red 7 moving left" --out out.mp4

All its weights learn; the running mean of them is exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from convert.checkpoint import Checkpoint
from train import recipe
from train.losses import finetune
from train.models import Source
from train.optimizers import adamw, cosine
from train.recipe import RecipeConfig, Training, with_transformer
from train.step import Plan, Update

VARIANTS = {
    "demo": {
        "model": "demo-wan", "steps": 300, "batch": 8, "learning_rate": 2e-4, "warmup": 20, "dtype": "float32",
        "save_every": 50,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of the recipe."""

    out: str = "runs/finetune"
    steps: int = 5000
    batch: int = 32
    learning_rate: float = 1e-5
    weight_decay: float = 0.01


def training(config: Config, source: Source) -> Training:
    """One model, which learns."""
    rate = cosine(config.learning_rate, config.steps, config.warmup)
    update = Update(
        loss=partial(finetune, settings=config.flow),
        optimizer=adamw(rate, weight_decay=config.weight_decay, clip=config.clip),
        microbatches=config.microbatches,
    )
    return Training(
        trained={"student": source.transformer()},
        frozen={},
        plan=Plan(updates=(update,), dtype=config.compute, ema_decay=config.ema_decay),
        target=source,
        result=_result,
    )


def _result(checkpoint: Checkpoint, trained: Mapping[str, Any]) -> Checkpoint:
    return with_transformer(checkpoint, trained["student"])


def run(config: Config) -> None:
    """Trains and exports."""
    recipe.run(config, training)
