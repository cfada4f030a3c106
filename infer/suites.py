"""The suites of `dit-eval`: prompts, what they ask for, and how samples of a model are scored beside real ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from infer import digit_scores, picture_scores
from infer.digit_grammar import Scene, caption, random_picture, random_scene
from infer.digit_pictures import SIZE
from infer.moving_digits import ClipSpec

_SCENES_SEED = 2024


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A sample is a video uint8 [T, S, S, 3] or, where `frames` is 1, a picture [S, S, 3].

    `real(scenes, half)` draws samples with half 0 or 1 of the held-out glyphs; `score(samples, scenes, reader,
    reference)` compares with what `read_reference(scenes, reader)` read in those of half 1.
    """

    noun: str
    size: int
    frames: int
    scene: Callable[[random.Random], Scene]
    caption: Callable[[Scene, random.Random], str]
    real: Callable[[list[Scene], int], Iterator[np.ndarray]]
    read_reference: Callable[[list[Scene], Any], list]
    score: Callable[[Iterable[np.ndarray], list[Scene], Any, list], dict[str, Any]]

    def prompts(self, count: int) -> tuple[list[Scene], list[str]]:
        """The first `count` scenes and their captions: uniform over the grammar, always the same."""
        rng = random.Random(_SCENES_SEED)
        pairs = []
        for _ in range(count):
            scene = self.scene(rng)
            pairs.append((scene, self.caption(scene, rng)))
        return [scene for scene, _ in pairs], [text for _, text in pairs]


SUITES = {
    "moving-digits": Suite(
        noun="video",
        size=ClipSpec().size,
        frames=ClipSpec().frames,
        scene=random_scene,
        caption=caption,
        real=digit_scores.real_clips,
        read_reference=digit_scores.read_reference,
        score=digit_scores.score_clips,
    ),
    "digits": Suite(
        noun="picture",
        size=SIZE,
        frames=1,
        scene=random_picture,
        caption=partial(caption, of_picture=True),
        real=picture_scores.real_pictures,
        read_reference=picture_scores.read_reference,
        score=picture_scores.score_pictures,
    ),
}
