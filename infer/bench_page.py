"""What `dit-bench` found as a picture, quality against time, and as a page that holds it with a table."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_jax.config import UserError

QUALITIES = {
    "all": "prompts fully right",
    "psnr": "PSNR to the dense result (dB)",
    "ssim": "SSIM to the dense result",
    "efficiency": "measured over predicted speed-up",
}
COLUMNS = {
    "plan": "plan",
    "steps": "steps",
    "seconds": "seconds",
    "compile_seconds": "compiling (s)",
    "predicted_speedup": "predicted speed-up",
    "measured_speedup": "measured speed-up",
    "efficiency": "efficiency",
    "attention_seconds": "attention (s)",
    "attention_efficiency": "attention's efficiency",
    "peak_bytes": "peak (GiB)",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "all": "fully right",
}
PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ border-bottom: 1px solid #ccc; padding: .3rem .6rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
img {{ max-width: 100% }}
</style></head><body>
<h1>{title}</h1>
<p>{setting}</p>
<img alt="{alt}" src="data:image/png;base64,{picture}">
<table><thead><tr>{heads}</tr></thead><tbody>
{lines}
</tbody></table>
</body></html>
"""


def check_plotting() -> None:
    """UserError where there is nothing to plot with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "--plot needs matplotlib, which is not installed: expected the train extra; run pip install dit-jax[train]"
        ) from None


def write_plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Writes the PNG and, beside it, the page; returns both."""
    quality = quality_of(rows)
    _draw(path, rows, quality)
    page = path.with_suffix(".html")
    page.write_text(_page(rows, quality, path.read_bytes()), encoding="utf-8")
    return [path, page]


def quality_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first of QUALITIES that every row has."""
    return next(name for name in QUALITIES if all(row.get(name) is not None for row in rows))


def _draw(path: Path, rows: Sequence[Mapping[str, Any]], quality: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # The dense run is its own reference: its PSNR would flatten the others.
    shown = [row for row in rows if not (quality in ("psnr", "ssim") and row is rows[0] and len(rows) > 1)]
    for row in shown:
        axes.plot(row["seconds"], row[quality], "o", color="C0")
        axes.annotate(row["plan"], (row["seconds"], row[quality]), xytext=(5, 5), textcoords="offset points")
    if len(shown) < len(rows):
        axes.axvline(rows[0]["seconds"], color="C1", linestyle="--", label=rows[0]["plan"])
        axes.legend()
    axes.set_xlabel("seconds")
    axes.set_ylabel(QUALITIES[quality])
    axes.set_title(title(rows))
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def title(rows: Sequence[Mapping[str, Any]]) -> str:
    """Model and shape."""
    first = rows[0]
    width, height = first["size"]
    return f"{first['model']}, {width}x{height}x{first['frames']}, {first['tokens']} tokens"


def _page(rows: Sequence[Mapping[str, Any]], quality: str, picture: bytes) -> str:
    first, columns = rows[0], [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    setting = f"{first['device']}, jax {first['jax']}, {first['solver']} solver, {first['samples']} samples a plan"
    lines = ["".join(f"<td>{html.escape(cell(name, row.get(name)))}</td>" for name in columns) for row in rows]
    return PAGE.format(
        title=html.escape(title(rows)),
        setting=html.escape(setting),
        alt=html.escape(f"{QUALITIES[quality]} against seconds"),
        picture=base64.b64encode(picture).decode(),
        heads="".join(f"<th>{html.escape(COLUMNS[name])}</th>" for name in columns),
        lines="\n".join(f"<tr>{line}</tr>" for line in lines),
    )


def cell(name: str, value: Any) -> str:
    """A figure of a table."""
    if value is None:
        return ""
    if name == "peak_bytes":
        return f"{value / 2**30:.2f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
