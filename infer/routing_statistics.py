"""Which blocks a router runs, by block and timestep, over the runs of some prompts (as PARE's figure 3 shows it).

Shapes: S steps, B samples, G blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_jax.methods.routing import RecordedRouting
from infer.pipeline import Pipeline
from infer.request import Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


class RoutingWatch:
    """Keeps the gates of every step [S, B, G], of whichever expert it was."""

    gates: np.ndarray

    def around(self, denoiser: Any, run: Any) -> RecordedRouting:
        return RecordedRouting(denoiser=denoiser, steps=run.steps)

    def finished(self, component: str, state: Any) -> None:
        self.gates = np.asarray(state.gates)  # those of the stages before are among them


def routing_shares(
    pipe: Pipeline, prompts: Sequence[str], plan: str = "routing", **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(share of the prompts' runs in which each block was active [S, G], the steps' timesteps [S]).

    options  of a `Request`; prompts run one at a time. A block's number is that within its expert.
    """
    total: Any = 0
    for index, prompt in enumerate(prompts):
        job = pipe.prepare(Request(prompt=prompt, plan=plan, **({"seed": index} | options)))
        pipe.denoise(job, watch=(watch := RoutingWatch()))
        total = total + watch.gates.mean(axis=1)
    return total / len(prompts), np.asarray(pipe.schedule(job).timesteps)


def plot_routing(shares_SG: np.ndarray, timesteps: np.ndarray, file: Path) -> None:
    """Draws the shares: a column a step, a row a block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    picture = draw_routing(figure.subplots(), shares_SG, timesteps)
    figure.colorbar(picture, label="share of runs in which the block is active")
    figure.savefig(file, dpi=120)


def draw_routing(axes: Axes, shares_SG: np.ndarray, timesteps: np.ndarray, colours: str = "viridis") -> AxesImage:
    """The shares as a picture with its axes."""
    picture = axes.imshow(shares_SG.T, aspect="auto", origin="lower", vmin=0, vmax=1, cmap=colours)
    ticks = np.unique(np.linspace(0, len(timesteps) - 1, 6).round().astype(int))
    axes.set_xticks(ticks, [f"{timesteps[tick]:.0f}" for tick in ticks])
    axes.set_xlabel("timestep")
    axes.set_ylabel("block")
    return picture
