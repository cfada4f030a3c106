"""`dit-eval`: how well a model follows its prompts and how real its digits look, beside the figures of real clips."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError
from dit_jax.methods.plan import DENSE, parse_plan
from infer import media
from infer.digit_grammar import GRAMMARS
from infer.given_scales import given_scales, scale_options
from infer.kept_samples import KeptSamples
from infer.margins import margins
from infer.paired_scores import OUTCOMES, check_alike, differences, outcomes, read_report, write_report
from infer.suites import SUITES, Exam, Suite

TOLD = ("size", "frames", "steps", "guidance", "true_cfg", "solver", "plan")

EPILOG = """\
Prompts are drawn uniformly from the whole grammar of dit-generate --help, always the same ones; prompt i of P is
generated from seed N + i, and with --seeds once more from N + P + i and so on. Suites: moving-digits (videos, for
demo-wan) and digits (pictures, for demo-flux). Scores:
  digit, colour, direction   share of the prompts in which it is right for every digit (direction: of videos)
  count, relation            share of the prompts with as many digits as asked; of those with two kinds, lying as asked
  all                        share of the prompts fully right: digits, colours and directions of a video; digits,
                             colours, count and relation of a picture
  digit_each, ...            digit, colour and direction as shares of the digits
  frechet                    Frechet distance to real samples of the same prompts, in the features of a digit classifier
  margins                    half the width of a 95 % interval of each score (bootstrap over prompts)
  ceiling                    all of these for real samples (drawn with other handwritten digits than those in frechet)
  against                    with --against: by how much each share of the prompts is above that report's, sample by
                             sample, with its 95 % interval
The classifier, which ships, and the real samples use digits that the model was not trained on.

examples:
  dit-eval --model demo-wan --suite moving-digits --json
  dit-eval --model demo-flux --suite digits --samples 50
  dit-eval --model demo-wan --plan hsa:50 --samples 64 --seeds 3 --keep runs/samples
  dit-eval --model demo-flux --samples 1000 --report teacher.json
  dit-eval --model student --samples 1000 --report student.json --against teacher.json
  dit-eval --real --suite digits
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dit-eval", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add(
        "--model",
        default="demo-wan",
        help="a checkpoint folder, a hub id org/name[@revision], demo-flux or demo-wan (default)",
    )
    add("--suite", metavar="NAME", help="moving-digits or digits (default: what the model was trained on)")
    add("--samples", "--videos", type=int, default=200, metavar="N", help="how many prompts (default 200)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's)")
    scale_options(options)
    add("--solver", metavar="S", help="unipc, euler or renoise (default: the model's)")
    add("--plan", metavar="PLAN", default=DENSE, help="methods that make it cheaper, joined by +, such as hsa:50")
    add("--seed", type=int, default=0, metavar="N", help="seed of the first prompt's starting noise (default 0)")
    add("--seeds", type=int, default=1, metavar="N", help="samples of each prompt (default 1)")
    add("--keep", metavar="FOLDER", help="keep the samples there; those that are there are not generated again")
    add("--report", type=Path, metavar="FILE", help="write the scores there, with those of every sample")
    add("--against", type=Path, metavar="FILE", help="compare in pairs with such a report of another model or plan")
    add("--real", action="store_true", help="score real samples alone; no model is loaded")
    add("--sheets", metavar="FOLDER", help="also write a contact sheet of every generated sample there")
    add("--json", action="store_true", help="print one JSON object as the last line")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    try:
        report = evaluate(options)
    except UserError as error:
        print(f"dit-eval: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dit-eval: {error.filename or options.model}: {error.strerror or error}.", file=sys.stderr)
        return 2
    print(json.dumps(report) if options.json else _table(report))
    return 0


def evaluate(options: argparse.Namespace, pipe: Any = None) -> dict[str, Any]:
    """Runs the parsed command, with this pipeline if it is loaded already; returns what `--json` prints."""
    _check(options)
    other = read_report(options.against) if options.against else None
    files = [Path(folder) / "000.png" for folder in (options.sheets, options.keep) if folder]
    for file in [*files, *filter(None, [options.report])]:
        media.make_room(file)
    # The model first: a wrong name should not wait for the classifier.
    pipe = None if options.real else pipe or _load(options.model)
    name = options.suite or (pipe and pipe.defaults.grammar) or "moving-digits"
    report: dict[str, Any] = {"suite": name, "samples": options.samples, "seeds": options.seeds}
    if pipe is None:
        return {**report, "ceiling": _exam(name, options.samples, options.seeds).ceiling}

    report |= {"model": options.model, "settings": _settings(pipe, SUITES[name], options)}
    if other:
        check_alike(report, other, options.against)
    exam = _exam(name, options.samples, options.seeds)
    readings = exam.readings(_generated(pipe, exam.captions, report["settings"], options))
    report |= exam.summary(readings)
    report["margins"] = margins(
        lambda drawn: exam.summary([readings[i] for i in drawn]), options.samples, options.seeds
    )
    report["ceiling"] = exam.ceiling
    told = {**report, OUTCOMES: outcomes(readings)}
    if other:
        report["against"] = {"model": other["model"], "settings": other["settings"]}
        report["against"]["differences"] = differences(told, other)
    if options.report:
        write_report(options.report, told | report)
    return report


