"""What a load test has found: counts, percentiles and rates, as JSON and as a table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from infer.load_client import OUTCOMES
from infer.load_loops import Record

PERCENTILES = (50, 90, 95, 99)
ALL = "all"
SHOWN = 10  # reasons in the table


def summary(records: Sequence[Record], seconds: float) -> dict[str, Any]:
    """Of requests that were sent within so many seconds: counts, rates a second, latencies and stages in seconds."""
    counts = Counter(record.outcome for record in records)
    good = [record for record in records if record.outcome == "ok"]
    groups = {ALL: good, **_grouped(good)}
    return {
        "sent": len(records),
        "sent_rate": len(records) / seconds,
        "answered_rate": len(good) / max([seconds, *(record.end for record in good)]),
        "late_seconds": max((record.late for record in records), default=0.0),
        "outcomes": {outcome: counts[outcome] for outcome in OUTCOMES},
        "errors": dict(Counter(record.reason for record in records if record.outcome == "error").most_common()),
        "latency": {name: percentiles([record.seconds for record in group]) for name, group in groups.items()},
        "stages": {name: _stages(group) for name, group in groups.items()},
        "refusals": _refusals(records),
    }


def _grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups = defaultdict(list)
    for record in sorted(records, key=lambda record: str(record.kind)):
        groups[str(record.kind)].append(record)
    return dict(groups)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """How many, and the percentiles `p50` and so on; of none at all only their number."""
    found = zip(PERCENTILES, np.percentile(seconds, PERCENTILES), strict=True) if len(seconds) else ()
    return {"count": len(seconds), **{f"p{share}": float(value) for share, value in found}}


def _stages(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    names = dict.fromkeys(name for record in records for name in record.stages)
    return {name: percentiles([record.stages[name] for record in records if name in record.stages]) for name in names}


def _refusals(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """How malformed requests were answered: what was wrong with them -> status -> how many."""
    found: dict[str, Counter] = defaultdict(Counter)
    for record in records:
        if record.bad is not None:
            found[record.bad][str(record.status or record.outcome)] += 1
    return {name: dict(found[name]) for name in sorted(found)}


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The requests, as JSON can hold them."""
    return [asdict(record) | {"kind": str(record.kind)} for record in records]


def problems(
    memory: Mapping[str, Any] | None, gone: bool, metrics: Mapping[str, float] | None, most_growth: float | None
) -> list[str]:
    """What is wrong with the server beside the answers of single requests.

    memory, metrics  what was seen of them; most_growth  that memory may have after the warm-up (0.05 is 5 %)
    """
    found = []
    if gone:
        found.append("the server's process is gone")
    if metrics is not None and metrics["compilations"] > 0:
        found.append(f"{metrics['compilations']:.0f} programs were compiled during the load: expected none")
    if metrics is not None and metrics["waiting"] + metrics["running"] > 0:
        found.append(
            f"{metrics['waiting']:.0f} samples wait and {metrics['running']:.0f} run after the last request has ended: "
            "expected none"
        )
    if most_growth is not None and memory is None:
        found.append("memory was seen too short to tell its growth")
    elif most_growth is not None and memory is not None and memory["growth"] > most_growth:
        found.append(f"memory grew by {memory['growth']:.1%} after the warm-up: expected at most {most_growth:.1%}")
    return found


def table(report: Mapping[str, Any]) -> str:
    """The report for reading."""
    stages = list(dict.fromkeys(name for of_kind in report["stages"].values() for name in of_kind))
    heads = ["seconds", "count", *(f"{share} %" for share in PERCENTILES), *(f"{name} (50 %)" for name in stages)]
    lines = [heads]
    for name, latency in report["latency"].items():
        cells = [latency.get(f"p{share}") for share in PERCENTILES]
        cells += [report["stages"][name].get(stage, {}).get("p50") for stage in stages]
        lines.append([name, str(latency["count"]), *("" if cell is None else f"{cell:.2f}" for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join([*("  ".join(_aligned(line, widths)).rstrip() for line in lines), "", *_sentences(report)])


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if place == 0 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def _sentences(report: Mapping[str, Any]) -> list[str]:
    counts = ", ".join(f"{count} {OUTCOMES[outcome]}" for outcome, count in report["outcomes"].items())
    said = [
        f"{report['sent']} requests sent, {report['sent_rate']:.3g} a second, at most {report['late_seconds']:.2f} s "
        f"late; {report['answered_rate']:.3g} a second answered",
        counts,
    ]
    if report["capacity"] is not None:
        capacity = report["capacity"]
        said.append(f"capacity {capacity['rate']:.3g} a second ({capacity['answers']} in {capacity['seconds']:.0f} s)")
    if report["memory"] is not None:
        first, last = (report["memory"][name] / 2**20 for name in ("first_bytes", "last_bytes"))
        said.append(f"memory {first:.0f} MiB after the warm-up, {last:.0f} MiB at the end ({last / first - 1:+.1%})")
    if report["metrics"] is not None:
        metrics = report["metrics"]
        said.append(
            f"{metrics['compilations']:.0f} compilations during the load, {metrics['waiting']:.0f} samples waiting "
            "after it"
        )
    told = [f"error: {reason} ({count} x)" for reason, count in list(report["errors"].items())[:SHOWN]]
    return [*said, *told, *(f"problem: {problem}" for problem in report["problems"])]
