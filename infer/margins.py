"""How far a score may lie off by chance: 95 % margins from a bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

DRAWS = 200
NORMAL_95 = 1.96


def margins(of_draw: Callable[[np.ndarray], Mapping[str, Any]], prompts: int, seeds: int = 1) -> dict[str, float]:
    """1.96 standard deviations of every score under resampling of the prompts, each with all of its seeds.

    of_draw  scores of these samples [prompts * seeds]; sample s * prompts + p is prompt p with seed s
    """
    rng, all_seeds = np.random.default_rng(0), np.arange(seeds)[:, None] * prompts
    draws = [of_draw((rng.integers(prompts, size=prompts) + all_seeds).ravel()) for _ in range(DRAWS)]
    values: dict[str, list[float]] = {}
    for draw in draws:
        for name, value in draw.items():
            if isinstance(value, float):
                values.setdefault(name, []).append(value)
    return {name: NORMAL_95 * float(np.std(of_draws)) for name, of_draws in values.items()}
