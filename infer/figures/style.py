"""One look for all figures: colours that the colour-blind tell apart, sizes for the width of a README, small files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dit_jax.config import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI = 9.0, 180  # inches, and pixels an inch: twice the width of a README
PALETTE = 256  # colours of a file
BLUE, RED, GREEN, YELLOW, CYAN, PURPLE, GREY = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb",
)  # fmt: skip
FAINT = "#e8e8e8"
HEAT = "cividis"
STYLE: Any = {
    "axes.edgecolor": "#555555",
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def check_drawing() -> None:
    """UserError where there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "figures need matplotlib, which is not installed: expected the train extra; run pip install dit-jax[train]"
        ) from None


def write_figure(path: Path, height: float, draw: Callable[[Figure], None]) -> None:
    """Draws on a figure of this height in inches, and writes it as a PNG of few colours and no date."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB")
    few = picture.quantize(PALETTE, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    partial = path.with_name(f"{path.name}.partial")
    few.save(partial, format="PNG", optimize=True)
    partial.replace(path)


def picture_panel(axes: Axes, frame: np.ndarray, title: str = "") -> None:
    """A decoded frame [H, W, 3]; one unit is one pixel."""
    axes.imshow(frame, interpolation="nearest", extent=(0, frame.shape[1], frame.shape[0], 0))
    bare(axes, title)


def bare(axes: Axes, title: str = "") -> None:
    """A picture's panel: no ticks, no frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title)


def cell_lines(axes: Axes, cell: float, size: tuple[int, int], colour: str = "white", width: float = 0.6) -> None:
    """Lines between square cells of this many units on a picture of `size` (width, height) units."""
    for place in np.arange(cell, size[0], cell):
        axes.plot([place, place], [0, size[1]], color=colour, linewidth=width)
    for place in np.arange(cell, size[1], cell):
        axes.plot([0, size[0]], [place, place], color=colour, linewidth=width)


def colour_key(axes: Axes, colours: Sequence[str], labels: Sequence[str], **place: Any) -> None:
    """A legend of filled squares."""
    from matplotlib.patches import Patch

    squares = [Patch(color=colour, label=label) for colour, label in zip(colours, labels, strict=True)]
    axes.legend(handles=squares, handlelength=1, handleheight=1, **place)
