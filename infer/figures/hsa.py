"""HSA's figure: which tokens of a sample get which budget, and which groups every step refreshes.

Shapes: T Y X token lattice, N tokens, F frames, H W pixels, S sampler steps, A groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_jax.methods.hsa import Hsa, HsaDenoiser, HsaState
from dit_jax.methods.method import Run
from dit_jax.methods.token_groups import ranks_of_places
from dit_jax.models.network import grid
from infer.figures import style
from infer.figures.recording import VIDEO_PROMPTS
from infer.pipeline import Pipeline
from infer.request import Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEED = 3
PLANS = ("hsa:75A", "hsa:50")
HEIGHT = 8.2
COLOURS = (style.RED, style.YELLOW, style.BLUE)  # from the largest budget to the smallest


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """What a plan made of a sample.

    name    of the preset, or all that the plan says
    frames  uint8 [F, H, W, 3]
    change  mean relative change of every token's velocity over the steps that rank [T, Y, X]
    groups  the group of every token [T, Y, X]
    """

    name: str
    hsa: Hsa
    frames: np.ndarray
    change: np.ndarray
    groups: np.ndarray


class GroupWatch:
    """Keeps a run's denoiser and its last state, whose ranking is the final one."""

    denoiser: HsaDenoiser
    state: HsaState

    def around(self, denoiser: HsaDenoiser, run: Run) -> HsaDenoiser:
        self.denoiser = denoiser
        return denoiser

    def finished(self, component: str, state: HsaState) -> None:
        self.state = state

    def groups(self) -> np.ndarray:
        """The group of every token of the first sample, in raster order [N]."""
        order = np.asarray(self.state.order[0])
        groups = np.empty_like(order)
        ranks = ranks_of_places(len(order), self.denoiser.shards)
        groups[order] = np.searchsorted(self.denoiser.ends, ranks, side="right")
        return groups


def measured(
    pipe: Pipeline, prompt: str = VIDEO_PROMPTS[0], plans: Sequence[str] = PLANS, seed: int = SEED, **options: Any
) -> list[Grouped]:
    """Runs the prompt under each plan; `options` are of a `Request`."""
    return [_grouped(pipe, Request(prompt=prompt, plan=plan, solver="euler", seed=seed, **options)) for plan in plans]


def _grouped(pipe: Pipeline, request: Request) -> Grouped:
    job, watch = pipe.prepare(request), GroupWatch()
    result = pipe.decode(job, pipe.denoise(job, watch=watch))
    [hsa] = job.plan.methods
    assert isinstance(hsa, Hsa)
    tokens = grid(result.latents.shape, pipe.transformer_config.patch)
    count = int(np.prod(tokens))
    change = np.asarray(watch.state.change[0]) / max(hsa.margin - 1, 1)
    return Grouped(
        name=str(job.plan).removeprefix("hsa:"),
        hsa=hsa,
        frames=result.frames[0],
        change=change[:count].reshape(tokens),
        groups=watch.groups()[:count].reshape(tokens),
    )


def draw(figure: Figure, found: Sequence[Grouped]) -> None:
    """Frames, change and groups by latent frame, and below them the activity tables."""
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2 + len(found), 1.5))[:, 0]
    shown, columns = found[0], len(found[0].change)
    panels = above.subplots(2 + len(found), columns + 1, squeeze=False, width_ratios=[1] * columns + [0.6])
    top = np.percentile(shown.change, 98)
    for column, frame in enumerate(frame_of_each(columns, len(shown.frames))):
        style.picture_panel(panels[0, column], shown.frames[frame])
        panels[0, column].set_title(f"latent frame {column}", loc="center")
        heat = panels[1, column].imshow(shown.change[column], cmap=style.HEAT, vmin=0, vmax=top)
        for row, of_plan in zip(panels[2:], found, strict=True):
            _group_map(row[column], of_plan, column)
    for panel in panels.flat:
        style.bare(panel)
    for row, label in zip(panels, ("decoded", "change", *(f"groups, {of.name}" for of in found)), strict=True):
        row[0].set_ylabel(label)
    bar = above.colorbar(heat, cax=panels[1, -1].inset_axes((0, 0.08, 0.13, 0.84)), extend="max")
    bar.set_label("relative change\nof the velocity", fontsize=8)
    for row, of_plan in zip(panels[2:], found, strict=True):
        labels = [f"{budget} steps" for budget in of_plan.hsa.budgets]
        style.colour_key(row[-1], _colours(of_plan.hsa), labels, loc="center left", bbox_to_anchor=(-0.15, 0.5))
    for axes, of_plan in zip(below.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        draw_activity(axes, of_plan)


def frame_of_each(latent_frames: int, frames: int) -> list[int]:
    """A frame from the middle of those that every latent frame stands for: the first stands for one alone."""
    if latent_frames == 1:
        return [0]
    each = (frames - 1) // (latent_frames - 1)
    return [0, *(1 + each * index + each // 2 for index in range(latent_frames - 1))]


def _group_map(axes: Axes, found: Grouped, frame: int) -> None:
    from matplotlib.colors import ListedColormap

    colours = _colours(found.hsa)
    axes.imshow(found.groups[frame], cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5)


def _colours(hsa: Hsa) -> list[str]:
    return [*COLOURS[: len(hsa.budgets) - 1], COLOURS[-1]]


def draw_activity(axes: Axes, found: Grouped) -> None:
    """`Hsa.active` as a table whose rows are as high as the groups are large: what is filled is the work."""
    hsa = found.hsa
    edges = np.append(0, np.cumsum(hsa.shares)) * 100
    for group, colour in enumerate(_colours(hsa)):
        steps = np.flatnonzero(hsa.active[:, group])
        axes.bar(steps, edges[group + 1] - edges[group], bottom=edges[group], width=0.82, color=colour, linewidth=0)
    for place in (hsa.margin - 0.5, hsa.steps - hsa.margin - 0.5):
        axes.axvline(place, color="#555555", linewidth=0.8, linestyle="--")
    axes.set_ylim(100, 0)
    axes.set_xlim(-0.7, hsa.steps - 0.3)
    axes.set_yticks(edges.round(), [f"{edge:.0f} %" for edge in edges])
    axes.set_xlabel("step")
    axes.set_ylabel("tokens by rank")
    axes.spines["bottom"].set_visible(False)
    work = sum(map(hsa.share_of_full, range(hsa.steps)))
    axes.set_title(f"{found.name}: refreshed at each step, {work:.1f} of {hsa.steps} token-steps")
