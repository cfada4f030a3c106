"""Whether the papers' orderings hold in miniature: `python -m infer.orderings --model demo-wan --json FILE`.

CoReDiT (arXiv 2605.14191): coherent tokens above random ones, reconstruction above none, calibrated ratios above one
for all. PARE (arXiv 2605.27336), before any training: scored heads above random ones, temporal heads protected above
not, neurons chosen by norm and difference above random ones.

Each side's error is that of one step's velocity to the plain model's, at noise levels of the plain model's own runs.
An ordering is judged by the 95 % bootstrap interval of the differences over prompts. Whatever is random is drawn anew
for each prompt. All is measured under the model's own guidance, and once more without guidance, which would enlarge
what the two branches differ in.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.method_parts import transformers
from convert.progress import progress_bar
from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError

HEAD_STEPS = 10  # of a run that heads are scored over


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="python -m infer.orderings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", default="demo-wan", help="a checkpoint of one transformer, demo-flux or demo-wan (default)")
    add("--prompts", metavar="FILE", help="prompts, one a line (default: the suite that the model was trained on)")
    add("--samples", type=int, default=16, metavar="N", help="prompts that are measured on (default 16)")
    add("--calibration", type=int, default=4, metavar="N", help="further prompts, to calibrate on (default 4)")
    add("--steps", type=int, default=10, metavar="N", help="steps of the plain runs (default 10)")
    add("--levels", type=int, default=3, metavar="N", help="of these steps, how many are measured at (default 3)")
    add("--size", metavar="WxH", help="pixels (default: the model's)")
    add("--frames", type=int, metavar="N", help="4k + 1 frames (default: the model's)")
    add("--seed", type=int, default=0, metavar="N", help="of the first prompt's noise and lots (default 0)")
    add("--json", type=Path, metavar="FILE", help="write the report there")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    try:
        with warnings_in_lines():
            report = measure(options)
    except UserError as error:
        print(f"infer.orderings: {error}", file=sys.stderr)
        return 2
    for setting in ("guided", "unguided"):
        for row in report.get(setting, {}).get("orderings", []):
            mean, low, high = row["difference"]
            print(
                f"{setting}, {row['name']}: {row['found']} ({row['better_error']:.4f} and {row['worse_error']:.4f}, "
                f"difference {mean:.4f}, 95 % from {low:.4f} to {high:.4f})"
            )
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the parsed command; returns what `--json` writes."""
    from infer import load_pipeline, media
    from infer.caches import keep_compiled_programs

    began = time.perf_counter()
    for name, least in (("samples", 2), ("calibration", 1), ("levels", 1), ("steps", options.levels)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}: expected at least {least}; raise it")
    if options.json:
        media.make_room(options.json)
    keep_compiled_programs()
    pipe = load_pipeline(options.model, dtype=jnp.float32)
    if len(transformers(pipe.checkpoint)) > 1:
        raise UserError(f"{options.model} has two transformers: expected one; name a model of one")
    prompts = _prompts(pipe, options)
    report = _told(pipe, options) | {"guided": _measured(pipe, prompts, options)}
    if report["guided"]["branches"] > 1:
        off = {"true_cfg": 1.0} if pipe.defaults.true_cfg > 1 else {"guidance": 1.0}
        report["unguided"] = _measured(pipe, prompts, options, **off)
    report["seconds"] = round(time.perf_counter() - began, 1)
    if options.json:
        partial = Path(f"{options.json}.partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(options.json)
    return report


def _measured(pipe: Any, prompts: Sequence[str], options: argparse.Namespace, **guidance: float) -> dict[str, Any]:
    """All orderings at one guidance: on the first `--samples` prompts, calibrated on the others."""
    from infer.ordering_studies import SHARE, coredit_study, errors_of, joined, judged, pare_study
    from infer.request import Request, parse_size
    from infer.teacher_forced import trajectories

    asked = {"size": parse_size(options.size) if options.size else None, "frames": options.frames, **guidance}
    jobs = [
        pipe.prepare(Request(prompt=prompt, steps=options.steps, seed=options.seed + number, **asked))
        for number, prompt in enumerate(prompts)
    ]
    tested, others = slice(options.samples), slice(options.samples, None)
    coredit, branches = coredit_study(pipe, jobs[others])
    pare = pare_study(pipe, prompts[others], steps=HEAD_STEPS, seed=options.seed + options.samples, **asked)
    study = joined([coredit, pare])
    levels = np.unique(np.linspace(0, options.steps - 1, options.levels).round().astype(int)).tolist()
    with progress_bar(total=options.samples * len(study.arms), desc="measuring", unit="setting") as bar:
        errors = errors_of(study.arms, trajectories(pipe, jobs[tested]), levels, options.seed, bar.update)
    sigmas = pipe.schedule(jobs[0]).sigmas
    return {
        **{name: getattr(jobs[0], name) for name in ("size", "frames", "guidance", "true_cfg", "solver")},
        "branches": branches,
        "pruned": SHARE,
        "sigmas": [round(float(sigmas[level]), 4) for level in levels],
        "errors_by_level": {name: of_arm.mean(axis=0).round(5).tolist() for name, of_arm in errors.items()},
        "orderings": [judged(ordering, errors) for ordering in study.orderings],
    }


def _prompts(pipe: Any, options: argparse.Namespace) -> list[str]:
    count = options.samples + options.calibration
    if options.prompts:
        from infer.prompts_file import read_prompts

        prompts = read_prompts(options.prompts)
    elif pipe.defaults.grammar:
        from infer.suites import SUITES

        prompts = SUITES[pipe.defaults.grammar].prompts(count)[1]
    else:
        raise UserError(f"{options.model} has no suite of prompts: expected --prompts FILE; give one")
    if len(prompts) < count:
        raise UserError(f"{options.prompts!r} holds {len(prompts)} prompts: expected {count}; lower --samples")
    return prompts[:count]


def _told(pipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    asked = {name: getattr(options, name) for name in ("samples", "calibration", "steps", "levels", "seed")}
    return {"model": pipe.name, "checkpoint": pipe.hash, **asked}


if __name__ == "__main__":
    sys.exit(main())
