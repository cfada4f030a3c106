"""CoReDiT's figure: what a block finds alike on a picture, what it skips for it, and which blocks may skip how much.

Shapes: R batch rows (guidance branches included), N tokens, D width, G blocks, S sampler steps, Y X token lattice.
"""

from __future__ import annotations

import functools
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.methods.coherence import Lattice, kept, protected
from dit_jax.methods.coredit import Coherent, Coredit
from dit_jax.methods.coredit_ratios import bucketed
from dit_jax.methods.method import Run
from dit_jax.models.network import State
from dit_jax.sampling.sampler import Guided
from infer.figures import style
from infer.figures.recording import calibrated
from infer.pipeline import Pipeline
from infer.request import Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROMPTS = (
    "two green 4s left of a white 9 on a striped background",
    "a yellow 3 on a checkered background",
    "a blue 2 above a yellow 6",
    "a red 7",
)
SEED, RATIO, STEPS = 4, 0.3, 8
HEIGHT, LINE = 7.5, 34  # inches, and characters of a title's line


@dataclass(frozen=True)
class CoherentSeen:
    """CoReDiT's attention, which also keeps in the block loop's state the coherence that it chose by [G, R, N]."""

    coherent: Coherent

    def __call__(self, attention, x_BMD, place, block, cache, aux):
        lattice = self.coherent.lattice
        attended, _ = self.coherent(attention, x_BMD, place, block, None, aux)
        return attended, cache.at[block].set(lattice.coherence(x_BMD[:, : lattice.tokens], block))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("guided",), meta_fields=("steps",))
@dataclass(frozen=True, kw_only=True)
class SeenCoherence:
    """A denoiser of CoReDiT; its state is the coherence of all blocks at every step so far [S, G, R, N]."""

    guided: Guided
    steps: int

    @property
    def attention(self) -> Coherent:
        """The denoiser's own attention."""
        assert isinstance(self.guided.call.attention, Coherent)
        return self.guided.call.attention

    def init(self, latents, before=None):
        rows = len(latents) * self.guided.branches
        shape = (self.steps, sum(self.guided.model.stacks), rows, self.attention.lattice.tokens)
        return jnp.zeros(shape, jnp.float32)

    def __call__(self, latents, state, step):
        seen = replace(self.guided, call=replace(self.guided.call, attention=CoherentSeen(self.attention)))
        velocity, after = seen(latents, State(attention=state[step.index]), step)
        return velocity, state.at[step.index].set(after.attention)

    def finish(self, latents):
        return self.guided.finish(latents)


class CoherenceWatch:
    """Keeps the lattice of a run's tokens and the coherence of all its steps and blocks [S, G, R, N]."""

    lattice: Lattice
    coherence: np.ndarray

    def around(self, denoiser: Guided, run: Run) -> SeenCoherence:
        seen = SeenCoherence(guided=denoiser, steps=run.steps)
        self.lattice = seen.attention.lattice
        return seen

    def finished(self, component: str, state: jax.Array) -> None:
        self.coherence = np.asarray(state)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What one block did at one step, of the first row and its first latent frame: arrays [Y, X].

    cell  side of its cells of coherence, in tokens
    """

    block: int
    step: int
    cell: int
    coherence: np.ndarray
    skipped: np.ndarray
    protected: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A picture [H, W, 3] that was drawn with calibrated ratios [G], and two of its blocks."""

    frame: np.ndarray
    prompt: str
    ratios: np.ndarray
    buckets: np.ndarray
    target: float
    blocks: list[Skipped]


def measured(
    pipe: Pipeline,
    prompts: Sequence[str] = PROMPTS,
    ratio: float = RATIO,
    seed: int = SEED,
    calibration: dict[str, Any] | None = None,
    **options: Any,
) -> Pruned:
    """Calibrates the ratios on the prompts and draws the first with them.

    calibration  further options of `dit-calibrate coredit`, by name; `options` are of the picture's `Request`
    """
    with tempfile.TemporaryDirectory() as folder:
        told = {"ratio": ratio, "steps": STEPS} | (calibration or {})
        file, report = calibrated(pipe, "coredit", prompts, Path(folder), told)
        job = pipe.prepare(Request(prompt=prompts[0], plan=f"coredit:{file}", seed=seed, **options))
        result = pipe.decode(job, pipe.denoise(job, watch=(watch := CoherenceWatch())))
        [coredit] = job.plan.methods
    assert isinstance(coredit, Coredit)
    ratios = np.asarray(report["ratios"]["transformer"])
    step = job.steps // 2
    # One of each size of cell: those that skip about as much as all do on average.
    usual = [min(range(parity, len(ratios), 2), key=lambda block: abs(ratios[block] - ratio)) for parity in (0, 1)]
    return Pruned(
        frame=result.frames[0],
        prompt=prompts[0],
        ratios=ratios,
        buckets=np.asarray(bucketed(tuple(ratios.tolist()), coredit.buckets)),
        target=ratio,
        blocks=[skipped_at(watch, coredit, step, block) for block in usual],
    )


