"""Narrower forms of a pipeline's transformer, made in memory: what pruning costs before any training (PARE)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint, load_model
from convert.wan import HIGH_NOISE
from convert.widths import with_widths
from dit_jax.methods.pruning import Widths, attentions, best_heads, heads_to_keep, mlps, neurons_to_keep
from infer.head_calibration import Heads
from infer.prune import chosen_widths


def narrow_model(checkpoint: Checkpoint, widths: Widths) -> Any:
    """The transformer with these heads and neurons alone, in fp32; norms go on counting pruned heads."""
    narrow = with_widths(checkpoint, {HIGH_NOISE: widths}, norm_counts_pruned=True)
    return load_model(narrow, HIGH_NOISE, dtype=jnp.float32)


def scored_widths(checkpoint: Checkpoint, heads: Heads | None, share: float, protection: float) -> Widths:
    """As `dit-prune` chooses: with scores of heads this share of the heads goes, without them of the neurons."""
    of_heads, of_neurons = (share, 0.0) if heads else (0.0, share)
    return chosen_widths(checkpoint, HIGH_NOISE, heads, of_heads, of_neurons, protection)


def random_widths(checkpoint: Checkpoint, heads: float, neurons: float, seed: int) -> Widths:
    """As many by lot, other ones in every block: these shares go."""
    config, leaves = checkpoint.component(HIGH_NOISE).config, checkpoint.leaves(HIGH_NOISE)
    rng = np.random.default_rng(seed)
    kept: dict[str, np.ndarray] = {}
    for modules, blocks in attentions(config).items():
        lots = rng.random((blocks, config.heads))
        kept |= dict.fromkeys(modules, best_heads(lots, heads_to_keep(config.heads, heads)))
    count = neurons_to_keep(config.mlp_width, neurons)
    chosen = {
        module: best_heads(rng.random((leaves[f"{module}.up.kernel"].shape[0], config.mlp_width)), count)
        for module in mlps(config)
    }
    return Widths(heads=kept, neurons=chosen)
