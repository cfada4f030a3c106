"""PARE's width pruning: which heads and which neurons of every block a narrower model keeps (arXiv 2605.27336).

Everything here runs on the host, block by block.

Shapes: G blocks of a stack, H heads, F neurons, D width, K kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np

from dit_jax.config import UserError
from dit_jax.models.flux import FluxConfig
from dit_jax.models.wan import WanConfig

SPATIAL, TEMPORAL = 0.7, 0.3  # intra-slice ratios above and below which a head has a type
PROTECTION = 1.5  # by which the scores of temporal heads are multiplied
FLOOR = Fraction(1, 5)  # of the heads, kept whatever the ratio: 8 of 40
SIMILAR, RELAXED = 0.9, 0.02  # cosine above which a neuron is redundant, and by how much that is raised at a time
CANDIDATES = 512  # neurons that are compared at once
HeadType = Literal["spatial", "mixed", "temporal"]
HEAD_TYPES: tuple[HeadType, ...] = ("spatial", "mixed", "temporal")


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Which heads and neurons are kept of a model: dotted path of an attention or an MLP -> indexes [G, K], ascending.

    Attentions of one length and MLPs of one length, in every block.
    """

    heads: Mapping[str, np.ndarray]
    neurons: Mapping[str, np.ndarray]

    @property
    def kept_heads(self) -> int:
        return next(iter(self.heads.values())).shape[1]

    @property
    def kept_neurons(self) -> int:
        return next(iter(self.neurons.values())).shape[1]


def check_ratio(name: str, ratio: float) -> None:
    """UserError for a share that cannot be pruned."""
    if not 0 <= ratio < 1:
        raise UserError(f"{name} is {ratio}: expected a share from 0 to below 1 that is pruned; write 0.3, say")


def heads_to_keep(heads: int, ratio: float) -> int:
    """K = max(a fifth of the heads, ceil(H·(1 − p)))."""
    exact = Fraction(ratio).limit_denominator(10_000)
    return max(math.ceil(heads * FLOOR), math.ceil(heads * (1 - exact)))


