"""What `train.miniature` found: students beside the model that they learnt from, and the papers' ablations in pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from infer.paired_differences import AS_IN_THE_PAPER, Interval, verdict
from infer.paired_scores import OUTCOMES, differences, read_report
from train.miniature_stages import Study, entries

SCORES = {"demo-flux": ("all", "digit", "colour", "count"), "demo-wan": ("all", "digit", "colour", "direction")}
JUDGED = "digit"  # the score that ablations are judged by

# What a paper finds better and what worse, by the names of their scores.
ABLATIONS = {
    "scored above random width": ("stage1", "stage1-random"),
    "temporal heads protected above not": ("stage1", "stage1-unprotected"),
    "R(t, c) above R(t)": ("stage2-brief", "stage2-time"),
    "routed above random blocks": ("stage2", "stage2-lot"),
    "progressive above raw": ("stage2-brief", "stage2-raw"),
    "adaptive above uniform ratios": ("coredit", "coredit-uniform"),
    "LoRA above none": ("ddit", "ddit-bare"),
    "third above second difference": ("ddit", "ddit-order2"),
    "third above first difference": ("ddit", "ddit-order1"),
}
KEPT = ("settings", "margins", "frechet", OUTCOMES)


def report(study: Study) -> dict[str, Any]:
    """All figures, from the files of the study."""
    names = SCORES[study.model]
    benched = {row["plan"]: row for row in json.loads(study.path("bench.json").read_text())}
    students = {}
    for name, entry in entries(study).items():
        scored, timed = read_report(study.report(name)), benched[entry]
        students[name] = {
            "seconds": timed["seconds"],
            "speedup": timed["measured_speedup"],
            "step_time": timed["seconds"] / timed["steps"] / (benched["dense"]["seconds"] / study.steps),
            **{score: scored[score] for score in names},
            "against_teacher": scored.get("against", {}).get("differences"),
            **{kept: scored[kept] for kept in KEPT},
        }
    pairs = {name: pair for name, pair in ABLATIONS.items() if all(study.report(side).exists() for side in pair)}
    return {
        "model": study.model,
        "samples": study.samples,
        "steps": study.steps,
        "blocks": study.blocks,
        "examples": study.examples,
        "length": study.length,
        "seed": study.seed,
        "ceiling": read_report(study.report("teacher"))["ceiling"],
        "students": students,
        "ablations": {name: _ablation(study, *pair) for name, pair in pairs.items()},
    }


def _ablation(study: Study, better: str, worse: str) -> dict[str, Any]:
    ours, theirs = (read_report(study.report(side)) for side in (better, worse))
    names = SCORES[study.model]
    return {
        "better": {score: ours[score] for score in (*names, "frechet")},
        "worse": {score: theirs[score] for score in (*names, "frechet")},
        "differences": differences(ours, theirs),
    }


def table(found: Mapping[str, Any]) -> str:
    """Both tables in Markdown; shares in percent, differences in points with their 95 % intervals."""
    names = SCORES[found["model"]]
    lines = [
        "| | seconds | speed-up | step | " + " | ".join(f"{name} %" for name in names) + " | Fréchet | "
        + " | ".join(f"{name}, points to the teacher" for name in names[1:]) + " |",
        "|---" * (5 + len(names) + len(names) - 1) + "|",
    ]  # fmt: skip
    for name, row in found["students"].items():
        cells = [name, f"{row['seconds']:.2f}", f"{row['speedup']:.2f}", f"{row['step_time']:.2f}"]
        cells += [f"{100 * row[score]:.1f}" for score in names] + [f"{row['frechet']:.1f}"]
        told = row["against_teacher"] or {}
        cells += [_points(told[score]) if score in told else "" for score in names[1:]]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"| ablation | better: {JUDGED} % | worse | points (95 %) | Fréchet | found |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["ablations"].items():
        change = Interval(**row["differences"][JUDGED])
        cells = [
            name,
            f"{100 * row['better'][JUDGED]:.1f}",
            f"{100 * row['worse'][JUDGED]:.1f}",
            _points(change._asdict()),
        ]
        cells += [f"{row['better']['frechet']:.1f} / {row['worse']['frechet']:.1f}", verdict(change, AS_IN_THE_PAPER)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _points(change: Mapping[str, float]) -> str:
    return "{mean:+.1f} ({low:+.1f} to {high:+.1f})".format(**{name: 100 * value for name, value in change.items()})
