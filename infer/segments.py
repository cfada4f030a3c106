"""How a run is cut: stages that each have their own denoiser, and equal segments of them that one program runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convert.wan import HIGH_NOISE

SEGMENT = 4  # steps a program runs at most before it reports progress


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps [first, stop) under one denoiser, which `denoiser` makes ready when their turn comes, of one transformer.

    Between stages the driver starts the denoiser's state anew; latents and the solver's state go on.
    """

    first: int
    stop: int
    denoiser: Callable[[], Any]
    component: str = HIGH_NOISE


def stages_between(breaks: Sequence[int], denoisers: Sequence[Callable[[], Any]]) -> list[Stage]:
    """A stage of each denoiser from one of the `breaks` (0, …, the number of steps) to the next; none of no steps."""
    spans = zip(breaks[:-1], breaks[1:], denoisers, strict=True)
    return [Stage(first=first, stop=stop, denoiser=denoiser) for first, stop, denoiser in spans if first < stop]


def cut(stages: Sequence[Stage], breaks: Sequence[int]) -> list[Stage]:
    """The stages, each cut at the breaks inside it."""
    ends = [
        [stage.first, *(step for step in breaks if stage.first < step < stage.stop), stage.stop] for stage in stages
    ]
    return [
        replace(stage, first=first, stop=stop)
        for stage, steps in zip(stages, ends, strict=True)
        for first, stop in itertools.pairwise(steps)
    ]


def segment_length(stages: Sequence[Stage]) -> int:
    """Steps of every segment, so that a single program serves all stages: the most that divide each, up to SEGMENT."""
    return max(n for n in range(1, SEGMENT + 1) if all((stage.stop - stage.first) % n == 0 for stage in stages))
