"""Figures of serving: how long a start takes, what the engine adds to a request, what batches bring.

python -m infer.serving_bench --model demo-wan --model demo-flux --buckets demo --json serving.json

Starts are of a process each, first with an empty store of compiled programs and then with what it holds. The engine's
requests and the pipeline's own calls take turns; so do samples one by one and in batches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.progress import progress_bar
from dit_jax.config import UserError

if TYPE_CHECKING:
    from infer.buckets import ModelBuckets
    from infer.pipeline import Pipeline
    from infer.request import Job


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        "python -m infer.serving_bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", action="append", required=True, help="as for dit-serve")
    add("--buckets", default="quick", metavar="FILE", help="as for dit-serve (default quick)")
    add("--rounds", type=int, default=5, metavar="N", help="turns of what is compared (default 5)")
    add("--batch", type=int, default=4, metavar="N", help="samples of a batch (default 4)")
    add("--only", choices=("start", "engine"), help="one of the two parts")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--started", action="store_true", help=argparse.SUPPRESS)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    began = time.perf_counter()
    options = parser().parse_args(arguments)
    try:
        if options.started:
            print(json.dumps(_started(options, began)))
            return 0
        figures: dict[str, Any] = {"models": options.model, "buckets": options.buckets, "cores": os.cpu_count()}
        if options.only != "engine":
            figures |= starts(options)
        if options.only != "start":
            figures |= engine_figures(options)
    except UserError as error:
        print(f"serving_bench: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def starts(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a start with an empty store and with a full one, and how they compare without imports and weights."""
    words = [word for name in options.model for word in ("--model", name)]
    command = [sys.executable, "-m", "infer.serving_bench", *words, "--buckets", options.buckets, "--started"]
    with tempfile.TemporaryDirectory() as caches:
        place = os.environ | {"XDG_CACHE_HOME": caches}
        cold, warm = (
            json.loads(subprocess.run(command, env=place, check=True, capture_output=True, text=True).stdout)
            for _ in progress_bar(("cold", "warm"), desc="starts", unit="start")
        )
    return {"cold": cold, "warm": warm, "warm_over_cold": round(warm["ready"] / cold["ready"], 4)}


def _started(options: argparse.Namespace, began: float) -> dict[str, Any]:
    from infer.buckets import read_buckets
    from infer.loading import load_pipeline
    from infer.warming import warm, with_store

    imported = time.perf_counter()
    buckets = read_buckets(options.buckets, options.model)
    pipelines = {name: load_pipeline(name) for name in options.model}
    loaded = time.perf_counter()
    with_store(pipelines)
    seconds = warm(pipelines, buckets)
    programs = [pipe.programs for pipe in pipelines.values()]
    return {
        "imports": round(imported - began, 2),
        "weights": round(loaded - imported, 2),
        "ready": round(seconds, 2),
        "compiled": sum(one.compiled_count for one in programs),
        "from_store": sum(one.loaded_count for one in programs),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def engine_figures(options: argparse.Namespace) -> dict[str, Any]:
    """By model and shape: seconds of a request from the pipeline and from the engine, and of so many at once and one by
    one."""
    from infer.buckets import read_buckets
    from infer.loading import load_pipeline

    offered = read_buckets(options.buckets, options.model)
    found: dict[str, Any] = {}
    for name, of_model in offered.items():
        pipe = load_pipeline(name)
        of_shape = {str(shape): replace(of_model, shapes=(shape,)) for shape in of_model.shapes}
        found[name] = {shape: _figures(f"{name} {shape}", pipe, one, options) for shape, one in of_shape.items()}
    return {"engine": found}


def _figures(what: str, pipe: Pipeline, offered: ModelBuckets, options: argparse.Namespace) -> dict[str, Any]:
    from infer.engine import Engine, EngineOptions
    from infer.tickets import Ticket

    count = options.batch
    job = next(replace(offered, batches=(count,)).jobs(pipe))
    batches = tuple(sorted({1, count}))
    one = Engine({what: pipe}, {what: replace(offered, batches=(1,))}, EngineOptions(window=0.0))
    many = Engine({what: pipe}, {what: replace(offered, batches=batches)}, EngineOptions(window=0.05))

    def served(engine: Engine, samples: int) -> None:
        tickets = [Ticket(model=what, job=job.single(row)) for row in range(samples)]
        engine.submit(tickets)
        for ticket in tickets:
            ticket.result.result()

    def called(job: Job) -> None:
        pipe.decode(job, pipe.denoise(job))

    turns = {
        "pipeline": partial(called, job.single(0)),
        "pipeline_together": partial(called, job),
        "engine": partial(served, one, 1),
        "one_by_one": partial(served, one, count),
        "together": partial(served, many, count),
    }
    for engine in (one, many):
        engine.start()
    timed = _timed(turns, options.rounds, what)
    seconds = {turn: statistics.median(values) for turn, values in timed.items()}
    for engine in (one, many):
        engine.stop(60)
    ratios = {
        "engine_overhead": seconds["engine"] / seconds["pipeline"] - 1,
        "batched_throughput": seconds["one_by_one"] / seconds["together"],
        "batched_throughput_of_pipeline": count * seconds["pipeline"] / seconds["pipeline_together"],
    }
    figures = {figure: round(value, 4) for figure, value in (seconds | ratios).items()}
    return figures | {"steps": job.steps, "batch": count}


def _timed(turns: Mapping[str, Callable[[], None]], rounds: int, name: str) -> dict[str, list[float]]:
    """Seconds of each, taking turns; what the first of them compile is not counted."""
    seconds: dict[str, list[float]] = {turn: [] for turn in turns}
    for number in progress_bar(range(rounds + 1), desc=f"{name}: engine", unit="turn"):
        for turn, run in turns.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[turn].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