def skipped_at(watch: CoherenceWatch, coredit: Coredit, step: int, block: int) -> Skipped:
    """What a block of the first transformer skipped, of the coherence that it had found."""
    lattice, coherence_SGRN = watch.lattice, watch.coherence
    steps, blocks = coherence_SGRN.shape[:2]
    count = int(coredit.skipped(lattice, blocks, steps)[0, step, block])
    coherence = jnp.asarray(coherence_SGRN[step, block, :1])
    order = lattice.skipping_order(coherence, jnp.asarray(block))
    stays = kept(order, count, lattice.tokens - count).mask

    def of_frame(of_tokens) -> np.ndarray:
        return np.asarray(of_tokens).reshape(lattice.grid)[0]

    return Skipped(
        block=block,
        step=step,
        cell=lattice.cells[block % 2],
        coherence=of_frame(coherence),
        skipped=of_frame(~stays),
        protected=of_frame(protected(lattice)[block % lattice.stride]),
    )


def draw(figure: Figure, found: Pruned) -> None:
    """The picture and the ratios of all blocks; of two blocks coherence, and what they skip."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels = figure.subplots(2, 3)
    style.picture_panel(panels[0, 0], found.frame, textwrap.fill(found.prompt, LINE))
    _draw_ratios(panels[1, 0], found)
    scale = np.concatenate([of_block.coherence for of_block in found.blocks])
    for row, of_block in zip(panels[:, 1:], found.blocks, strict=True):
        heat = _draw_coherence(row[0], of_block, found.frame, (float(scale.min()), float(scale.max())))
        _draw_skipped(row[1], of_block, found.frame)
    below = panels[1, 1].inset_axes((0.1, -0.1, 0.8, 0.04))
    figure.colorbar(heat, cax=below, orientation="horizontal", label="coherence")
    marks = [
        Patch(color=style.GREY, label="skipped"),
        Line2D([], [], color=style.CYAN, marker="o", markersize=4, linestyle="", label="protected"),
    ]
    place = dict(loc="upper center", bbox_to_anchor=(0.5, -0.04))
    panels[1, 2].legend(handles=marks, ncols=2, handlelength=1, handleheight=1, **place)


def _draw_coherence(axes: Axes, found: Skipped, frame: np.ndarray, scale: tuple[float, float]) -> Any:
    height, width = frame.shape[:2]
    low, high = scale
    heat = axes.imshow(found.coherence, cmap=style.HEAT, vmin=low, vmax=high, extent=(0, width, height, 0))
    style.cell_lines(axes, found.cell * width / found.coherence.shape[1], (width, height), width=1)
    style.bare(axes, f"block {found.block}: coherence\nin cells of {found.cell}×{found.cell} tokens")
    return heat


def _draw_skipped(axes: Axes, found: Skipped, frame: np.ndarray) -> None:
    from matplotlib.colors import to_rgba

    rows, columns = found.skipped.shape
    height, width = frame.shape[:2]
    style.picture_panel(
        axes, frame, f"block {found.block}: {found.skipped.mean():.0%} of the tokens\nskip its attention"
    )
    veil = np.ones((rows, columns, 4)) * to_rgba(style.GREY)
    veil[..., 3] = np.where(found.skipped, 0.88, 0)
    axes.imshow(veil, extent=(0, width, height, 0), interpolation="nearest")
    style.cell_lines(axes, width / columns, (width, height), "#777777", 0.3)
    y, x = np.nonzero(found.protected)
    axes.plot((x + 0.5) * width / columns, (y + 0.5) * height / rows, ".", color=style.CYAN, markersize=4)


def _draw_ratios(axes: Axes, found: Pruned) -> None:
    blocks = np.arange(len(found.ratios))
    axes.bar(blocks, found.ratios, width=0.8, color=style.BLUE, label="calibrated")
    axes.plot(blocks, found.buckets, "_", color=style.RED, markersize=11, markeredgewidth=2, label="in buckets")
    axes.axhline(found.target, color="#555555", linewidth=0.8, linestyle="--", label="mean")
    axes.set_box_aspect(1)
    axes.set_ylim(0, 1.35 * max(found.ratios))
    axes.set_xlabel("block")
    axes.set_title("share of the tokens\nthat each block skips")
    axes.legend(ncols=3, loc="upper center", columnspacing=0.8, handlelength=1.2)
