"""The suites of `dit-eval`: prompts, what they ask for, and how samples of a model are scored beside real ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from infer import digit_scores, picture_scores
from infer.digit_grammar import Scene, caption, random_picture, random_scene
from infer.digit_pictures import SIZE
from infer.digit_reader import DigitReader
from infer.moving_digits import ClipSpec

_SCENES_SEED = 2024


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A sample is a video uint8 [T, S, S, 3] or, where `frames` is 1, a picture [S, S, 3].

    `real(scenes, half)` draws samples with half 0 or 1 of the held-out glyphs; `read(sample, scene, reader)` says what
    one shows of its scene, and `summary(readings, reference)` scores what many show.
    """

    noun: str
    size: int
    frames: int
    scene: Callable[[random.Random], Scene]
    caption: Callable[[Scene, random.Random], str]
    real: Callable[[list[Scene], int], Iterator[np.ndarray]]
    read: Callable[[np.ndarray, Scene, Any], Any]
    summary: Callable[[Sequence[Any], Sequence[Any]], dict[str, Any]]

    def prompts(self, count: int) -> tuple[list[Scene], list[str]]:
        """The first `count` scenes and their captions: uniform over the grammar, always the same."""
        rng = random.Random(_SCENES_SEED)
        pairs = []
        for _ in range(count):
            scene = self.scene(rng)
            pairs.append((scene, self.caption(scene, rng)))
        return [scene for scene, _ in pairs], [text for _, text in pairs]


class Exam:
    """A suite's first prompts, each as often as there are seeds, with what real samples of them show.

    captions   of the samples: all prompts, once for every seed
    reference  readings of real samples, drawn with the second half of the held-out glyphs
    ceiling    scores of real samples, drawn with the first half
    """

    def __init__(self, suite: Suite, prompts: int, seeds: int, reader: DigitReader):
        scenes, captions = suite.prompts(prompts)
        self._suite, self._reader, self._scenes = suite, reader, scenes * seeds
        self.captions = captions * seeds
        self.reference = self.readings(suite.real(self._scenes, 1))
        self.ceiling = self.summary(self.readings(suite.real(self._scenes, 0)))

    def readings(self, samples: Iterable[np.ndarray]) -> list[Any]:
        """What each sample shows of its scene."""
        return [
            self._suite.read(sample, scene, self._reader) for sample, scene in zip(samples, self._scenes, strict=True)
        ]

    def summary(self, readings: Sequence[Any]) -> dict[str, Any]:
        """Scores of readings."""
        return self._suite.summary(readings, self.reference)


SUITES = {
    "moving-digits": Suite(
        noun="video",
        size=ClipSpec().size,
        frames=ClipSpec().frames,
        scene=random_scene,
        caption=caption,
        real=digit_scores.real_clips,
        read=digit_scores.read_clip,
        summary=digit_scores.summary,
    ),
    "digits": Suite(
        noun="picture",
        size=SIZE,
        frames=1,
        scene=random_picture,
        caption=partial(caption, of_picture=True),
        real=picture_scores.real_pictures,
        read=picture_scores.read_picture,
        summary=picture_scores.summary,
    ),
}
