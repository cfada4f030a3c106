"""What `train.miniature` found: students beside the model that they learnt from, and the papers' ablations in pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_jax.config import UserError
from infer.paired_differences import AS_IN_THE_PAPER, Interval, verdict
from infer.paired_scores import differences, read_report, write_report
from train.miniature_stages import Study, entries

SCORES = {"demo-flux": ("all", "digit", "colour", "count"), "demo-wan": ("all", "digit", "colour", "direction")}
JUDGED = "digit"  # the score that ablations are judged by
ROWS = (
    "teacher", "teacher-few", "teacher-few-unguided", "finetune", "stage1-brief", "stage1", "stage2", "coredit",
    "ddit", "four-steps", "four-steps-lora", "stage3", "stage3-lora",
)  # fmt: skip
_Reports = Mapping[str, Mapping[str, Any]]

# What a paper finds better and what worse, by the names of their scores.
ABLATIONS = {
    "scored above random width": ("stage1-brief", "stage1-random"),
    "temporal heads protected above not": ("stage1-brief", "stage1-unprotected"),
    "R(t, c) above R(t)": ("stage2-brief", "stage2-time"),
    "routed above random blocks": ("stage2", "stage2-lot"),
    "progressive above raw": ("stage2-brief", "stage2-raw"),
    "adaptive above uniform ratios": ("coredit", "coredit-uniform"),
    "LoRA above none": ("ddit", "ddit-bare"),
    "third above second difference": ("ddit", "ddit-order2"),
    "third above first difference": ("ddit", "ddit-order1"),
}
ALIKE = ("model", "samples", "steps", "blocks", "shift", "examples", "length", "seed")
NOT_KEPT = ("ceiling", "against")  # the same in every report; found again from the outcomes


def report(study: Study) -> dict[str, Any]:
    """All figures that the study has so far; UserError without the teacher's."""
    reports = {file.stem: read_report(file) for file in sorted(study.report("teacher").parent.glob("*.json"))}
    if "teacher" not in reports:
        raise UserError(
            f"{study.report('teacher')} is not there: expected the teacher's scores; make teacher-scores first"
        )
    bench = _benched(study)
    order = {name: place for place, name in enumerate(ROWS)}
    rows = sorted((name for name in reports if name in order), key=order.__getitem__)
    pairs = {name: pair for name, pair in ABLATIONS.items() if set(pair) <= set(reports)}
    return {
        **{name: getattr(study, name) for name in ALIKE},
        "ceiling": reports["teacher"]["ceiling"],
        "students": {name: _student(study, reports, bench, name) for name in rows},
        "ablations": {name: _ablation(study, reports, *pair) for name, pair in pairs.items()},
        "bench": bench,
        "reports": {
            name: {key: value for key, value in told.items() if key not in NOT_KEPT} for name, told in reports.items()
        },
    }


def restore(study: Study, file: Path) -> None:
    """Puts the scores and seconds of a study's file where this one looks for its own, but for what it has.

    UserError for another study's.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        reports, bench = found["reports"], found["bench"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is no file of train.miniature: expected its miniature.json") from None
    for name in ALIKE:
        ours = getattr(study, name)
        if found.get(name) != (list(ours) if isinstance(ours, tuple) else ours):
            raise UserError(
                f"{file} has {name} {found.get(name)}, found {ours} here: expected figures of the same study"
            )
    study.report("teacher").parent.mkdir(parents=True, exist_ok=True)
    for name, told in reports.items():
        if not study.report(name).exists():
            write_report(study.report(name), told | {"ceiling": found["ceiling"]})
    if bench and not study.path("bench.json").exists():
        named = entries(study)
        rows = [row | {"plan": named[name]} for name, row in bench.items()]
        study.path("bench.json").write_text(json.dumps(rows, indent=1) + "\n")


def _benched(study: Study) -> dict[str, dict[str, Any]]:
    file = study.path("bench.json")
    rows = {row["plan"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    return {name: rows[entry] for name, entry in entries(study).items() if entry in rows}


def _student(study: Study, reports: _Reports, bench: _Reports, name: str) -> dict[str, Any]:
    told: dict[str, Any] = {score: reports[name][score] for score in (*SCORES[study.model], "frechet")}
    if name in bench:
        timed, teacher = bench[name], bench["teacher"]
        told |= {"seconds": timed["seconds"], "speedup": timed["measured_speedup"]}
        told["step_time"] = teacher["steps"] / timed["steps"] / timed["measured_speedup"]
    return told | {"against_teacher": differences(reports[name], reports["teacher"]) if name != "teacher" else None}


def _ablation(study: Study, reports: _Reports, better: str, worse: str) -> dict[str, Any]:
    names = (*SCORES[study.model], "frechet")
    return {
        "better": {score: reports[better][score] for score in names},
        "worse": {score: reports[worse][score] for score in names},
        "differences": differences(reports[better], reports[worse]),
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
        cells = [name, *(f"{row[time]:.2f}" if time in row else "" for time in ("seconds", "speedup", "step_time"))]
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
