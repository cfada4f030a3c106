"""Trains a transformer further on data of one's own, by flow matching (Lipman et al., arXiv 2210.02747).

    dit-encode --model demo-wan --videos clips --captions clips/captions.jsonl --out data
    dit-train finetune --set model=demo-wan --set data=data --set variant=demo --set export=tuned
    dit-generate --model tuned --prompt "a red 7 moving left" --out out.mp4

All its weights learn or, with `--set lora=16`, a LoRA of that rank beside those of the blocks. The running mean is
exported; a LoRA merged into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint
from convert.wan import HIGH_NOISE
from dit_jax.config import UserError
from dit_jax.lora import Adapter, Lora, merged_leaf, untrained
from train import recipe
from train.losses import finetune
from train.models import Source
from train.recipe import DEMO, RecipeConfig, Training, with_student, with_transformer
from train.step import LossFunction, Plan, Update

VARIANTS = {"demo": {**DEMO, "steps": 300, "learning_rate": 2e-4}}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of the recipe."""

    out: str = "runs/finetune"
    steps: int = 5000
    batch: int = 32
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    lora: int = 0


def training(config: Config, source: Source) -> Training:
    """One model, which learns, or a LoRA of it."""
    if config.lora < 0:
        raise UserError(f"lora is {config.lora}, expected a rank from 1, or 0 to train all weights")
    loss: LossFunction = partial(finetune, settings=config.flow)
    update = Update(
        loss=_beside(loss, config.lora) if config.lora else loss,
        optimizer=config.adamw(config.learning_rate),
        microbatches=config.microbatches,
    )
    abstract = source.component.abstract
    return Training(
        trained={"lora": _factors(abstract, config)} if config.lora else {"student": source.transformer()},
        frozen={"student": source.transformer(config.compute)} if config.lora else {},
        plan=Plan(updates=(update,), dtype=config.compute, ema_decay=config.ema_decay),
        target=source,
        result=partial(_merged, config.lora) if config.lora else with_student,
    )


def _factors(model: Any, config: Config) -> dict[str, dict[str, Any]]:
    """What of a LoRA is trained: the factors of every leaf that it adds to."""
    lora = untrained(model, config.lora, config.seed)
    return {name: {"down": adapter.down, "up": adapter.up} for name, adapter in lora.items()}


def _lora(factors: Mapping[str, Mapping[str, Any]], rank: int) -> Lora:
    def adapter(down: Any, up: Any) -> Adapter:
        every = np.full(len(down), rank, np.float32)
        return Adapter(stacked=True, down=down, up=up, alpha=every, rank=every)

    return {name: adapter(**each) for name, each in factors.items()}


def _beside(loss: LossFunction, rank: int) -> LossFunction:
    def with_lora(trained, frozen, batch, key):
        return loss({"lora": _lora(trained["lora"], rank)}, frozen, batch, key)

    return with_lora


def _merged(rank: int, checkpoint: Checkpoint, trained: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with the LoRA in its weights."""
    factors: dict[str, dict[str, Any]] = {}
    for name, array in trained["lora"].items():
        leaf, _, factor = name.rpartition(".")
        factors.setdefault(leaf, {})[factor] = array
    weights = {name: leaf.rectangle(None) for name, leaf in checkpoint.leaves(HIGH_NOISE).items()}
    for name, adapter in _lora(factors, rank).items():
        weights[name] = np.asarray(merged_leaf(jnp.asarray(weights[name]), [(adapter, 1.0)]))
    return with_transformer(checkpoint, weights)


def run(config: Config) -> None:
    """Trains and exports."""
    recipe.run(config, training)
