"""What data and checkpoints add to a training step:

    python -m train.overlap finetune --set variant=demo --set data=data

The recipe's own step runs on one batch in memory, then as `dit-train` runs it (batches from shards, metrics, a
checkpoint every 200 steps), then on the batch in memory again, each timed after a few steps to warm up. Prints the
seconds of a step and what the second took more than the mean of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from convert.progress import progress_bar
from dit_jax.config import UserError
from train.cli import configure, load_recipe
from train.loop import train
from train.losses import Metrics
from train.recipe import Prepared, prepared
from train.step import TrainState

SAVE_EVERY = 200
WARM = 20  # steps that are not timed: the first compiles


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    options = argparse.ArgumentParser(
        prog="python -m train.overlap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("recipe")
    options.add_argument("--set", action="append", default=[], metavar="name=value", dest="settings")
    options.add_argument("--saves", type=int, default=2, metavar="N", help="checkpoints while it is timed (default 2)")
    chosen = options.parse_args(arguments)
    try:
        print(json.dumps(overlap(chosen.recipe, chosen.settings, chosen.saves)))
    except UserError as error:
        print(f"overlap: {error}", file=sys.stderr)
        return 2
    return 0


def overlap(name: str, settings: list[str], saves: int = 2, save_every: int = SAVE_EVERY) -> dict[str, float]:
    """Seconds of a step `synthetic` (before, after) and `real`, and the share `added`; UserError as the recipe."""
    recipe = load_recipe(name)
    config = configure(recipe.Config, settings, getattr(recipe, "VARIANTS", {}))
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, out=folder, steps=WARM + saves * save_every, save_every=save_every, log_every=1)
        ready = prepared(config, recipe.training)
        state, before = _synthetic(ready, ready.state, config.seed, save_every)
        state = train(config, state, ready.driven, ready.batch_at).state
        timed = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()][WARM:]
    _, after = _synthetic(ready, state, config.seed, save_every)
    real = statistics.mean(line["seconds_per_step"] for line in timed)
    return {
        "synthetic_before": before,
        "real": real,
        "synthetic_after": after,
        "added": 2 * real / (before + after) - 1,
        "seconds_of_data": statistics.mean(line.get("seconds_of_data", 0.0) for line in timed),
        "checkpoints": saves,
    }


def _synthetic(ready: Prepared, state: TrainState, seed: int, steps: int) -> tuple[TrainState, float]:
    """The state after a warm-up and so many steps on one batch, and the mean seconds of these."""
    batch: dict[str, Any] = ready.batch_at(0)
    key, began = jax.random.key(seed), 0.0
    metrics: Metrics = {}
    for step in progress_bar(range(WARM + steps), desc="one batch in memory", unit="step"):
        if step == WARM:
            began = time.perf_counter()
        before = metrics
        state, metrics = ready.driven(state, batch, key)
        jax.block_until_ready(before)  # one step late, as in `train`
    jax.block_until_ready(metrics)
    return state, (time.perf_counter() - began) / steps


if __name__ == "__main__":
    sys.exit(main())
