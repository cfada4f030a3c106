"""`dit-calibrate ddit`: the τ at which runs of DDiT (arXiv 2602.16968) have a wanted mean token count.

A τ is used in the runs that it is chosen by: steps at larger sizes leave other latents to the next choice than steps at
the base size would. So every round runs the prompts with the τ that the last round would have needed, inside what the
rounds before have bracketed.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.config import UserError
from dit_jax.methods.ddit import CHOICES, Ddit, calibrated_threshold, mean_tokens, token_counts, written_sizes
from dit_jax.methods.plan import Plan, parse_plan
from infer.request import Request

ROUNDS = 6  # beyond the first, which runs at the base size
CLOSE = 0.01  # share of the base size's tokens that a mean may be off when the search ends
FAR = 0.05  # likewise, from where it is warned of


def ddit_options(options: argparse.ArgumentParser) -> None:
    """Options of `dit-calibrate ddit`."""
    add = options.add_argument
    add("--tokens", type=float, required=True, metavar="SHARE", help="mean token count, as a share of the base size's")
    add("--rho", type=float, default=Ddit().quantile, metavar="R", help="quantile over patches (default 0.4)")
    usual = written_sizes(Ddit().sizes)
    add("--sizes", default=usual, choices=CHOICES, help=f"that may be chosen beyond p (default {usual})")
    add("--order", type=int, default=Ddit().order, choices=(1, 2, 3), help="of the difference (default 3)")


def ddit(pipe: Any, options: argparse.Namespace, request: Request) -> dict[str, Any]:
    """Searches τ for runs of so many steps and writes the file that a plan reads."""
    from convert.progress import progress_bar

    if not 0 <= options.rho <= 1:
        raise UserError(f"--rho is {options.rho}: expected a quantile from 0 to 1; leave it out")
    measure = Ddit(quantile=options.rho, order=options.order, sizes=CHOICES[options.sizes])
    job = pipe.prepare(replace(request, plan=_plan(0.0, measure)))
    with progress_bar(total=len(job.prompts) * (1 + ROUNDS), desc=options.kind, unit="run") as bar:
        reached = search(pipe, job, options.tokens, measure, bar.update)
    tau = nearest(reached, options.tokens)
    told = {
        "tau": tau,
        "rho": options.rho,
        "order": options.order,
        "sizes": options.sizes,
        "steps": job.steps,
        "tokens": options.tokens,
        "reached": reached[tau],
        "solver": job.solver,
        "size": job.size,
        "frames": job.frames,
        "prompts": len(job.prompts),
        "model": pipe.name,
        "checkpoint": pipe.hash,
    }
    if abs(reached[tau] - options.tokens) > FAR:
        warnings.warn(
            f"the nearest that {len(reached)} rounds came to a share of {options.tokens:g} of the tokens is "
            f"{reached[tau]:.3f}: give more prompts, or ask for another share",
            stacklevel=2,
        )
    partial = Path(f"{options.out}.partial")
    partial.write_text(json.dumps(told, indent=1) + "\n")
    partial.replace(options.out)
    return {"out": str(options.out), "rounds": len(reached), **told}


def search(pipe: Any, job: Any, wanted: float, measure: Ddit, ran: Callable[[], Any]) -> dict[float, float]:
    """τ -> mean share of the base size's tokens in runs with it, of every τ that was tried; the first is 0.

    measure  says what is chosen from, and by what: sizes, quantile and order
    ran      is called after every run
    """
    shape = (1, *pipe.latents_shape(job.size, job.frames))
    tokens = token_counts(shape, pipe.transformer_config.patch, measure.variants)
    tau, reached = 0.0, dict[float, float]()
    while tau not in reached and len(reached) <= ROUNDS:
        recorded, sizes = [], []
        for index in range(len(job.prompts)):
            values, scales = recorded_run(pipe, replace(job.single(index), plan=_plan(tau, measure)))
            recorded.append(values)
            sizes += scales
            if not reached and not index:
                _check_reach(wanted, values, tokens, measure.order)
            ran()
        count_of = dict(zip(measure.variants, tokens, strict=True))
        reached[tau] = float(np.mean([count_of[scale] for scale in sizes]) / tokens[0])
        if abs(reached[tau] - wanted) <= CLOSE:
            break
        tau = next_threshold(reached, wanted, calibrated_threshold(np.array(recorded), tokens, wanted * tokens[0]))
    return reached


def recorded_run(pipe: Any, job: Any) -> tuple[np.ndarray, list[int]]:
    """What every step of one sample's run was chosen by [S, Q], and the sizes that ran."""
    values, scales = [], []

    def note(step: int, scale: int, value: np.ndarray) -> None:
        values.append(value)
        scales.append(scale)

    pipe.denoise(job, chosen=note)
    return np.array(values), scales


def next_threshold(reached: Mapping[float, float], wanted: float, proposed: float) -> float:
    """The proposed τ if it lies between those that are known to be too small and too large, else one that does."""
    low = max((tau for tau, share in reached.items() if share > wanted), default=0.0)
    high = min((tau for tau, share in reached.items() if share < wanted), default=math.inf)
    if low < proposed < high:
        return proposed
    if math.isinf(high):
        return 2 * low
    return math.sqrt(low * high) if low else high / 2


def nearest(reached: Mapping[float, float], wanted: float) -> float:
    """The τ whose runs came nearest."""
    return min(reached, key=lambda tau: abs(reached[tau] - wanted))


def _plan(tau: float, measure: Ddit) -> Plan:
    sizes = written_sizes(measure.sizes)
    return parse_plan(f"{Ddit.name}:tau={tau!r}:rho={measure.quantile!r}:order={measure.order}:sizes={sizes}")


def _check_reach(wanted: float, values: np.ndarray, tokens: np.ndarray, order: int) -> None:
    least = mean_tokens(values, tokens, math.inf) / tokens[0]
    if not least <= wanted < 1:
        raise UserError(
            f"--tokens is {wanted:g}: expected at least {math.ceil(1000 * least) / 1000:g}, where the largest patches "
            f"run in all of {len(values)} steps but the first {order}, and less than 1; change it, or ask for more "
            "--steps"
        )
