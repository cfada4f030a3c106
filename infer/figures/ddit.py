"""DDiT's figure: what a patch of each size covers, what the latents of plain runs say of the sizes at every step, and
which size a calibrated threshold would choose.

Shapes: R samples, S sampler steps, Q patch sizes beyond the base one, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dit_jax.methods.ddit import SCALES, Ddit, calibrated_threshold, mean_tokens, token_counts
from dit_jax.methods.patch_adapters import size_name
from infer.figures import style
from infer.figures.hsa import frame_of_each
from infer.figures.recording import VIDEO_PROMPTS
from infer.pipeline import Pipeline
from infer.request import Job, Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEED, SHARE = 3, 0.5  # SHARE: the mean token count that τ is calibrated to, of the base size's
HEIGHT = 6.6
COLOURS = (style.BLUE, style.RED, style.GREEN, style.PURPLE)
LINES: tuple[Literal["-", ":"], ...] = ("-", ":")  # of the sizes 2p and 4p
SHADES = (style.FAINT, style.CYAN, style.BLUE)  # of p, 2p and 4p
SIZES = (1, *SCALES)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What plain runs say of patch sizes.

    frame      a decoded frame of the first run, uint8 [H, W, 3]
    cells      pixels that a patch of the base size is wide
    tokens     at each size, the base size first
    values     what sizes are chosen by [R, S, Q]
    threshold  τ that reaches the wanted mean token count
    chosen     tokens of every step under it [R, S]
    """

    prompts: tuple[str, ...]
    frame: np.ndarray
    cells: int
    tokens: np.ndarray
    values: np.ndarray
    threshold: float
    chosen: np.ndarray


def measured(pipe: Pipeline, prompts: Sequence[str] = VIDEO_PROMPTS, seed: int = SEED, **options: Any) -> Sizes:
    """Records a plain run of each prompt, at the base size throughout, of a model with adapters."""
    recorded = []
    for index, prompt in enumerate(prompts):
        job = pipe.prepare(Request(prompt=prompt, plan=f"{Ddit.name}:tau=0", seed=seed, **options))
        latents, values = _values(pipe, job)
        recorded.append(values)
        if index == 0:
            frames = pipe.decode(job, latents).frames[0]
    values_RSQ = np.asarray(recorded)
    shape = (1, *pipe.latents_shape(job.size, job.frames))
    tokens = token_counts(shape, pipe.transformer_config.patch)
    threshold = calibrated_threshold(values_RSQ, tokens, wanted=SHARE * tokens[0])
    return Sizes(
        prompts=tuple(prompts),
        frame=frames[frame_of_each(shape[1], len(frames))[shape[1] // 2]],
        cells=pipe.transformer_config.patch[2] * pipe.vae.config.space_factor,
        tokens=tokens,
        values=values_RSQ,
        threshold=threshold,
        chosen=np.array([[mean_tokens(step, tokens, threshold) for step in run] for run in values_RSQ]),
    )


def _values(pipe: Pipeline, job: Job) -> tuple[np.ndarray, list[np.ndarray]]:
    """Final latents of a job, and what its size was chosen by at every step, [Q] each."""
    values: list[np.ndarray] = []

    def noted(step: int, size: int, value: np.ndarray | None) -> None:
        assert value is not None
        values.append(value)

    return pipe.denoise(job, chosen=noted), values


def draw(figure: Figure, found: Sizes) -> None:
    """Patches on a frame; below, the values of the sizes by step, and the size of every step."""
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.35))[:, 0]
    for axes, scale, tokens in zip(above.subplots(1, len(SIZES)), SIZES, found.tokens, strict=True):
        side, size = found.cells * scale, (found.frame.shape[1], found.frame.shape[0])
        style.picture_panel(axes, found.frame, f"{_name(scale)}: {side}×{side} pixels, {tokens} tokens in all")
        style.cell_lines(axes, side, size, width=0.8)
    panels = below.subplots(1, 2, width_ratios=(1.5, 1))
    _draw_values(panels[0], found)
    _draw_chosen(panels[1], found)
    below.legend(*panels[0].get_legend_handles_labels(), ncols=4, loc="outside lower center")


def _name(scale: int) -> str:
    return "p" if scale == 1 else size_name(scale)


def _draw_values(axes: Axes, found: Sizes) -> None:
    from matplotlib.lines import Line2D

    finite = np.where(np.isfinite(found.values), found.values, np.nan)
    for values_SQ, prompt, colour in zip(finite, found.prompts, COLOURS, strict=False):
        for values, line in zip(values_SQ.T, LINES, strict=True):
            axes.plot(values, color=colour, linewidth=1.2, linestyle=line, label=prompt if line == "-" else None)
    axes.axhline(found.threshold, color="#333333", linewidth=1)
    axes.annotate(
        f"τ = {found.threshold:.2g}", (0, found.threshold), xytext=(0, 3), textcoords="offset points", fontsize=8
    )
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(finite[0]) - 0.5)
    axes.set_xlabel("step")
    axes.set_title("deviation of Δ³ within patches, ρ-quantile over patches")
    kinds = [Line2D([], [], color="#555555", linestyle=line) for line in LINES]
    axes.legend(kinds, [f"in patches of {_name(scale)}" for scale in SCALES], loc="upper center")


def _draw_chosen(axes: Axes, found: Sizes) -> None:
    from matplotlib.colors import ListedColormap

    which = np.searchsorted(-found.tokens, -found.chosen)
    runs, steps = which.shape
    colours = ListedColormap(SHADES)
    axes.pcolormesh(
        np.arange(steps + 1) - 0.5, np.arange(runs + 1) - 0.5, which, cmap=colours, vmin=-0.5, vmax=len(SHADES) - 0.5,
        edgecolor="white", linewidth=0.6,
    )  # fmt: skip
    for run, colour in zip(range(runs), COLOURS, strict=False):
        axes.plot(-1.7, run, "s", color=colour, markersize=7, clip_on=False)
    axes.set_ylim(runs - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlabel("step")
    axes.set_title(f"size that τ chooses:\n{found.chosen.mean() / found.tokens[0]:.0%} of the tokens on average")
    style.colour_key(
        axes, SHADES, [_name(scale) for scale in SIZES], ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2)
    )
