"""`dit-calibrate`: what a method has to know of a model, measured while the model runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError
from dit_jax.methods.coherence import Lattice
from dit_jax.methods.coredit import Coredit
from dit_jax.methods.coredit_ratios import CAP, Recording, allocate, most_skipped, ratios_file
from dit_jax.methods.magcache import ratios_of, recording, write_ratios
from dit_jax.methods.method import Run
from infer.ddit_calibration import ddit, ddit_options
from infer.given_images import given_images, image_options
from infer.given_scales import shift_option
from infer.prompts_file import read_prompts
from infer.request import Job, Request, joined, parse_size

BATCH = 4  # prompts that run together

EPILOG = """\
coredit gives every block of a model its share of --ratio: tokens are given, a few at a time, to the block whose next
ones are the most alike, no block more than 60 %. It runs the model on the prompts in a few steps (--steps, 8), which
sees as many noise levels. magcache measures how the trunk's residual grows from step to step: give it the --steps that
will be used. ddit searches the threshold at which runs have --tokens of the base size's tokens on average; it runs the
model's own number of steps unless --steps says otherwise, once for each prompt and round (up to 7). A model that
animates an image gets --image (and --last-image): one for all prompts, or one for each in their order.

examples:
  dit-calibrate coredit --model demo-flux --prompts prompts.txt --ratio 0.45 --out ratios.json
  dit-generate --model demo-flux --plan coredit:ratios.json --prompt "a red 7 above a blue 2" --out digits.png
  dit-calibrate magcache --model wan-i2v --prompts prompts.txt --image first/*.png --steps 40 --out ratios.json
  dit-calibrate ddit --model adapted --prompts prompts.txt --tokens 0.5 --out ddit.json
  dit-generate --model adapted --plan ddit:ddit.json --prompt "a red 7 moving left" --out seven.mp4
"""


class Kind(NamedTuple):
    """One subcommand: its help, its own options, what it does with a pipeline and a request of all prompts to make the
    report, and how many steps it runs by itself (None: the model's)."""

    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Any, argparse.Namespace, Request], dict[str, Any]]
    steps: int | None = 8


class CoherenceWatch:
    """Adds up, for each transformer, the sorted coherence of every block [G, N] over rows and steps.

    `samples` are those of a batch that count; the others fill it up.
    """

    def __init__(self, stride: int):
        self.stride, self.samples = stride, 0
        self.sums: dict[str, np.ndarray] = {}
        self.lattice: Lattice | None = None

    def around(self, denoiser: Any, run: Run) -> Recording:
        """A denoiser that records."""
        plan = Coredit(ratios=(0.0,), stride=self.stride)
        self.lattice = plan.lattice(run.latents_shape, denoiser.model.config.patch)
        self.branches = denoiser.branches
        return Recording(guided=denoiser, lattice=self.lattice)

    def finished(self, component: str, state: Any) -> None:
        """Takes what a stage has recorded."""
        rows = np.asarray(state, np.float64)[:, : self.samples * self.branches]
        self.sums[component] = self.sums.get(component, 0) + rows.sum(axis=1)

    def ratios(self, ratio: float) -> dict[str, list[float]]:
        """What each block of each transformer skips, so that their mean is `ratio`."""
        assert self.lattice is not None
        tokens, most = self.lattice.tokens, most_skipped(self.lattice)
        skipped = {name: allocate(sums, ratio, most) for name, sums in self.sums.items()}
        return {name: [round(float(count / tokens), 6) for count in counts] for name, counts in skipped.items()}


def coredit_options(options: argparse.ArgumentParser) -> None:
    """Options of `dit-calibrate coredit`."""
    options.add_argument(
        "--ratio", type=float, required=True, metavar="R", help="tokens to skip, on average (0 to 0.6)"
    )
    options.add_argument(
        "--stride", type=int, default=3, metavar="M", help="one token in M is never skipped (default 3)"
    )


def coredit(pipe: Any, options: argparse.Namespace, request: Request) -> dict[str, Any]:
    """Allocates the ratios of CoReDiT and writes their file."""
    if not 0 < options.ratio <= CAP:
        raise UserError(f"--ratio is {options.ratio}: expected more than 0 and at most {CAP}; change it")
    if options.stride < 2:
        raise UserError(f"--stride is {options.stride}: expected a whole number from 2; leave it out")
    watch = CoherenceWatch(options.stride)
    job = run_prompts(pipe, request, watch, options.kind)
    assert watch.lattice is not None
    ratios = watch.ratios(options.ratio)
    told = {
        "target": options.ratio,
        "model": pipe.name,
        "checkpoint": pipe.hash,
        "size": job.size,
        "frames": job.frames,
    }
    told |= {"prompts": len(job.prompts), "steps": job.steps}
    partial = Path(f"{options.out}.partial")
    partial.write_text(json.dumps(ratios_file(ratios, options.stride) | told, indent=1) + "\n")
    partial.replace(options.out)
    mean = round(float(np.mean([*ratios.values()])), 6)
    return {"out": str(options.out), "ratios": ratios, "mean": mean, "tokens": watch.lattice.tokens, **told}


class ResidualWatch:
    """Keeps the norms of the trunk's residual at every step [S, R] of each run; both experts' make one.

    `samples` are those of a batch that count; the others fill it up.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.runs: list[np.ndarray] = []

    def around(self, denoiser: Any, run: Run) -> Any:
        """A denoiser that records."""
        self.branches, self.begins = denoiser.branches, run.first == 0
        return recording(denoiser, run.steps)

    def finished(self, component: str, state: Any) -> None:
        """Takes what a stage has recorded."""
        norms = np.asarray(state.cache, np.float64)[:, : self.samples * self.branches]
        if self.begins:
            self.runs.append(norms)
        else:
            self.runs[-1] = self.runs[-1] + norms


def no_options(options: argparse.ArgumentParser) -> None:
    """For what has no options of its own."""


def magcache(pipe: Any, options: argparse.Namespace, request: Request) -> dict[str, Any]:
    """Measures the ratios of MagCache, for runs of so many steps, and writes their file."""
    if options.steps < 2:
        raise UserError(f"--steps is {options.steps}: expected at least 2, as many as the runs will have; change it")
    watch = ResidualWatch()
    job = run_prompts(pipe, request, watch, options.kind)
    ratios = ratios_of(np.concatenate(watch.runs, axis=1))
    write_ratios(options.out, ratios)
    return {
        "out": str(options.out),
        "ratios": ratios.round(6).tolist(),
        "prompts": len(job.prompts),
        "steps": job.steps,
    }


# Name -> what can be calibrated.
KINDS = {
    "coredit": Kind("how much each block may skip (plan coredit:FILE)", coredit_options, coredit),
    "magcache": Kind("how steps' residuals grow (plan magcache:T:ratios=FILE)", no_options, magcache),
    "ddit": Kind("the threshold of a wanted mean token count (plan ddit:FILE)", ddit_options, ddit, steps=None),
}


def request_of(options: argparse.Namespace) -> Request:
    """What the parsed command runs: all prompts, each with its image if there are any."""
    return Request(
        prompt=read_prompts(options.prompts),
        size=parse_size(options.size) if options.size else None,
        frames=options.frames,
        steps=options.steps,
        shift=options.shift,
        solver=options.solver,
        seed=options.seed,
        **given_images(options),
    )


def run_prompts(pipe: Any, request: Request, watch: Any, title: str) -> Job:
    """Runs the model on a request's samples, a batch at a time, under a watch whose `samples` is how many of a batch
    count; the job of all."""
    from convert.progress import progress_bar

    job: Job = pipe.prepare(request)
    samples = [job.single(index) for index in range(len(job.prompts))]
    size = min(BATCH, len(samples))
    with progress_bar(total=len(samples), desc=title, unit="prompt") as bar:
        for first in range(0, len(samples), size):
            wanted = samples[first : first + size]
            watch.samples = len(wanted)
            # The last batch is filled up, so that one program serves all of them.
            pipe.denoise(joined(wanted + wanted[-1:] * (size - len(wanted))), watch=watch)
            bar.update(len(wanted))
    return job


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dit-calibrate", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = options.add_subparsers(dest="kind", required=True, metavar="METHOD")
    for name, kind in KINDS.items():
        of_kind = kinds.add_parser(name, help=kind.help, description=kind.help)
        add = of_kind.add_argument
        add("--model", required=True, help="a checkpoint folder, a hub id org/name[@revision], demo-flux or demo-wan")
        add("--prompts", required=True, metavar="FILE", help="a file with one prompt a line")
        image_options(of_kind)
        add("--out", required=True, type=Path, metavar="FILE", help="JSON to write")
        add("--size", metavar="WxH", help="pixels, such as 832x480 (default: the model's)")
        add("--frames", type=int, metavar="N", help="4k + 1 frames (default: the model's)")
        usual = kind.steps or "the model's"
        add("--steps", type=int, default=kind.steps, metavar="N", help=f"denoising steps (default: {usual})")
        shift_option(of_kind)
        add("--solver", metavar="S", help="unipc, euler or renoise (default: the model's)")
        add("--seed", type=int, default=0, metavar="N", help="of the first prompt's noise; prompt i has N + i")
        add("--mesh", metavar="AXES", help="devices by axis, such as data=2,context=4 (axes: data fsdp context tensor)")
        add("--json", action="store_true", help="print one JSON object as the last line")
        kind.options(of_kind)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    began = time.perf_counter()
    try:
        report = calibrate(options) | {"seconds": round(time.perf_counter() - began, 3)}
    except UserError as error:
        print(f"dit-calibrate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dit-calibrate: {error.filename or options.out}: {error.strerror or error}.", file=sys.stderr)
        return 2
    print(json.dumps(report) if options.json else f"{options.out}: {options.kind}, {report['seconds']:.1f} s")
    return 0


def calibrate(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the parsed command; returns what `--json` prints."""
    from dit_jax.sharding import make_mesh, parse_mesh
    from infer import load_pipeline, media
    from infer.caches import keep_compiled_programs

    request = request_of(options)  # a wrong name should not wait for the model
    media.make_room(options.out)
    keep_compiled_programs()
    with warnings_in_lines():
        pipe = load_pipeline(options.model, mesh=make_mesh(parse_mesh(options.mesh)) if options.mesh else None)
        return KINDS[options.kind].run(pipe, options, request)


if __name__ == "__main__":
    sys.exit(main())
