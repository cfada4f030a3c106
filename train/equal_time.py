"""What plans make of a demo model's pictures in equal time: all files that they need, and the table of docs/methods.md.

python -m train.equal_time --model demo-flux --out runs/equal-time-flux

Calibration, pruning and untrained adapters come first, several commands at a time; then `dit-bench` runs all plans with
nothing beside it. What is there is not made again: a run that was stopped goes on when it is given again. The settings
of the plans are those that come nearest to 75, 50 and 25 % of the time of the 40 dense steps.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_jax.config import UserError
from train.demo_media import PROMPTS
from train.stages import Stage, run_all

STEPS, SEEDS, ROUNDS = 40, 3, 3
RATIO = 0.45
PRUNED = ("0.3", "0.5", "0.75")
TOKENS = ("0.75", "0.5", "0.25")
PLAIN = ("dense:30", "dense:20", "dense:10", "hsa:75A", "hsa:50", "hsa:25", "taylorseer:n=2", "taylorseer:n=5")
# Thresholds and spans of steps, from most time to least.
TEACACHE = {"demo-wan": (0.075, 0.12, 0.35), "demo-flux": (0.03, 0.05, 0.23)}
MAGCACHE = {"demo-wan": ("0.01", "0.02", "0.5:k=10"), "demo-flux": ("0.015", "0.06", "0.5:k=10")}
SPANS = {
    "demo-wan": ("ddit:2p@25-39", "ddit:2p@9-39", "dense:20+ddit:2p@4-19"),
    "demo-flux": ("ddit:2p@24-39", "ddit:2p@7-39", "dense:20+ddit:2p@4-19"),
}
FEWER = (33, 22, 11)  # dense steps beside which CoReDiT, which saves little by itself, takes as long
ROUTED = ("routing", "routing:min=3:max=6", "routing:min=2:max=3")
SUITES = {"demo-wan": "moving-digits", "demo-flux": "digits"}
SCORES = {"demo-wan": ("digit", "colour", "direction"), "demo-flux": ("digit", "colour", "count")}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Of which model, from how many prompts, and where all that is made lies."""

    model: str
    out: Path
    samples: int

    def path(self, name: str) -> Path:
        """Of something that is made."""
        return self.out / name


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        "python -m train.equal_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", required=True, choices=tuple(SUITES))
    add("--out", required=True, type=Path, metavar="DIR", help="folder of all that is made")
    add("--samples", type=int, default=64, metavar="N", help=f"prompts, with {SEEDS} seeds each (default 64)")
    add("--jobs", type=int, default=2, metavar="N", help="commands at a time before the bench (default 2)")
    add("--list", action="store_true", help="print the commands and run nothing")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 1 where a command failed, 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    asked = Table(model=options.model, out=options.out, samples=options.samples)
    before, timed = list(prepared(asked)), bench(asked)
    if options.list:
        print("\n".join(shlex.join(stage.command) for stage in (*before, timed)))
        return 0
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        logs = options.out / "logs"
        broken = run_all(before, options.jobs, logs) or run_all([timed], 1, logs)
    except UserError as error:
        print(f"equal_time: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"equal_time: {error.filename or options.out}: {error.strerror or error}.", file=sys.stderr)
        return 2
    if broken:
        print(f"equal_time: {broken}", file=sys.stderr)
        return 1
    print(table(asked.model, json.loads(timed.makes.read_text())))
    return 0


def prepared(asked: Table) -> Iterator[Stage]:
    """Prompts, what is calibrated on them, narrower models, and one with an untrained router and patch adapters."""
    media, prompts = asked.path("media"), str(asked.path("media") / PROMPTS)
    kind = "--clips" if asked.model == "demo-wan" else "--pictures"
    made = ("python", "-m", "train.demo_media", kind, "32", "--out", str(media))
    yield Stage(name="media", makes=media / PROMPTS, command=made)
    adapted = asked.path("adapted")
    added = ("--add", "ddit", "--add", "router")
    yield Stage(
        name="adapted", makes=adapted, command=("dit-adapt", "--model", asked.model, *added, "--out", str(adapted))
    )
    steps = ("--steps", str(STEPS), "--solver", "euler")
    for name, model, words, after in (
        ("coredit", asked.model, ("--ratio", str(RATIO)), ()),
        ("magcache", asked.model, steps, ()),
        *(("ddit", str(adapted), ("--tokens", share, *steps), ("adapted",)) for share in TOKENS),
    ):
        label = f"{name}{words[1]}" if name == "ddit" else name
        file = asked.path(f"{label}.json")
        yield Stage(
            name=label, makes=file, after=("media", *after),
            command=("dit-calibrate", name, "--model", model, "--prompts", prompts, *words, "--out", str(file)),
        )  # fmt: skip
    for share in PRUNED:
        out = asked.path(f"pruned{share}")
        widths = ("--heads", share, "--ffn", share, "--prompts", prompts)
        yield Stage(
            name=out.name, makes=out, after=("media",),
            command=("dit-prune", "--model", asked.model, *widths, "--out", str(out)),
        )  # fmt: skip


def plans(asked: Table) -> list[str]:
    """What is compared with the 40 dense steps, as `dit-bench` names it."""
    coredit, on = f"coredit:{asked.path('coredit.json')}", f"on:{asked.path('adapted')}"
    ratios = f"ratios={asked.path('magcache.json')}"
    magcache = [
        ":".join(["magcache", word.partition(":")[0], ratios, *word.split(":")[1:]]) for word in MAGCACHE[asked.model]
    ]
    spans = ["+".join([*plan.split("+")[:-1], on, plan.split("+")[-1]]) for plan in SPANS[asked.model]]
    return [
        *PLAIN,
        *(f"teacache:{threshold}" for threshold in TEACACHE[asked.model]),
        *magcache,
        coredit,
        *(f"dense:{steps}+{coredit}" for steps in FEWER),
        *(f"{on}+{plan}" for plan in ROUTED),
        *(f"on:{asked.path(f'pruned{share}')}" for share in PRUNED),
        *(f"{on}+ddit:{asked.path(f'ddit{share}.json')}" for share in TOKENS),
        *spans,
    ]


def bench(asked: Table) -> Stage:
    """All of them in turn, with scores."""
    file = asked.path("table.json")
    words: tuple[str, ...] = ("--model", asked.model, "--steps", str(STEPS), "--rounds", str(ROUNDS))
    words += ("--suite", SUITES[asked.model])
    words += ("--samples", str(asked.samples), "--seeds", str(SEEDS), "--keep", str(asked.path("samples")))
    words += ("--plans", ",".join(plans(asked)), "--json", str(file), "--plot", str(asked.path("table.png")))
    return Stage(name="bench", makes=file, command=("dit-bench", *words))


def table(model: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `dit-bench` in Markdown; ± is half of a 95 % interval."""
    scores, dense = SCORES[model], rows[0]["seconds"]
    heads = ("plan", "seconds", "of dense", "predicted / measured speed-up", "PSNR (dB)", "SSIM", "Fréchet distance")
    lines = ["| " + " | ".join([*heads, *(f"{score} %" for score in scores)]) + " |"]
    lines.append("|---" * (len(heads) + len(scores)) + "|")
    for row in rows:

        def told(name: str, digits: int, scale: float = 1.0, row: Mapping[str, Any] = row) -> str:
            if row[name] is None or (name in ("psnr", "ssim") and row is rows[0]):
                return ""
            return f"{scale * row[name]:.{digits}f} ± {scale * row['margins'][name]:.{digits}f}"

        lines.append(
            "| " + " | ".join([
                f"`{short(row['plan'])}`", f"{row['seconds']:.2f}", f"{row['seconds'] / dense:.0%}",
                f"{row['predicted_speedup']:.2f} / {row['measured_speedup']:.2f}",
                told("psnr", 1), told("ssim", 3), told("frechet", 1), *(told(score, 0, 100) for score in scores),
            ]) + " |"
        )  # fmt: skip
    return "\n".join(lines)


def short(plan: str) -> str:
    """A plan with the names of its files instead of their paths."""
    words = plan.replace("+", " + ").replace(":", " : ").replace("=", " = ").split(" ")
    return "".join(Path(word).name if "/" in word else word for word in words)


if __name__ == "__main__":
    sys.exit(main())
