"""Heads of a pipeline's transformers, measured over the runs of some prompts: scores and types (PARE).

Shapes: G blocks, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.leaves import Leaf
from dit_jax.methods.head_statistics import HeadSums, RecordedHeads, recorded
from dit_jax.methods.method import Run
from dit_jax.methods.pruning import HEAD_TYPES, head_types, output_norms, scored_heads
from infer.pipeline import Pipeline
from infer.request import Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What was found of a transformer's heads.

    scores  [G, H] of the attentions that choose their heads together, by their dotted paths
    types   [G, H] of self-attention; None for still images
    """

    scores: dict[tuple[str, ...], np.ndarray]
    types: np.ndarray | None


class HeadWatch:
    """Adds up `HeadSums` of each transformer over all runs, and its steps."""

    def __init__(self) -> None:
        self.sums: dict[str, list[np.ndarray]] = {}
        self.steps: dict[str, int] = {}
        self._now = 0

    def around(self, denoiser: Any, run: Run) -> RecordedHeads:
        self._now = run.stop - run.first
        return recorded(denoiser, run.latents_shape)

    def finished(self, component: str, state: Any) -> None:
        new = [np.asarray(of_all, np.float64) for of_all in state.attention]
        before = self.sums.get(component, [np.zeros(()) for _ in new])
        self.sums[component] = [one + other for one, other in zip(before, new, strict=True)]
        self.steps[component] = self.steps.get(component, 0) + self._now


def calibrate_heads(
    pipe: Pipeline, prompts: Sequence[str], told: Callable[[int], None] = lambda done: None, **options: Any
) -> dict[str, Heads]:
    """Component -> its heads, from a plain run of each prompt.

    told     is called with the number of prompts that are done
    options  of a `Request`; the steps are the timestep bins, and a seed is that of every run
    """
    watch, jobs = HeadWatch(), pipe.prepare(Request(prompt=list(prompts), **options))
    for index in range(len(prompts)):
        job = jobs.single(index)
        pipe.denoise(replace(job, seeds=[options["seed"]]) if "seed" in options else job, watch=watch)
        told(index + 1)
    return {name: _heads(pipe, name, watch, len(prompts)) for name in watch.sums}


def _heads(pipe: Pipeline, name: str, watch: HeadWatch, runs: int) -> Heads:
    config, leaves = pipe.checkpoint.component(name).config, pipe.checkpoint.leaves(name)
    sums = {kind: of_all / runs for kind, of_all in zip(HeadSums._fields, watch.sums[name], strict=True)}
    inside = sums["inside"] * runs / watch.steps[name]
    scores = scored_heads(config, sums, lambda module: _output_norms(leaves[f"{module}.o.kernel"]))
    return Heads(scores=scores, types=head_types(inside) if inside.any() else None)


def _output_norms(leaf: Leaf) -> np.ndarray:
    return np.stack([output_norms(leaf.block(block)) for block in range(leaf.shape[0])])


def plot_types(types_GH: np.ndarray, kept_GK: np.ndarray, file: Path) -> None:
    """Draws how many heads of every block are of each type (as PARE's figure 2), before and after pruning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    for axes, types, title in zip(
        panels, (types_GH, np.take_along_axis(types_GH, kept_GK, axis=1)), ("all heads", "kept heads"), strict=True
    ):
        draw_types(axes, types)
        axes.set_ylabel(title)
    panels[0].legend(ncols=3, loc="upper right")
    panels[1].set_xlabel("block")
    figure.savefig(file, dpi=120)


def draw_types(axes: Axes, types_GH: np.ndarray) -> None:
    """Bars of how many heads of every block are of each type."""
    blocks, below = np.arange(len(types_GH)), np.zeros(len(types_GH))
    for kind, colour in zip(HEAD_TYPES, ("#4477aa", "#bbbbbb", "#ee6677"), strict=True):
        count = (types_GH == kind).sum(axis=1)
        axes.bar(blocks, count, bottom=below, color=colour, label=kind, width=0.9)
        below += count
