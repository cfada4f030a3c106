"""`dit-bench`: how much time each plan takes on a model, beside what its arithmetic promises and what it costs in
pictures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError
from dit_jax.methods.ddit import Ddit
from dit_jax.methods.plan import DENSE
from infer import bench_page, media
from infer.bench_entries import Entry, parse_entries
from infer.given_scales import given_scales, scale_options
from infer.prompts_file import read_prompts

if TYPE_CHECKING:
    from infer.pipeline import Pipeline
    from infer.plan_runs import PlanJobs
    from infer.request import Job

PROMPTS = {"moving-digits": "a red 7 moving left", "digits": "a red 7", None: "a cat surfing at dusk"}

EPILOG = """\
All plans run with one solver: the one that a plan needs, if there is one, so that they differ in nothing else. Plans
with a number of steps of their own keep it; dense:20 is the plain model with 20 steps, dense:20+coredit:r.json a plan
with as many; on:FOLDER is another checkpoint (pruned, say), on:FOLDER+routing a plan on it, pruned:0.3 random weights
without 30 % of the heads and neurons.
docs/benchmarks.md says what the figures mean.

examples:
  dit-bench --model demo-wan --plans dense,dense:20,hsa:50,hsa:25 --seeds 3 --json out.json --plot out.png
  dit-bench --model demo-wan --plans dense:20,hsa:50 --suite moving-digits --samples 64 --seeds 3 --keep runs/samples
  dit-bench --random 768x12x4096 --steps 8 --plans dense,hsa:groups=16@8/84@2:window=0.5,routing,pruned:0.3
  dit-bench --preset wan2.1-t2v-1.3b --shape 832x480x81 --plans dense,hsa:50 --guidance 5
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dit-bench", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    subject = options.add_mutually_exclusive_group()
    subject.add_argument("--model", help="a checkpoint folder, a hub id, demo-flux or demo-wan (default)")
    subject.add_argument("--random", metavar="WIDTHxBLOCKSxTOKENS", help="the denoiser of a Wan with random weights")
    subject.add_argument("--preset", metavar="NAME", help="likewise in a model's sizes, such as wan2.1-t2v-1.3b")
    add("--attention", action="store_true", help="of random weights: also time self-attention alone")
    add("--shape", metavar="WxHxFRAMES", help="pixels and frames (default: the model's)")
    add("--plans", default=DENSE, metavar="LIST", help="plans joined by commas; dense is always there, and first")
    add("--steps", type=int, metavar="N", help="denoising steps of plans without their own (default: the model's)")
    scale_options(options)
    add("--solver", metavar="S", help="unipc, euler or renoise (default: what the plans need, or the model's)")
    add("--rounds", type=int, default=3, metavar="R", help="warm runs of each plan, by turns (default 3)")
    add("--prompts", metavar="FILE", help="a file with one prompt a line (default: one prompt)")
    add("--image", metavar="FILE", help="the first frame, for an image-to-video model")
    add("--last-image", metavar="FILE", help="the last frame, for a model that draws between two")
    add("--seeds", type=int, default=1, metavar="N", help="samples of each prompt, with seeds 0 to N - 1 (default 1)")
    add("--suite", metavar="NAME", help="also score every plan as dit-eval does: moving-digits or digits")
    add("--samples", type=int, default=64, metavar="N", help="prompts of --suite, each with --seeds (default 64)")
    add("--keep", metavar="FOLDER", help="keep the suite's samples there; those that are there are not generated again")
    add("--json", metavar="FILE", help="write the rows there")
    add("--plot", metavar="FILE", help="draw quality against time: a .png, and a page beside it")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    try:
        rows = bench(options)
    except UserError as error:
        print(f"dit-bench: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dit-bench: {error.filename or options.model}: {error.strerror or error}.", file=sys.stderr)
        return 2
    print(_table(rows))
    return 0


