"""Reports of `dit-eval` with what every sample shows, and two of them compared in pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.config import UserError
from infer.paired_differences import bootstrap

OUTCOMES = "outcomes"
VALUES = {"1": 1.0, "0": 0.0, "-": np.nan}
ALIKE = ("suite", "samples", "seeds")


def outcomes(readings: Sequence[Any]) -> dict[str, str]:
    """Of every score that is a share of the prompts, a letter a sample: 1 right, 0 wrong, - where it has no say."""
    of_samples = [reading.outcomes for reading in readings]
    letters = {True: "1", False: "0", None: "-"}
    return {name: "".join(letters[each[name]] for each in of_samples) for name in of_samples[0]}


def write_report(file: Path, report: Mapping[str, Any]) -> None:
    """The report as JSON; never half of it."""
    unfinished = file.with_name(f"{file.name}.partial")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(file)


def read_report(file: Path) -> dict[str, Any]:
    """A report with outcomes; UserError for a file that is none."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        report = None
    if not isinstance(report, dict) or not isinstance(report.get(OUTCOMES), dict):
        raise UserError(f"{file} is no report of `dit-eval`: expected a file that --report wrote; make one")
    return report


def check_alike(report: Mapping[str, Any], other: Mapping[str, Any], file: Path) -> None:
    """UserError unless both are of the same prompts and starting noises."""
    ours, theirs = ({name: side.get(name) for name in ALIKE} for side in (report, other))
    for side, told in ((ours, report), (theirs, other)):
        side["seed"] = told.get("settings", {}).get("seed")
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"{file} has {name} {theirs[name]}, found {value} here: expected the same prompts and seeds, to "
                f"compare in pairs; give --{name} {theirs[name]}, or make that report again"
            )


def differences(report: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of every score that both have, by how much `report` is above `other` and the 95 % interval (bootstrap over
    prompts, each with all of its seeds), as shares."""
    found = {}
    for name in [name for name in report[OUTCOMES] if name in other[OUTCOMES]]:
        ours, theirs = (np.array([VALUES[letter] for letter in side[OUTCOMES][name]]) for side in (report, other))
        change = ours - theirs
        of_prompts = change.reshape(report["seeds"], -1).mean(axis=0)
        of_prompts = of_prompts[~np.isnan(of_prompts)]
        if len(of_prompts):
            found[name] = bootstrap(of_prompts)._asdict()
    return found
