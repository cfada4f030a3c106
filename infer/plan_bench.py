"""`dit-bench`: how much time each plan takes on a model, beside what its arithmetic promises and what it costs in
pictures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError
from dit_jax.methods.plan import DENSE, Plan, parse_plan
from infer import bench_page, media

if TYPE_CHECKING:
    from infer.pipeline import Pipeline
    from infer.request import Job

PROMPTS = {"moving-digits": "a red 7 moving left", "digits": "a red 7", None: "a cat surfing at dusk"}

EPILOG = """\
All plans run with one solver: the one that a plan needs, if there is one, so that they differ in nothing else. Plans
with a number of steps of their own keep it; dense:20 is the plain model with 20 steps. docs/benchmarks.md says what the
figures mean.

examples:
  dit-bench --model demo-wan --plans dense,dense:20,hsa:50,hsa:25 --seeds 3 --json out.json --plot out.png
  dit-bench --random 768x12x4096 --steps 8 --plans dense,hsa:groups=16@8/84@2:window=0.5
  dit-bench --preset wan2.1-t2v-1.3b --shape 832x480x81 --plans dense,hsa:50 --guidance 5
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A plan of the list under its name there, with its number of steps (None: the request's)."""

    name: str
    plan: Plan
    steps: int | None


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
    add("--guidance", metavar="G", help="guidance scale; 1 turns guidance off (default: the model's)")
    add("--true-cfg", type=float, metavar="G", help="FLUX: scale of real guidance (default: the model's)")
    add("--solver", metavar="S", help="unipc or euler (default: what the plans need, or else the model's)")
    add("--rounds", type=int, default=3, metavar="R", help="warm runs of each plan, by turns (default 3)")
    add("--prompts", metavar="FILE", help="a file with one prompt a line (default: one prompt)")
    add("--image", metavar="FILE", help="the first frame, for an image-to-video model")
    add("--seeds", type=int, default=1, metavar="N", help="samples of each prompt, with seeds 0 to N - 1 (default 1)")
    add("--suite", metavar="NAME", help="also score every plan as dit-eval does: moving-digits or digits")
    add("--samples", type=int, default=64, metavar="N", help="prompts of --suite (default 64)")
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
    entries = parse_entries(options.plans)
    _check(options)
    pipe = _subject(options)
    jobs = _jobs(pipe, entries, options)

    from infer.plan_runs import rows as rows_of
    from infer.plan_runs import run_plans

    runs = run_plans(pipe, jobs, options.rounds, _say)
    setting = _setting(pipe, next(iter(jobs.values())), options)
    rows = [row | setting for row in rows_of(runs, jobs)]
    if options.attention:
        rows = [row | of_plan for row, of_plan in zip(rows, _attention(entries, options), strict=True)]
    if options.suite:
        rows = [row | _scores(pipe, jobs[row["plan"]][0], options) for row in rows]
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        bench_page.write_plot(Path(options.plot), rows)
    return rows


def _attention(entries: list[Entry], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every plan's time and speed-ups on the model of attention alone."""
    from infer.plan_runs import rows, run_plans

    _say("self-attention alone:")
    pipe = _subject(options, attention_only=True)
    jobs = _jobs(pipe, entries, options)
    told = ("seconds", "predicted_speedup", "measured_speedup", "efficiency")
    found = rows(run_plans(pipe, jobs, options.rounds, _say), jobs)
    return [{f"attention_{name}": row[name] for name in told} for row in found]


def parse_entries(text: str) -> list[Entry]:
    """The plans of a list, dense first; UserError for one that is none or comes twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    entries = [_entry(name) for name in dict.fromkeys([DENSE, *names])]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"--plans names {twice[0]} twice: expected each plan once; remove one")
    return entries


def _entry(name: str) -> Entry:
    plain, _, steps = name.partition(":")
    if plain == DENSE and steps.isdigit():
        return Entry(name=name, plan=Plan(), steps=int(steps))
    plan = parse_plan(name)
    return Entry(name=name, plan=plan, steps=plan.steps)


def _check(options: argparse.Namespace) -> None:
    for name in ("rounds", "seeds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: expected at least 1")
    random = options.random or options.preset
    if random and (options.prompts or options.image or options.suite):
        raise UserError("random weights make no pictures: expected no --prompts, --image or --suite; leave them out")
    if options.attention and not random:
        raise UserError("--attention is for random weights: expected --random or --preset; add one")
    if options.plot:
        if Path(options.plot).suffix.lower() != ".png":
            raise UserError(f"cannot draw {options.plot!r}: expected a name that ends in .png")
        bench_page.check_plotting()
    for path in filter(None, (options.json, options.plot)):
        media.make_room(path)


def _subject(options: argparse.Namespace, attention_only: bool = False) -> Pipeline:
    from infer.loading import load_pipeline
    from infer.random_pipeline import preset_pipeline, sized_pipeline

    if options.random:
        return sized_pipeline(options.random, attention_only)
    if options.preset:
        return preset_pipeline(options.preset, attention_only)
    with warnings_in_lines():
        return load_pipeline(options.model or "demo-wan")


def _jobs(pipe: Pipeline, entries: list[Entry], options: argparse.Namespace) -> dict[str, list[Job]]:
    """By plan, a job for every prompt and seed; UserError for what the model cannot serve, before anything compiles."""
    from infer.request import Request, parse_guidance

    needed = {entry.plan.solver for entry in entries if entry.plan.solver}
    solver = options.solver or next(iter(needed), pipe.defaults.solver)
    size, frames = _shape(options.shape) if options.shape else (None, None)
    image = media.open_image(options.image) if options.image else None
    guidance = parse_guidance(options.guidance) if options.guidance else None

    def job(entry: Entry, prompt: str, seed: int) -> Job:
        return pipe.prepare(
            Request(
                prompt=prompt,
                image=image,
                size=size,
                frames=frames,
                steps=options.steps if entry.steps is None else entry.steps,
                guidance=guidance,
                true_cfg=options.true_cfg,
                solver=solver,
                seed=seed,
                plan=entry.plan,
            )
        )

    samples = [(prompt, seed) for prompt in _prompts(pipe, options) for seed in range(options.seeds)]
    with warnings_in_lines():
        return {entry.name: [job(entry, *sample) for sample in samples] for entry in entries}


def _shape(text: str) -> tuple[tuple[int, int], int | None]:
    from infer.request import parse_size

    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
        raise UserError(f"shape {text!r} is not understood: expected WIDTHxHEIGHTxFRAMES such as 832x480x81")
    return parse_size("x".join(parts[:2])), int(parts[2]) if len(parts) == 3 else None


def _prompts(pipe: Pipeline, options: argparse.Namespace) -> list[str]:
    if options.prompts is None:
        return [PROMPTS[pipe.defaults.grammar]]
    try:
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the prompts in {options.prompts!r}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{options.prompts!r} holds no prompt: expected one a line")
    return prompts


def _setting(pipe: Pipeline, jobs: list[Job], options: argparse.Namespace) -> dict[str, Any]:
    """What all rows share."""
    import jax

    device = jax.devices()[0]
    kind = f"{device.device_kind} x {jax.device_count()}"
    on_cpu = f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"
    job = jobs[0]
    return {
        "model": pipe.name,
        "size": list(job.size),
        "frames": job.frames,
        "tokens": pipe.tokens(job.size, job.frames),
        "guidance": job.guidance,
        "true_cfg": job.true_cfg,
        "solver": job.solver,
        "rounds": options.rounds,
        "samples": len(jobs),
        "device": on_cpu if device.platform == "cpu" else kind,
        "jax": jax.__version__,
    }


def _scores(pipe: Pipeline, job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """The scores of `dit-eval` of a plan."""
    from infer import evaluate

    _say(f"{job.plan} with {job.steps} steps: scoring {options.samples} samples")
    words = ["--model", pipe.name, "--suite", options.suite, "--samples", str(options.samples)]
    words += ["--steps", str(job.steps), "--solver", job.solver, "--plan", job.plan]
    if options.guidance:
        words += ["--guidance", options.guidance]
    report = evaluate.evaluate(evaluate.parser().parse_args(words), pipe)
    told = ("suite", "samples", "model", "settings", "ceiling")
    return {name: value for name, value in report.items() if name not in told} | {"suite": options.suite}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(rows: list[dict[str, Any]]) -> str:
    """The rows in columns, for reading."""
    columns = [name for name in bench_page.COLUMNS if any(row.get(name) is not None for row in rows)]
    cells = [[bench_page.COLUMNS[name] for name in columns]]
    cells += [[bench_page.cell(name, row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [
        "  ".join(text.ljust(width) if index == 0 else text.rjust(width) for index, (text, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    return "\n".join([bench_page.title(rows), *lines])


if __name__ == "__main__":
    sys.exit(main())