def bench(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the parsed command; returns the rows of `--json`."""
    with warnings_in_lines():
        entries = parse_entries(options.plans)
    _check(entries, options)
    plans = _plans(entries, options)

    from infer.plan_runs import rows as rows_of
    from infer.plan_runs import run_plans

    setting = _setting(plans[DENSE], options)
    rows = [row | setting for row in rows_of(run_plans(plans, options.rounds, _say), plans)]
    if options.attention:
        rows = [row | of_plan for row, of_plan in zip(rows, _attention(entries, options), strict=True)]
    if options.suite:
        from infer.plan_scores import plan_scores

        rows = [row | scores for row, scores in zip(rows, plan_scores(plans, options, _say), strict=True)]
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        bench_page.write_plot(Path(options.plot), rows)
    return rows


def _attention(entries: list[Entry], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every plan's time and speed-ups on the model of attention alone."""
    from infer.plan_runs import rows, run_plans

    _say("self-attention alone:")
    plans = _plans(entries, options, attention_only=True)
    told = ("seconds", "predicted_speedup", "measured_speedup", "efficiency")
    found = rows(run_plans(plans, options.rounds, _say), plans)
    return [{f"attention_{name}": row[name] for name in told} for row in found]


def _check(entries: list[Entry], options: argparse.Namespace) -> None:
    for name in ("rounds", "seeds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: expected at least 1")
    random = options.random or options.preset
    if random and (options.prompts or options.image or options.last_image or options.suite):
        raise UserError(
            "random weights make no pictures: expected no --prompts, --image, --last-image or --suite; leave them out"
        )
    for entry in entries:
        if (entry.on and random) or (entry.pruned and not random):
            raise UserError(f"{entry.name} has no place here: on: is for checkpoints, pruned: for random weights")
    if options.keep and not options.suite:
        raise UserError("--keep is for a suite's samples: expected --suite; name one")
    if options.attention and not random:
        raise UserError("--attention is for random weights: expected --random or --preset; add one")
    changed = [entry.name for entry in entries if any(isinstance(method, Ddit) for method in entry.plan.methods)]
    if options.attention and changed:
        raise UserError(f"--attention has blocks without MLPs, which {changed[0]} adapts: leave out one of them")
    if options.plot:
        if Path(options.plot).suffix.lower() != ".png":
            raise UserError(f"cannot draw {options.plot!r}: expected a name that ends in .png")
        bench_page.check_plotting()
    for path in filter(None, (options.json, options.plot)):
        media.make_room(path)


def _plans(entries: list[Entry], options: argparse.Namespace, attention_only: bool = False) -> dict[str, PlanJobs]:
    """By entry, its pipeline and jobs; UserError for what a model cannot serve, before anything compiles."""
    from infer.plan_runs import PlanJobs

    pipes: dict[tuple[str | None, float], Pipeline] = {}
    plans: dict[str, PlanJobs] = {}
    for entry in entries:
        subject = entry.on, entry.pruned
        if subject not in pipes:
            pipes[subject] = _subject(entry, options, attention_only)
        if not plans:  # the first is the plain model
            jobs_of = _job_maker(pipes[subject], entries, options)
        with warnings_in_lines():
            plans[entry.name] = PlanJobs(pipe=pipes[subject], jobs=jobs_of(pipes[subject], entry))
    return plans


def _subject(entry: Entry, options: argparse.Namespace, attention_only: bool) -> Pipeline:
    from infer.loading import load_pipeline
    from infer.random_pipeline import RandomKind, preset_pipeline, sized_pipeline

    if options.random or options.preset:
        kind = RandomKind(attention_only=attention_only, pruned=entry.pruned)
        return sized_pipeline(options.random, kind) if options.random else preset_pipeline(options.preset, kind)
    with warnings_in_lines():
        return load_pipeline(entry.on or options.model or "demo-wan")


def _job_maker(
    pipe: Pipeline, entries: list[Entry], options: argparse.Namespace
) -> Callable[[Pipeline, Entry], list[Job]]:
    """What makes an entry's jobs on a pipeline, one for every prompt and seed, all with one solver."""
    from infer.request import Request

    needed = {entry.plan.solver: entry.name for entry in entries if entry.plan.solver}
    if len(needed) > 1:
        which = ", ".join(f"{name} the {solver} solver" for solver, name in needed.items())
        raise UserError(f"plans of one run have one solver, found {which}: time them apart, or calibrate again")
    solver = options.solver or next(iter(needed), pipe.defaults.solver)
    size, frames = _shape(options.shape) if options.shape else (None, None)
    image, last_image = (media.open_image(file) if file else None for file in (options.image, options.last_image))
    scales = given_scales(options)

    def job(pipe: Pipeline, entry: Entry, prompt: str, seed: int) -> Job:
        return pipe.prepare(
            Request(
                prompt=prompt,
                image=image,
                last_image=last_image,
                size=size,
                frames=frames,
                steps=options.steps if entry.steps is None else entry.steps,
                **scales,
                solver=solver,
                seed=seed,
                plan=entry.plan,
            )
        )

    # A suite's samples are its own: beside it one sample is timed.
    seeds = 1 if options.suite else options.seeds
    prompts = read_prompts(options.prompts) if options.prompts else [PROMPTS[pipe.defaults.grammar]]
    samples = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    return lambda pipe, entry: [job(pipe, entry, *sample) for sample in samples]


def _shape(text: str) -> tuple[tuple[int, int], int | None]:
    from infer.request import parse_size

    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
        raise UserError(f"shape {text!r} is not understood: expected WIDTHxHEIGHTxFRAMES such as 832x480x81")
    return parse_size("x".join(parts[:2])), int(parts[2]) if len(parts) == 3 else None


def _setting(dense: PlanJobs, options: argparse.Namespace) -> dict[str, Any]:
    """What all rows share."""
    import jax

    device = jax.devices()[0]
    kind = f"{device.device_kind} x {jax.device_count()}"
    on_cpu = f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"
    pipe, job = dense.pipe, dense.jobs[0]
    return {
        "model": pipe.name,
        "size": list(job.size),
        "frames": job.frames,
        "tokens": pipe.tokens(job.size, job.frames),
        "guidance": job.guidance,
        "true_cfg": job.true_cfg,
        "shift": job.shift,
        "solver": job.solver,
        "rounds": options.rounds,
        "samples": options.samples * options.seeds if options.suite else len(dense.jobs),
        "device": on_cpu if device.platform == "cpu" else kind,
        "jax": jax.__version__,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(rows: list[dict[str, Any]]) -> str:
    """The rows in columns, for reading."""
    columns = [name for name in bench_page.COLUMNS if any(row.get(name) is not None for row in rows)]
    cells = [[bench_page.COLUMNS[name] for name in columns]]
    cells += [[bench_page.cell(name, row) for name in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [
        "  ".join(text.ljust(width) if index == 0 else text.rjust(width) for index, (text, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    return "\n".join([bench_page.title(rows), *lines])


if __name__ == "__main__":
    sys.exit(main())
