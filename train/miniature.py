"""What the recipes reach on a demo model: every step from data to scores, and a table of them (docs/distillation.md).

python -m train.miniature --model demo-flux --out runs/miniature-flux
python -m train.miniature --model demo-flux --out runs/miniature-flux --samples 200 --only stage1
python -m train.miniature --model demo-flux --out runs/again --known docs/benchmarks/miniature-demo-flux.json

Data, pruning, training and `dit-eval` run as commands of their own, several at a time where they do not wait for each
other. What is there is not made again, and a training that was stopped goes on: give the same command again. Students
are compared with the model that they learn from sample by sample, the papers' ablations with each other. At the end
`dit-bench` times all of them in turn, with nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from dit_jax.config import UserError
from train.miniature_stages import Study, bench_stage, sampled, stages
from train.miniature_table import report, restore, table
from train.stages import chosen, run_all

MODELS = ("demo-flux", "demo-wan")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        "python -m train.miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", required=True, choices=MODELS)
    add("--out", required=True, type=Path, metavar="DIR", help="folder of all that is made")
    add("--samples", type=int, default=1000, metavar="N", help="prompts that are scored (default 1000)")
    add("--steps", type=int, default=40, metavar="N", help="denoising steps of all but few-step students (default 40)")
    add("--examples", type=int, default=2048, metavar="N", help="clips or pictures to train on (default 2048)")
    add("--length", type=float, default=1.0, metavar="X", help="of the trainings, in their usual steps (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="of the trainings (default 0)")
    add("--jobs", type=int, default=2, metavar="N", help="commands at a time (default 2)")
    add("--only", metavar="NAMES", help="these parts, joined by commas, and what they need; no table")
    add("--known", type=Path, metavar="FILE", help="a miniature.json: what it scored and timed is not done again")
    add("--table", action="store_true", help="run nothing, print the table of what there is")
    add("--list", action="store_true", help="print the commands that are left and run nothing")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 1 where a command failed, 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    try:
        return _main(options)
    except UserError as error:
        print(f"miniature: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"miniature: {error.filename or options.out}: {error.strerror or error}.", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace) -> int:
    study = Study(
        model=options.model, out=options.out, samples=options.samples, steps=options.steps, examples=options.examples,
        length=options.length, seed=options.seed, **sampled(options.model, options.steps),
    )  # fmt: skip
    if options.known:
        restore(study, options.known)
    timing = bench_stage(study)
    wanted = [] if options.table else chosen([*stages(study), timing], options.only)
    if options.list:
        print("\n".join(shlex.join(stage.command) for stage in wanted))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    beside_nothing = [stage for stage in wanted if stage == timing]
    for parts, jobs in ([stage for stage in wanted if stage != timing], options.jobs), (beside_nothing, 1):
        if broken := parts and run_all(parts, jobs, options.out / "logs"):
            print(f"miniature: {broken}", file=sys.stderr)
            return 1
    if options.only:
        return 0
    found = report(study)
    (options.out / "miniature.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
