"""PARE's figure: types of heads by block before and after pruning (as the paper's Figure 2), the budget of blocks over
the timesteps, and which blocks a router runs (as its Figure 3).

Shapes: G blocks, H heads, K kept heads, S sampler steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_jax.methods.routing import Routing, budget
from dit_jax.sampling.schedules import TRAIN_STEPS
from infer.figures import style
from infer.figures.recording import VIDEO_PROMPTS
from infer.head_calibration import calibrate_heads, draw_types
from infer.pipeline import Pipeline
from infer.prune import PROTECTION, chosen_widths
from infer.routing_statistics import draw_routing, routing_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADS, BINS = 0.3, 10  # pruned share, and steps of a calibration run
HEIGHT = 5.8


@dataclass(frozen=True, kw_only=True)
class HeadsAndBlocks:
    """What was found of a model's heads, and which blocks its router runs.

    types, kept        type of every head [G, H], and the heads that pruning keeps [G, K]
    shares, timesteps  share of the runs in which a block is active [S, G], and the steps' timesteps [S]
    limits             blocks that run at t = 0 and at pure noise
    """

    types: np.ndarray
    kept: np.ndarray
    shares: np.ndarray
    timesteps: np.ndarray
    limits: tuple[int, int]


def measured(
    pipe: Pipeline, prompts: Sequence[str] = VIDEO_PROMPTS, heads: float = HEADS, bins: int = BINS, **options: Any
) -> HeadsAndBlocks:
    """Calibrates the heads in plain runs of the prompts, and records routed runs of them, of a model with a router."""
    component = next(iter(pipe.parts))
    found = calibrate_heads(pipe, prompts, **options | {"steps": bins})[component]
    widths = chosen_widths(pipe.checkpoint, component, found, heads, 0, PROTECTION)
    shares, timesteps = routing_shares(pipe, prompts, **options)
    assert found.types is not None
    return HeadsAndBlocks(
        types=found.types,
        kept=widths.heads["blocks.attn1"],
        shares=shares,
        timesteps=timesteps,
        limits=Routing().told(pipe.parts[component]).limits(shares.shape[1]),
    )


def draw(figure: Figure, found: HeadsAndBlocks) -> None:
    """Heads on the left, all and kept; routing on the right, how many blocks and which."""
    (above, budgets), (below, routes) = figure.subplots(2, 2)
    kept = np.take_along_axis(found.types, found.kept, axis=1)
    for axes, types, title in ((above, found.types, "all heads, by block"), (below, kept, "heads that pruning keeps")):
        draw_types(axes, types)
        axes.set_ylim(0, found.types.shape[1] * 1.2)
        axes.set_yticks(range(0, found.types.shape[1] + 1, 2))
        axes.set_xticks(range(len(types)))
        axes.set_ylabel("heads")
        axes.set_title(title)
    above.legend(ncols=3, loc="upper center")
    below.set_xlabel("block")
    _draw_budget(budgets, found)
    picture = draw_routing(routes, found.shares, found.timesteps, style.HEAT)
    routes.set_title("which blocks run (untrained router)")
    figure.colorbar(picture, ax=routes, label="share of the runs", pad=0.02)


def _draw_budget(axes: Axes, found: HeadsAndBlocks) -> None:
    t = np.linspace(0, TRAIN_STEPS, 501)
    axes.plot(t, budget(t, *found.limits), color=style.BLUE, label="K(t)")
    axes.plot(found.timesteps, found.shares.sum(axis=1), "o", color=style.RED, markersize=4, label="blocks that ran")
    axes.set_xlim(TRAIN_STEPS * 1.02, -TRAIN_STEPS * 0.02)
    axes.set_ylim(0, found.shares.shape[1])
    axes.set_xlabel("timestep")
    mean = found.shares.mean()
    axes.set_title(f"blocks that run: {mean:.0%} on average over {len(found.timesteps)} steps")
    axes.legend(loc="lower left")
