"""What becomes of a suite's pictures under each plan of `dit-bench`: the scores of `dit-eval`, and PSNR and SSIM to the
plain model's."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.progress import progress_bar
from infer import evaluate
from infer.kept_samples import KeptSamples
from infer.margins import margins
from infer.plan_runs import PlanJobs
from infer.similarity import psnr, ssim

NOT_SCORES = ("suite", "samples", "seeds", "model", "settings", "ceiling", "margins")


def plan_scores(
    plans: Mapping[str, PlanJobs], options: argparse.Namespace, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """A row a plan: scores, `psnr` and `ssim` to the first plan's samples, and `margins` of all of them.

    options  of the command: suite, samples, seeds, guidance, true_cfg, shift and keep
    """
    with tempfile.TemporaryDirectory() as unkept:
        folder, dense = options.keep or unkept, None
        for name, plan in plans.items():
            say(f"{name}: {options.samples} prompts of the suite, {options.seeds} seeds each")
            of_plan = _words(plan, folder, options)
            report = evaluate.evaluate(of_plan, plan.pipe)
            kept = evaluate.kept_samples(plan.pipe, report["settings"], of_plan)
            assert kept is not None
            dense = dense or kept
            likeness, of_likeness = _likeness(kept, dense, options)
            scores = {score: value for score, value in report.items() if score not in NOT_SCORES}
            told = {"suite": options.suite, "margins": report["margins"] | of_likeness, "ceiling": report["ceiling"]}
            yield scores | likeness | told


def _words(plan: PlanJobs, folder: str, options: argparse.Namespace) -> argparse.Namespace:
    job = plan.jobs[0]
    words = ["--model", plan.pipe.name, "--suite", options.suite, "--keep", folder]
    words += ["--samples", str(options.samples), "--seeds", str(options.seeds)]
    words += ["--steps", str(job.steps), "--solver", job.solver, "--plan", str(job.plan)]
    if options.guidance:
        words += ["--guidance", options.guidance]
    if options.true_cfg:
        words += ["--true-cfg", str(options.true_cfg)]
    if options.shift is not None:
        words += ["--shift", str(options.shift)]
    return evaluate.parser().parse_args(words)


def _likeness(
    kept: KeptSamples, dense: KeptSamples, options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean PSNR and SSIM of samples to the dense ones, and their margins."""
    pairs = []
    for number in progress_bar(range(options.samples * options.seeds), desc="comparing", unit="sample"):
        sample, expected = kept.read(number), dense.read(number)
        assert sample is not None and expected is not None
        pairs.append((psnr(sample, expected), ssim(sample, expected)))
    of_samples = np.array(pairs)

    def means(drawn: np.ndarray) -> dict[str, float]:
        return dict(zip(("psnr", "ssim"), map(float, of_samples[drawn].mean(0)), strict=True))

    return means(np.arange(len(pairs))), margins(means, options.samples, options.seeds)
