"""Noise levels of flow matching: x_σ = (1−σ)·x0 + σ·ε, from σ = 1 (noise) to 0 (data) in S steps.

Computed once on the host in the precision of the PyTorch originals; a schedule is then an array argument of the
program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

TRAIN_STEPS = 1000


class Schedule(NamedTuple):
    """σ at the S steps and the final 0 [S + 1], the model's timesteps [S], the solver's coefficients [S, n]."""

    sigmas: np.ndarray | jax.Array
    timesteps: np.ndarray | jax.Array
    coefficients: np.ndarray | jax.Array

    @property
    def steps(self) -> int:
        return self.timesteps.shape[0]


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How σ is shifted to noise: by a constant, or (`dynamic`) by the number of tokens, as FLUX.1 dev does.

    to_last_step  σ is spaced evenly down to 1/S and shifted once, as FLUX's pipelines pass it to the scheduler (a
                  dynamic shift always); else the scheduler spaces it itself
    """

    constant: float = 1.0
    dynamic: bool = False
    to_last_step: bool = False
    low: float = 0.5
    high: float = 1.15
    low_tokens: float = 256
    high_tokens: float = 4096

    def mu(self, tokens: int) -> float:
        """Logarithm of a dynamic shift at so many tokens: a line through (low_tokens, low) and (high_tokens, high)."""
        slope = (self.high - self.low) / (self.high_tokens - self.low_tokens)
        return slope * tokens + self.low - slope * self.low_tokens

    def scale(self, tokens: int) -> float:
        """The shift at this many tokens."""
        return math.exp(self.mu(tokens)) if self.dynamic else self.constant


def shifted(sigmas: Any, shift: Any) -> Any:
    """σ ← s·σ / (1 + (s − 1)·σ)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def euler_sigmas(steps: int, shift: Shift, tokens: int) -> np.ndarray:
    """σ of diffusers' `FlowMatchEulerDiscreteScheduler`, [S + 1] in fp32.

    Left to itself, with a constant shift, that scheduler spaces its σ between already shifted ends and shifts them
    again, so that the last steps are shifted twice; Wan's pipelines are run that way and so is this.
    """
    if shift.dynamic or shift.to_last_step:
        sigmas = shifted(np.linspace(1, 1 / steps, steps), shift.scale(tokens))
    else:
        lowest = float(shifted(np.float32(1 / TRAIN_STEPS), np.float32(shift.constant)))
        sigmas = shifted(np.linspace(1, lowest, steps), shift.constant)
    return np.append(sigmas, 0).astype(np.float32)


def unipc_sigmas(steps: int, shift: Shift, tokens: int) -> np.ndarray:
    """Flow σ of diffusers' `UniPCMultistepScheduler` without the final 0, [S] in fp64; the first stays 1e-6 below 1,
    where λ is finite."""
    sigmas = shifted(np.linspace(1, 1 / TRAIN_STEPS, steps + 1)[:-1], shift.scale(tokens))
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6
    return sigmas
