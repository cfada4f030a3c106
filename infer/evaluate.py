"""`dit-eval`: how well a model follows its prompts and how real its digits look, beside the figures of real clips."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.config import UserError
from infer import media
from infer.digit_grammar import Scene, caption, random_scene

SUITES = ("moving-digits",)
_BATCH = 4
_SCENES_SEED = 2024

EPILOG = """\
Prompts are drawn uniformly from the whole grammar of dit-generate --help, always the same ones; prompt i is generated
from seed N + i. Scores:
  digit, colour, direction   share of the prompts in which it is right for every digit
  all                        share of the prompts in which the three are right together
  digit_each, ...            the same as shares of the digits
  count, relation            share of the prompts with as many digits as asked; of those with two, lying as asked
  frechet                    Frechet distance to real clips of the same prompts, in the features of a digit classifier
  ceiling                    all of these for real clips (drawn with other handwritten digits than those in frechet)
The classifier and the real clips use digits that the model was not trained on. The classifier is trained on the first
run, in about a minute, and kept in ~/.cache/dit-jax.

examples:
  dit-eval --model demo-wan --suite moving-digits --json
  dit-eval --real --videos 50
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dit-eval", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", default="demo-wan", help="a checkpoint folder, a hub id org/name[@revision], or demo-wan (default)")
    add("--suite", default="moving-digits", metavar="NAME", help="moving-digits (default; the only one)")
    add("--videos", type=int, default=200, metavar="N", help="how many prompts (default 200)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's)")
    add("--guidance", type=float, metavar="G", help="guidance scale; 1 turns guidance off (default: the model's)")
    add("--solver", default="unipc", metavar="S", help="unipc (default) or euler")
    add("--seed", type=int, default=0, metavar="N", help="seed of the first prompt's starting noise (default 0)")
    add("--real", action="store_true", help="score the real clips alone; no model is loaded")
    add("--sheets", metavar="FOLDER", help="also write a contact sheet of every generated video there")
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
    if options.suite not in SUITES:
        raise UserError(f"unknown suite {options.suite!r}: expected {' or '.join(SUITES)}")
    if options.videos < 2:
        raise UserError(f"--videos is {options.videos}: expected at least 2, to compare distributions")
    if options.sheets:
        media.make_room(Path(options.sheets) / "000.png")
    # The model first: a wrong name should not wait for the classifier.
    pipe = None if options.real else _load(options.model)
    settings = {} if pipe is None else _settings(pipe, options)

    from infer.digit_reader import load_reader
    from infer.digit_scores import read_reference, real_clips, score_clips

    scenes, captions = suite_prompts(options.videos)
    reader = load_reader(_say)
    reference = read_reference(scenes, reader)
    ceiling = score_clips(real_clips(scenes, 0), scenes, reader, reference)
    report: dict[str, Any] = {"suite": options.suite, "videos": options.videos}
    if pipe is not None:
        clips = _generated(pipe, captions, settings, options)
        report |= {"model": options.model, "settings": settings}
        report |= score_clips(clips, scenes, reader, reference)
    return {**report, "ceiling": ceiling}


def suite_prompts(count: int) -> tuple[list[Scene], list[str]]:
    """The first `count` scenes of the suite and their captions: uniform over the grammar, always the same."""
    rng = random.Random(_SCENES_SEED)
    pairs = []
    for _ in range(count):
        scene = random_scene(rng)
        pairs.append((scene, caption(scene, rng)))
    return [scene for scene, _ in pairs], [text for _, text in pairs]


def _load(model: str):
    from infer import load_pipeline
    from infer.caches import keep_compiled_programs

    keep_compiled_programs()
    return load_pipeline(model)


def _settings(pipe, options: argparse.Namespace) -> dict[str, Any]:
    """The settings of every generation, the model's defaults filled in; UserError for one that does not fit."""
    from infer.moving_digits import ClipSpec
    from infer.request import Request

    form = ClipSpec()
    asked = Request(
        prompt=["a red 7"] * _BATCH * math.ceil(options.videos / _BATCH),
        size=(form.size, form.size),
        frames=form.frames,
        steps=options.steps,
        guidance=options.guidance,
        solver=options.solver,
        seed=options.seed,
    )
    job = pipe.prepare(asked)
    names = ("size", "frames", "steps", "guidance", "solver", "seed")
    return {name: getattr(job, name) for name in names}


def _generated(
    pipe, captions: list[str], settings: dict[str, Any], options: argparse.Namespace
) -> Iterator[np.ndarray]:
    from tqdm import tqdm

    from infer.contact_sheet import contact_sheet

    with tqdm(total=len(captions), desc="generating", unit="video") as bar:
        for first in range(0, len(captions), _BATCH):
            wanted = captions[first : first + _BATCH]
            # The last batch is filled up, so that one program serves all of them.
            batch = wanted + wanted[-1:] * (_BATCH - len(wanted))
            frames = pipe(batch, **{**settings, "seed": settings["seed"] + first}).frames[: len(wanted)]
            for number, (clip, text) in enumerate(zip(frames, wanted, strict=True), start=first):
                if options.sheets:
                    contact_sheet(clip, text, Path(options.sheets) / f"{number:03d}.png")
                yield clip
                bar.update()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(report: dict[str, Any]) -> str:
    """The scores in columns, for reading."""
    lines = [f"{report['suite']}, {report['videos']} videos" + (f", {report['model']}" if "model" in report else "")]
    if "settings" in report:
        lines.append(", ".join(f"{name} {value}" for name, value in report["settings"].items()))
    lines.append(f"{'':16}{'model' if 'model' in report else '':>9}{'real':>9}")
    for name, real in report["ceiling"].items():
        if name != "videos":
            figures = ([report[name]] if "model" in report else [""]) + [real]
            lines.append(f"{name:16}" + "".join(f"{'' if f in ('', None) else format(f, '.3f'):>9}" for f in figures))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
