"""`dit-eval`: how well a model follows its prompts and how real its digits look, beside the figures of real clips."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_jax.config import UserError
from infer import media
from infer.digit_grammar import GRAMMARS

if TYPE_CHECKING:
    from infer.suites import Suite

_BATCH = 4

EPILOG = """\
Prompts are drawn uniformly from the whole grammar of dit-generate --help, always the same ones; prompt i is generated
from seed N + i. Suites: moving-digits (videos, for demo-wan) and digits (pictures, for demo-flux). Scores:
  digit, colour, direction   share of the prompts in which it is right for every digit (direction: of videos)
  count, relation            share of the prompts with as many digits as asked; of those with two kinds, lying as asked
  all                        share of the prompts fully right: digits, colours and directions of a video; digits,
                             colours, count and relation of a picture
  digit_each, ...            digit, colour and direction as shares of the digits
  frechet                    Frechet distance to real samples of the same prompts, in the features of a digit classifier
  ceiling                    all of these for real samples (drawn with other handwritten digits than those in frechet)
The classifier and the real samples use digits that the model was not trained on. The classifier is trained on the first
run, in about a minute, and kept in ~/.cache/dit-jax.

examples:
  dit-eval --model demo-wan --suite moving-digits --json
  dit-eval --model demo-flux --suite digits --samples 50
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
    add("--guidance", type=float, metavar="G", help="guidance scale; 1 turns guidance off (default: the model's)")
    add("--true-cfg", type=float, metavar="G", help="FLUX: scale of real guidance; 1 is off (default: the model's)")
    add("--solver", metavar="S", help="unipc or euler (default: the model's)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the first prompt's starting noise (default 0)")
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


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the parsed command; returns what `--json` prints."""
    if options.suite and options.suite not in GRAMMARS:
        raise UserError(f"unknown suite {options.suite!r}: expected {' or '.join(GRAMMARS)}")
    if options.samples < 2:
        raise UserError(f"--samples is {options.samples}: expected at least 2, to compare distributions")
    if options.sheets:
        media.make_room(Path(options.sheets) / "000.png")
    # The model first: a wrong name should not wait for the classifier.
    pipe = None if options.real else _load(options.model)
    name = options.suite or (pipe and pipe.defaults.grammar) or "moving-digits"

    from infer.digit_reader import load_reader
    from infer.suites import SUITES

    suite = SUITES[name]
    settings = {} if pipe is None else _settings(pipe, suite, options)
    scenes, captions = suite.prompts(options.samples)
    reader = load_reader(_say)
    reference = suite.read_reference(scenes, reader)
    ceiling = suite.score(suite.real(scenes, 0), scenes, reader, reference)
    report: dict[str, Any] = {"suite": name, "samples": options.samples}
    if pipe is not None:
        samples = _generated(pipe, captions, settings, options)
        report |= {"model": options.model, "settings": settings}
        report |= suite.score(samples, scenes, reader, reference)
    return {**report, "ceiling": ceiling}


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
    asked = Request(
        prompt=["a red 7"] * _BATCH * math.ceil(options.samples / _BATCH),
        size=(suite.size, suite.size),
        frames=suite.frames,
        steps=options.steps,
        guidance=options.guidance,
        true_cfg=options.true_cfg,
        solver=options.solver,
        seed=options.seed,
    )
    job = pipe.prepare(asked)
    names = ("size", "frames", "steps", "guidance", "true_cfg", "solver", "seed")
    return {name: getattr(job, name) for name in names}


def _generated(
    pipe, captions: list[str], settings: dict[str, Any], options: argparse.Namespace
) -> Iterator[np.ndarray]:
    from convert.progress import progress_bar
    from infer.contact_sheet import contact_sheet

    with progress_bar(total=len(captions), desc="generating", unit="sample") as bar:
        for first in range(0, len(captions), _BATCH):
            wanted = captions[first : first + _BATCH]
            # The last batch is filled up, so that one program serves all of them.
            batch = wanted + wanted[-1:] * (_BATCH - len(wanted))
            frames = pipe(batch, **{**settings, "seed": settings["seed"] + first}).frames[: len(wanted)]
            for number, (sample, text) in enumerate(zip(frames, wanted, strict=True), start=first):
                if options.sheets:
                    frames_of_it = sample if sample.ndim == 4 else sample[None]
                    contact_sheet(frames_of_it, text, Path(options.sheets) / f"{number:03d}.png")
                yield sample
                bar.update()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(report: dict[str, Any]) -> str:
    """The scores in columns, for reading."""
    lines = [f"{report['suite']}, {report['samples']} samples" + (f", {report['model']}" if "model" in report else "")]
    if "settings" in report:
        lines.append(", ".join(f"{name} {value}" for name, value in report["settings"].items()))
    lines.append(f"{'':16}{'model' if 'model' in report else '':>9}{'real':>9}")
    for name, real in report["ceiling"].items():
        if name not in ("videos", "pictures"):
            figures = ([report[name]] if "model" in report else [""]) + [real]
            lines.append(f"{name:16}" + "".join(f"{'' if f in ('', None) else format(f, '.3f'):>9}" for f in figures))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
