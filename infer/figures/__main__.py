"""`python -m infer.figures`: draws the figures of docs/methods from runs of the shipped models."""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from convert.checkpoint import open_checkpoint
from convert.method_parts import transformers
from convert.progress import progress_bar
from convert.transfer import convert
from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError
from dit_jax.models.wan import WanConfig
from infer import media
from infer.adapt import KINDS as PARTS
from infer.adapt import adapted
from infer.figures import caches, coredit, ddit, hsa, pare
from infer.figures.style import check_drawing, write_figure
from infer.pipeline import Pipeline

VIDEO, PICTURES = ("--model", "videos", "demo-wan"), ("--image-model", "pictures", "demo-flux")


class Kind(NamedTuple):
    """A figure: of a video model or of one of pictures; how its data are measured and drawn; its height in inches."""

    video: bool
    measured: Callable[[Pipeline], Any]
    draw: Callable[..., None]
    height: float


KINDS = {
    "hsa": Kind(True, hsa.measured, hsa.draw, hsa.HEIGHT),
    "coredit": Kind(False, coredit.measured, coredit.draw, coredit.HEIGHT),
    "ddit": Kind(True, ddit.measured, ddit.draw, ddit.HEIGHT),
    "pare": Kind(True, pare.measured, pare.draw, pare.HEIGHT),
    "caches": Kind(True, caches.measured, caches.draw, caches.HEIGHT),
}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(prog="python -m infer.figures", description=__doc__)
    add = options.add_argument
    add("--model", default="demo-wan", help="a model of videos (default demo-wan)")
    add("--image-model", default="demo-flux", metavar="MODEL", help="a model of pictures (default demo-flux)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the PNGs, NAME.png each")
    add("--only", metavar="NAMES", help=f"some of {','.join(KINDS)}, joined by commas (default: all)")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    try:
        with warnings_in_lines(), tempfile.TemporaryDirectory() as folder:
            draw_figures(options, Path(folder))
    except UserError as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"figures: {error.filename or options.out}: {error.strerror or error}.", file=sys.stderr)
        return 2
    return 0


def draw_figures(options: argparse.Namespace, folder: Path) -> None:
    """Draws what the parsed options ask for, with a line a figure; `folder` is for the adapted models."""
    from infer.caches import keep_compiled_programs

    check_drawing()
    names = chosen(options.only)
    for name in names:
        media.make_room(options.out / f"{name}.png")
    keep_compiled_programs()
    pipes: dict[bool, Pipeline] = {}
    with progress_bar(total=len(names), unit="figure") as bar:
        for name in names:
            began, kind = time.perf_counter(), KINDS[name]
            bar.set_description(name)
            if kind.video not in pipes:
                pipes[kind.video] = loaded(options.model if kind.video else options.image_model, kind.video, folder)
            found = kind.measured(pipes[kind.video])
            file = options.out / f"{name}.png"
            write_figure(file, kind.height, functools.partial(kind.draw, found=found))
            bar.update()
            print(f"{file}: {file.stat().st_size / 1000:.0f} kB, {time.perf_counter() - began:.1f} s", flush=True)


def chosen(only: str | None) -> list[str]:
    """The figures' names; UserError for one that is none."""
    names = list(KINDS) if only is None else list(dict.fromkeys(name.strip() for name in only.split(",")))
    for name in names:
        if name not in KINDS:
            raise UserError(f"--only names {name!r}: expected some of {', '.join(KINDS)}; remove it")
    return names


def loaded(model: str, video: bool, folder: Path) -> Pipeline:
    """The pipeline of a model with untrained parts for the methods that need some."""
    from infer.loading import load_pipeline

    source = adapted(open_checkpoint(model), list(PARTS), seed=0)
    if isinstance(source.component(transformers(source)[0]).config, WanConfig) is not video:
        option, expected, known = VIDEO if video else PICTURES
        raise UserError(f"{option} is {model}, which makes no {expected}: expected a model that does; name {known}")
    copy = folder / ("video" if video else "image")
    convert(source, copy, "diffusers")
    return load_pipeline(copy)


if __name__ == "__main__":
    sys.exit(main())
