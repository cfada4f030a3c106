"""How far a score may lie off by chance: 95 % margins from a bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    names = [name for name, value in draws[0].items() if isinstance(value, float)]
    return {name: NORMAL_95 * _deviation([draw[name] for draw in draws]) for name in names}


def _deviation(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
