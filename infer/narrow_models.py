"""Narrower forms of a pipeline's transformer, made in memory: what pruning costs before any training (PARE)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint, load_model
from convert.wan import HIGH_NOISE
from convert.widths import with_widths
from dit_jax.methods.pruning import Widths
from infer.head_calibration import Heads
from infer.prune import chosen_widths, widths_by_lot


def narrow_model(checkpoint: Checkpoint, widths: Widths) -> Any:
    """The transformer with these heads and neurons alone, in fp32; norms go on counting pruned heads."""
    narrow = with_widths(checkpoint, {HIGH_NOISE: widths}, norm_counts_pruned=True)
    return load_model(narrow, HIGH_NOISE, dtype=jnp.float32)


def scored_widths(checkpoint: Checkpoint, heads: Heads | None, share: float, protection: float) -> Widths:
    """As `dit-prune` chooses: with scores of heads this share of the heads goes, without them of the neurons."""
    of_heads, of_neurons = (share, 0.0) if heads else (0.0, share)
    return chosen_widths(checkpoint, HIGH_NOISE, heads, of_heads, of_neurons, protection)


def random_widths(checkpoint: Checkpoint, heads: float, neurons: float, seed: int) -> Widths:
    """As `dit-prune --choose random` chooses, of its transformer."""
    return widths_by_lot(checkpoint, HIGH_NOISE, heads, neurons, np.random.default_rng(seed))
