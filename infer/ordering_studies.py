"""What is compared where the papers' orderings are measured, and how it is judged (`infer/orderings.py`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from convert.progress import progress_bar
from dit_jax.methods.coredit import Coredit
from dit_jax.methods.pruning import PROTECTION
from dit_jax.sampling.sampler import Guided
from infer.calibrate import CoherenceWatch
from infer.head_calibration import calibrate_heads
from infer.narrow_models import narrow_model, random_widths, scored_widths
from infer.paired_differences import AS_IN_THE_PAPER, bootstrap, verdict
from infer.teacher_forced import Trajectory

RATIOS = (0.23, 0.45)
SHARE = 0.3  # of heads or of neurons that is pruned

Arm = Callable[[Trajectory, int], Guided]
"""Makes the denoiser of one side of an ordering from a plain run, and a seed for what is drawn by lot."""


class Ordering(NamedTuple):
    """One setting that a paper finds, or we expect, to be better than the other, both by the names of their arms."""

    name: str
    better: str
    worse: str
    confirmed: str = AS_IN_THE_PAPER


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is measured: orderings, and the arms that they compare."""

    orderings: tuple[Ordering, ...]
    arms: Mapping[str, Arm]


def joined(studies: Sequence[Study]) -> Study:
    """Several studies as one."""
    arms = {name: arm for study in studies for name, arm in study.arms.items()}
    return Study(orderings=tuple(ordering for study in studies for ordering in study.orderings), arms=arms)


def coredit_study(pipe: Any, jobs: Sequence[Any]) -> tuple[Study, int]:
    """CoReDiT's orderings, and the guidance branches of a sample.

    Ratios are calibrated on the plain runs of these jobs, and hold at all noise levels.
    """
    watch = CoherenceWatch(Coredit(ratios=(0.0,)).stride)
    for job in progress_bar(jobs, desc="calibrating ratios", unit="prompt"):
        watch.samples = len(job.prompts)
        pipe.denoise(job, watch=watch)

    studies = [_coredit_orderings(ratio, tuple(*watch.ratios(ratio).values()), watch.branches) for ratio in RATIOS]
    return joined(studies), watch.branches


def _coredit_orderings(ratio: float, calibrated: tuple[float, ...], branches: int) -> Study:
    def arm(coredit: Coredit) -> Arm:
        return lambda plain, seed: replace(coredit, seed=seed).applied(plain.denoiser, plain.run)

    usual, own = Coredit(ratios=(ratio,), late=1), f"coredit:{ratio}:late=1"
    by_lot, bare, by_block = f"{own}:select=random", f"{own}:rebuild=none", f"{own}, calibrated"
    coredits = {
        own: usual,
        by_lot: replace(usual, select="random"),
        bare: replace(usual, rebuild="none"),
        by_block: replace(usual, ratios=calibrated),
    }
    orderings = [
        Ordering(f"coherent above random tokens, r = {ratio}", own, by_lot),
        Ordering(f"reconstruction above none, r = {ratio}", own, bare),
        Ordering(f"calibrated above uniform ratios, r = {ratio}", by_block, own),
    ]
    if branches > 1:
        shared, shared_lot = f"{own}:branches=shared", f"{by_lot}:branches=shared"
        coredits |= {
            name: replace(coredits[name.rsplit(":", 1)[0]], branches="shared") for name in (shared, shared_lot)
        }
        orderings += [
            Ordering(f"coherent above random tokens, branches alike, r = {ratio}", shared, shared_lot),
            Ordering(f"branches that skip alike above their own, r = {ratio}", shared, own, "as expected"),
        ]
    return Study(orderings=tuple(orderings), arms={name: arm(coredit) for name, coredit in coredits.items()})


def pare_study(pipe: Any, prompts: Sequence[str], **options: Any) -> Study:
    """PARE's orderings of width; heads are scored on plain runs of these prompts."""
    with progress_bar(total=len(prompts), desc="scoring heads", unit="prompt") as bar:
        [(_, heads)] = calibrate_heads(pipe, prompts, lambda done: bar.update(done - bar.n), **options).items()
    source = pipe.checkpoint

    def scored(of_heads: Any, protection: float = 1.0) -> Arm:
        model = functools.cache(lambda: narrow_model(source, scored_widths(source, of_heads, SHARE, protection)))
        return lambda plain, seed: replace(plain.denoiser, model=model())

    def by_lot(heads: float, neurons: float) -> Arm:
        return lambda plain, seed: replace(
            plain.denoiser, model=narrow_model(source, random_widths(source, heads, neurons, seed))
        )

    arms = {
        "heads scored": scored(heads),
        "heads random": by_lot(SHARE, 0.0),
        "neurons by norm and difference": scored(None),
        "neurons random": by_lot(0.0, SHARE),
    }
    orderings = [
        Ordering("scored above random heads", "heads scored", "heads random"),
        Ordering(
            "neurons by norm and difference above random ones", "neurons by norm and difference", "neurons random"
        ),
    ]
    if heads.types is not None:  # still images have none to protect
        arms["heads scored, temporal protected"] = scored(heads, PROTECTION)
        orderings.append(
            Ordering("temporal heads protected above not", "heads scored, temporal protected", "heads scored")
        )
    return Study(orderings=tuple(orderings), arms=arms)


def errors_of(
    arms: Mapping[str, Arm], runs: Any, levels: Sequence[int], seed: int, told: Callable[[], Any]
) -> dict[str, np.ndarray]:
    """Errors of every arm by prompt and noise level [prompts, levels]; `told` is called after each prompt's arm."""
    errors: dict[str, list[list[float]]] = {name: [] for name in arms}
    for number, plain in enumerate(runs):
        for name, arm in arms.items():
            changed = arm(plain, seed + number)
            errors[name].append([plain.error(changed, level) for level in levels])
            told()
    return {name: np.asarray(of_arm) for name, of_arm in errors.items()}


def judged(ordering: Ordering, errors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One row of the report."""
    better, worse = errors[ordering.better], errors[ordering.worse]
    difference = bootstrap((worse - better).mean(axis=1))
    by_level = [bootstrap(of_level) for of_level in (worse - better).T]
    return {
        "name": ordering.name,
        "better": ordering.better,
        "worse": ordering.worse,
        "better_error": round(float(better.mean()), 5),
        "worse_error": round(float(worse.mean()), 5),
        "difference": [round(value, 5) for value in difference],
        "found": verdict(difference, ordering.confirmed),
        "difference_by_level": [[round(value, 5) for value in of_level] for of_level in by_level],
        "found_by_level": [verdict(of_level, ordering.confirmed) for of_level in by_level],
    }
