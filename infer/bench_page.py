"""What `dit-bench` found as a picture, quality against time, and as a page that holds it with a table."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_jax.config import UserError

QUALITIES = {
    "all": "prompts fully right",
    "psnr": "PSNR to the dense result (dB)",
    "ssim": "SSIM to the dense result",
    "frechet": "Fréchet distance to real samples",
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
    "frechet": "Fréchet distance",
}
MARKERS = "osD^vPX*<>"
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
    qualities = qualities_of(rows)
    _draw(path, rows, qualities)
    page = path.with_suffix(".html")
    page.write_text(_page(rows, qualities, path.read_bytes()), encoding="utf-8")
    return [path, page]


def qualities_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of QUALITIES that every row has; efficiency only where there is nothing else."""
    found = [name for name in QUALITIES if all(row.get(name) is not None for row in rows)]
    return [name for name in found if name != "efficiency"] or found


def _draw(path: Path, rows: Sequence[Mapping[str, Any]], qualities: Sequence[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(qualities), 2)
    lines = -(-len(qualities) // columns)
    figure = Figure(figsize=(8 * columns, 5 * lines), dpi=150 // columns, layout="constrained")
    FigureCanvasAgg(figure)
    for number, quality in enumerate(qualities, start=1):
        _draw_quality(figure.add_subplot(lines, columns, number), rows, quality)
    figure.suptitle(title(rows))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.savefig(path, format="png")


def _draw_quality(axes: Any, rows: Sequence[Mapping[str, Any]], quality: str) -> None:
    """Each method's plans joined by a line, with the margins of their scores."""
    # The dense run is its own reference: its PSNR would flatten the others.
    is_reference = quality in ("psnr", "ssim") and len(rows) > 1
    of_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows[1:] if is_reference else rows:
        of_method.setdefault(series(row["plan"])[0], []).append(row)
    for index, (method, of_it) in enumerate(of_method.items()):
        points = sorted(of_it, key=lambda row: row["seconds"])
        seconds, values = ([row[name] for row in points] for name in ("seconds", quality))
        margins = [(row.get("margins") or {}).get(quality, 0) for row in points]
        style = {"marker": MARKERS[index % len(MARKERS)], "color": f"C{index}", "label": method}
        axes.errorbar(seconds, values, yerr=margins, capsize=2, alpha=0.8, **style)
        for row in points:
            place = row["seconds"], row[quality]
            axes.annotate(series(row["plan"])[1], place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    if is_reference:
        axes.axvline(rows[0]["seconds"], color="0.5", linestyle="--", label=f"{rows[0]['plan']} (time)")
    axes.set_xlabel("seconds")
    axes.set_ylabel(QUALITIES[quality])
    axes.margins(0.1)
    axes.grid(alpha=0.3)


def series(plan: str) -> tuple[str, str]:
    """A plan's method and what sets it apart from others of that method: of `on:FOLDER+routing:max=6` routing and
    max=6; files go unsaid where there are other words, and a checkpoint without a plan is `on` its folder's name."""
    folder, rest = "", plan
    steps: list[str] = []
    while rest.startswith("on:") or (rest.startswith("dense:") and "+" in rest):
        first, _, rest = rest.partition("+")
        word, _, value = first.partition(":")
        folder, steps = (value, steps) if word == "on" else (folder, [f"{value} steps"])
    if not rest:
        return "on", ":".join([Path(folder).name, *steps])
    method, *told = re.split("[:+]", rest, maxsplit=1)
    words = told[0].split(":") if told else []
    said = [word for word in words if not word.endswith(".json")] or [Path(word).stem for word in words if not steps]
    return method, ":".join(said + steps)


def title(rows: Sequence[Mapping[str, Any]]) -> str:
    """Model and shape."""
    first = rows[0]
    width, height = first["size"]
    return f"{first['model']}, {width}x{height}x{first['frames']}, {first['tokens']} tokens"


def _page(rows: Sequence[Mapping[str, Any]], qualities: Sequence[str], picture: bytes) -> str:
    first, columns = rows[0], [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    setting = f"{first['device']}, jax {first['jax']}, {first['solver']} solver, {first['samples']} samples a plan"
    lines = ["".join(f"<td>{html.escape(cell(name, row))}</td>" for name in columns) for row in rows]
    return PAGE.format(
        title=html.escape(title(rows)),
        setting=html.escape(setting),
        alt=html.escape(f"{', '.join(QUALITIES[quality] for quality in qualities)} against seconds"),
        picture=base64.b64encode(picture).decode(),
        heads="".join(f"<th>{html.escape(COLUMNS[name])}</th>" for name in columns),
        lines="\n".join(f"<tr>{line}</tr>" for line in lines),
    )


def cell(name: str, row: Mapping[str, Any]) -> str:
    """A figure of a table, with its margin if it has one."""
    value, margin = row.get(name), (row.get("margins") or {}).get(name)
    if value is None:
        return ""
    if name == "peak_bytes":
        return f"{value / 2**30:.2f}"
    figure = f"{value:.3f}" if isinstance(value, float) else str(value)
    return figure if margin is None else f"{figure} ± {margin:.3f}"
