"""Whether one of two settings is the better one, from errors of both on the same prompts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
AS_IN_THE_PAPER, REVERSED, UNCLEAR = "as in the paper", "the other way round", "not distinguishable"


class Interval(NamedTuple):
    """A mean and the percentile bootstrap's 95 % interval of it (Efron & Tibshirani, An Introduction to the Bootstrap,
    chapter 13)."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray, seed: int = 0) -> Interval:
    """The interval of the mean of these values, drawn again and again with replacement."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def verdict(difference: Interval, confirmed: str = AS_IN_THE_PAPER) -> str:
    """What an interval of (error of what should be worse) - (error of what should be better) says."""
    if difference.low > 0:
        return confirmed
    return REVERSED if difference.high < 0 else UNCLEAR
