"""A load test as a picture: latency over time, what was given up and refused, and the server's memory below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infer.load_client import OUTCOMES, Outcome
from infer.load_loops import Record

MARKERS = "osD^vP*<>"  # of qualities
OTHERS: Mapping[Outcome, Mapping[str, Any]] = {
    "cancelled": {"marker": "x", "color": "0.4"},
    "refused": {"marker": "|", "color": "0.6"},
    "full": {"marker": "_", "color": "tab:orange"},
    "error": {"marker": "X", "color": "red", "s": 60, "zorder": 3},
}


def write_plot(path: Path, title: str, records: Sequence[Record], memory: Mapping[str, Sequence[float]]) -> None:
    """Writes a PNG.

    memory  `seconds` from the start, and `bytes` at each; empty where nobody looked
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [3, 1] if memory["bytes"] else [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    _draw_requests(panels[0], records)
    if memory["bytes"]:
        minutes = [seconds / 60 for seconds in memory["seconds"]]
        panels[1].plot(minutes, [count / 2**20 for count in memory["bytes"]], color="tab:blue")
        panels[1].set_ylabel("server's memory (MiB)")
        panels[1].grid(alpha=0.3)
    panels[-1].set_xlabel("due (minutes from the start)")
    panels[0].set_title(title)
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path, format="png")


def _draw_requests(axes: Any, records: Sequence[Record]) -> None:
    """A colour for each model and shape, a marker for each quality; times on a logarithmic axis."""
    good = [record for record in records if record.outcome == "ok"]
    subjects = sorted({(record.kind.model, record.kind.shape) for record in good})
    qualities = list(dict.fromkeys(record.kind.quality for record in good))
    for kind in sorted({record.kind for record in good}, key=str):
        colour = f"C{subjects.index((kind.model, kind.shape)) % 10}"
        marker = MARKERS[qualities.index(kind.quality) % len(MARKERS)]
        chosen = [record for record in good if record.kind == kind]
        _scatter(axes, chosen, label=str(kind), color=colour, marker=marker, s=18, alpha=0.8)
    for outcome, style in OTHERS.items():
        chosen = [record for record in records if record.outcome == outcome]
        if chosen:
            _scatter(axes, chosen, label=f"{OUTCOMES[outcome]} ({len(chosen)})", **style)
    axes.set_yscale("log")
    axes.set_ylabel("seconds to the result")
    axes.grid(alpha=0.3)


def _scatter(axes: Any, records: Sequence[Record], **style: Any) -> None:
    axes.scatter([record.due / 60 for record in records], [record.seconds for record in records], **style)