def neurons_to_keep(neurons: int, ratio: float) -> int:
    """F·(1 − p), rounded to the nearest multiple of 128, or of F/16 where that is smaller; all of them for p = 0."""
    multiple = max(min(128, neurons // 16), 1)
    kept = round(neurons * (1 - ratio) / multiple) * multiple
    return neurons if ratio == 0 else min(max(kept, multiple), neurons)


def pruned_config(config: WanConfig | FluxConfig, heads: float, neurons: float) -> WanConfig | FluxConfig:
    """The config of a model that lacks these shares of its heads and neurons, its norms counting the heads that are
    gone; UserError for a share that cannot be."""
    check_ratio("--heads", heads)
    check_ratio("--ffn", neurons)
    kept = heads_to_keep(config.heads, heads)
    if isinstance(config, WanConfig):
        config = replace(config, norm_counts_pruned=kept < config.heads)
    return replace(config, heads=kept, mlp_width=neurons_to_keep(config.mlp_width, neurons))


def scored_heads(
    config: WanConfig | FluxConfig, sums: Mapping[str, np.ndarray], norms: Callable[[str], np.ndarray]
) -> dict[tuple[str, ...], np.ndarray]:
    """s = Σ_t w(t)·‖ṽ‖_F·‖W_O[head]‖_F [G, H] of the attentions that choose their heads together.

    sums   the fields of `HeadSums`, averaged over the calibration set
    norms  `output_norms` of every block [G, H] of the attention with this dotted path
    """
    if isinstance(config, WanConfig):
        return {
            ("blocks.attn1",): sums["tokens"] * norms("blocks.attn1"),
            ("blocks.attn2",): (sums["cross_text"] + sums["cross_image"]) * norms("blocks.attn2"),
        }
    double = config.double_blocks
    image, text = "double.image.attn", "double.text.attn"
    return {
        (image, text): sums["tokens"][:double] * norms(image) + sums["context"][:double] * norms(text),
        ("single.attn",): sums["joint"][double:] * norms("single.attn"),
    }


def attentions(config: WanConfig | FluxConfig) -> dict[tuple[str, ...], int]:
    """Dotted paths of the attentions that choose their heads together -> how many blocks they have."""
    if isinstance(config, WanConfig):
        return {("blocks.attn1",): config.blocks, ("blocks.attn2",): config.blocks}
    return {("double.image.attn", "double.text.attn"): config.double_blocks, ("single.attn",): config.single_blocks}


def mlps(config: WanConfig | FluxConfig) -> tuple[str, ...]:
    """Dotted paths of the MLPs whose neurons are pruned."""
    return ("blocks.mlp",) if isinstance(config, WanConfig) else ("double.image.mlp", "double.text.mlp", "single.mlp")


def output_norms(kernel_HKD: np.ndarray) -> np.ndarray:
    """‖W_O[head]‖_F of every head [H]."""
    return np.sqrt(np.sum(np.square(kernel_HKD.astype(np.float32)), axis=(1, 2)))


def head_types(inside_GH: np.ndarray) -> np.ndarray:
    """The type of every head [G, H] from its mean intra-slice ratio."""
    return np.where(inside_GH > SPATIAL, "spatial", np.where(inside_GH < TEMPORAL, "temporal", "mixed"))


def protected(scores_GH: np.ndarray, types_GH: np.ndarray | None, protection: float = PROTECTION) -> np.ndarray:
    """Scores with those of temporal heads raised; still images have no types."""
    return scores_GH if types_GH is None else np.where(types_GH == "temporal", protection * scores_GH, scores_GH)


def best_heads(scores_GH: np.ndarray, count: int) -> np.ndarray:
    """The `count` heads of every block with the largest scores [G, K], ascending; the lower index where they tie."""
    return np.sort(np.argsort(-scores_GH, axis=1, kind="stable")[:, :count], axis=1)


def best_neurons(
    up_DF: np.ndarray, down_FD: np.ndarray, count: int, similar: float = SIMILAR, relaxed: float = RELAXED
) -> np.ndarray:
    """The `count` neurons of a block's MLP that matter most without repeating one another, ascending [K].

    s[k] = ‖W_up[k]‖·‖W_down[k]‖ and z[k] = [W_up[k]; W_down[k]]. By descending s, a neuron is skipped whose cosine with
    any one chosen is above `similar`; if too few are left, that is raised by `relaxed` and the skipped are seen again.
    """
    up, down = np.asarray(up_DF, np.float32).T, np.asarray(down_FD, np.float32)
    if count >= len(up):
        return np.arange(len(up))
    scores = np.linalg.norm(up, axis=1) * np.linalg.norm(down, axis=1)
    waiting = np.argsort(-scores, kind="stable")
    signature = np.concatenate([up, down], axis=1)
    signature /= np.maximum(np.linalg.norm(signature, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    chosen = np.zeros(0, np.int64)
    while len(chosen) < count:
        chosen, waiting = _visit(signature, waiting, chosen, count, similar)
        similar += relaxed
    return np.sort(chosen)


def _visit(signature_FE, waiting, chosen, count: int, similar: float) -> tuple[np.ndarray, np.ndarray]:
    """One pass over those waiting, in order: (chosen, skipped)."""
    skipped = []
    for start in range(0, len(waiting), CANDIDATES):
        if len(chosen) == count:
            break
        candidates = waiting[start : start + CANDIDATES]
        own = signature_FE[candidates]
        redundant = _nearest(own, signature_FE, chosen) > similar
        among = own @ own.T > similar
        taken: list[int] = []
        for place in range(len(candidates)):
            if len(chosen) + len(taken) == count:
                break
            if redundant[place] or among[place, taken].any():
                skipped.append(candidates[place])
            else:
                taken.append(place)
        chosen = np.concatenate([chosen, candidates[taken]])
    return chosen, np.asarray(skipped, np.int64)


def _nearest(own_JE, signature_FE, chosen) -> np.ndarray:
    """Largest cosine of each candidate with those chosen [J], a block of them at a time."""
    nearest = np.full(len(own_JE), -np.inf, np.float32)
    for start in range(0, len(chosen), 4 * CANDIDATES):
        cosines = own_JE @ signature_FE[chosen[start : start + 4 * CANDIDATES]].T
        np.maximum(nearest, cosines.max(axis=1), out=nearest)
    return nearest