def _check(options: argparse.Namespace) -> None:
    """UserError for options that cannot be met."""
    if options.suite and options.suite not in GRAMMARS:
        raise UserError(f"unknown suite {options.suite!r}: expected {' or '.join(GRAMMARS)}")
    if options.samples < 2:
        raise UserError(f"--samples is {options.samples}: expected at least 2, to compare distributions")
    if options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}: expected at least 1")
    if options.real and (options.report or options.against):
        raise UserError("--report and --against are of a model's samples, found --real: leave one of them out")


@lru_cache(maxsize=1)
def _exam(name: str, samples: int, seeds: int) -> Exam:
    from infer.digit_reader import load_reader

    return Exam(SUITES[name], samples, seeds, load_reader())


def _load(model: str):
    from infer import load_pipeline
    from infer.caches import keep_compiled_programs

    keep_compiled_programs()
    return load_pipeline(model)


def _settings(pipe, suite: Suite, options: argparse.Namespace) -> dict[str, Any]:
    """The settings of every generation, the model's defaults filled in; UserError for one that does not fit."""
    from infer.request import Request

    if pipe.defaults.video != (suite.frames > 1):
        made = "videos" if pipe.defaults.video else "pictures"
        raise UserError(
            f"{options.model} makes {made}: expected {suite.noun}s for this suite; choose the other --suite"
        )
    batch = _batch()
    asked = Request(
        prompt=["a red 7"] * batch * math.ceil(options.samples * options.seeds / batch),
        size=(suite.size, suite.size),
        frames=suite.frames,
        steps=options.steps,
        **given_scales(options),
        solver=options.solver,
        seed=options.seed,
        plan=options.plan,
    )
    with warnings_in_lines():
        job = pipe.prepare(asked)
    shift = {} if job.shift is None else {"shift": job.shift}
    told = job.describe()
    return {name: told[name] for name in TOLD} | shift | {"seed": job.seeds[0]}


def _batch() -> int:
    """Samples that run together: one on a CPU, whose caches do not hold more."""
    import jax

    return 1 if jax.default_backend() == "cpu" else 4


def kept_samples(pipe, settings: Mapping[str, Any], options: argparse.Namespace) -> KeptSamples | None:
    """Where the samples of these settings are kept, if they are."""
    if not options.keep:
        return None
    # A plan's text may name a file: what the plan says counts.
    of_plan = repr(parse_plan(settings["plan"]))
    decides = {**settings, "plan": of_plan, "checkpoint": pipe.hash}
    if options.seeds > 1:  # of one seed, fewer samples are the first of more
        decides["prompts"] = options.samples
    return KeptSamples(Path(options.keep), f"{settings['plan']}-{settings['steps']}", decides)


def _generated(
    pipe, captions: list[str], settings: dict[str, Any], options: argparse.Namespace
) -> Iterator[np.ndarray]:
    from convert.progress import progress_bar
    from infer.contact_sheet import contact_sheet

    kept, batch = kept_samples(pipe, settings, options), _batch()
    with progress_bar(total=len(captions), desc="generating", unit="sample") as bar:
        for first in range(0, len(captions), batch):
            wanted = captions[first : first + batch]
            numbers = range(first, first + len(wanted))
            there = map(kept.read, numbers) if kept else ()
            samples = [sample for sample in there if sample is not None]
            if len(samples) < len(wanted):
                # The last batch is filled up, so that one program serves all of them.
                filled = wanted + wanted[-1:] * (batch - len(wanted))
                samples = list(pipe(filled, **{**settings, "seed": settings["seed"] + first}).frames[: len(wanted)])
                for number, sample in zip(numbers, samples, strict=True):
                    if kept:
                        kept.write(number, sample)
            for number, sample, text in zip(numbers, samples, wanted, strict=True):
                if options.sheets:
                    frames_of_it = sample if sample.ndim == 4 else sample[None]
                    contact_sheet(frames_of_it, text, Path(options.sheets) / f"{number:03d}.png")
                yield sample
                bar.update()


def _table(report: dict[str, Any]) -> str:
    """The scores in columns, for reading."""
    seeds = f" x {report['seeds']} seeds" if report["seeds"] > 1 else ""
    model = f", {report['model']}" if "model" in report else ""
    lines = [f"{report['suite']}, {report['samples']} samples{seeds}{model}"]
    if "settings" in report:
        lines.append(", ".join(f"{name} {value}" for name, value in report["settings"].items()))
    of_model = ("model", "+-") if "model" in report else ()
    lines.append(f"{'':16}" + "".join(f"{head:>9}" for head in (*of_model, "real")))
    for name, real in report["ceiling"].items():
        if name not in ("videos", "pictures"):
            figures = [report[name], report["margins"].get(name), real] if "model" in report else [real]
            lines.append(f"{name:16}" + "".join(f"{'' if f is None else format(f, '.3f'):>9}" for f in figures))
    if "against" in report:
        other = report["against"]
        lines.append(
            f"above {other['model']} ({other['settings']['plan']}, {other['settings']['steps']} steps), in pairs"
        )
        lines += [
            f"{name:16}{change['mean']:>+9.3f}  (95 %: {change['low']:+.3f} to {change['high']:+.3f})"
            for name, change in other["differences"].items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
