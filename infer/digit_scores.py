"""Scores of clips of moving digits: do they show what their prompts ask for, and do the glyphs look handwritten?

Shapes: T frames, S side of the frame in pixels, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infer.digit_grammar import Scene
from infer.digit_reader import FEATURES, DigitReader, read
from infer.digit_tracks import CROP, Track, find_tracks
from infer.moving_digits import load_digits, render

_LOOKS = 5
_REAL_SEED = 4711


@dataclass(frozen=True, kw_only=True)
class ClipReading:
    """What one clip shows of its scene.

    `right` bool [digits of the scene, 3]: value, colour and motion; `count` whether the number of digits is right;
    `relation` whether two digits stand as asked (None for one digit); `features` fp32 [digits of the scene * 5, F].
    """

    right: np.ndarray
    count: bool
    relation: bool | None
    features: np.ndarray

    @property
    def outcomes(self) -> dict[str, bool | None]:
        """Whether the clip is right in each of the scores that are shares of the prompts; None where it has no say."""
        digit, colour, direction = (bool(column.all()) for column in self.right.T)
        every = digit and colour and direction
        told = {"digit": digit, "colour": colour, "direction": direction, "all": every}
        return {**told, "count": self.count, "relation": self.relation}


def read_clip(clip: np.ndarray, scene: Scene, reader: DigitReader) -> ClipReading:
    """Compare a clip uint8 [T, S, S, 3] with its scene.

    The digits are found without the scene. The largest are then given to the digits of the scene in the order that its
    relation says ("above": from top to bottom); a digit that was not found is wrong in everything.
    """
    tracks = find_tracks(clip)
    found = _in_order(tracks[: len(scene.digits)], scene)
    right = np.zeros((len(scene.digits), 3), dtype=bool)
    features = [np.zeros((0, FEATURES), np.float32)]
    for index, digit in enumerate(scene.digits):
        track = found[index] if index < len(found) else None
        crops = track.crops if track else np.zeros((1, CROP, CROP), np.float32)
        logits, seen = read(reader, crops)
        features.append(seen[np.linspace(0, len(seen) - 1, _LOOKS).round().astype(int)])
        if track:
            motion = track.motion(len(clip), clip.shape[1])
            right[index] = (
                int(logits.mean(0).argmax()) == digit.value,
                track.colour == digit.colour,
                motion == digit.motion,
            )
    return ClipReading(
        right=right,
        count=len(tracks) == len(scene.digits),
        relation=_keeps_relation(found, scene),
        features=np.concatenate(features),
    )


def axis_and_sign(relation: str) -> tuple[int, int]:
    return {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]


def _in_order(tracks: list[Track], scene: Scene) -> list[Track]:
    if scene.relation is None:
        return tracks
    axis, sign = axis_and_sign(scene.relation)
    return sorted(tracks, key=lambda track: sign * float(track.centres[:, axis].mean()))


def _keeps_relation(found: list[Track], scene: Scene) -> bool | None:
    """Whether two found digits lie clear of each other along the axis of the relation, on average over the clip.

    Which of the two is which is told by `digit` and `colour`: they are compared in the order of the relation.
    """
    if scene.relation is None:
        return None
    if len(found) < 2:
        return False
    axis, sign = axis_and_sign(scene.relation)
    first, second = found[::sign]
    return bool(first.boxes[:, axis + 2].mean() <= second.boxes[:, axis].mean())


def summary(readings: Sequence[ClipReading], reference: Sequence[ClipReading]) -> dict[str, Any]:
    """Scores of readings; the same clips and scenes always get the same ones.

    Shares of the prompts: `digit`, `colour`, `direction` (right for every digit of the prompt), `all` (the three
    together), `count` (as many digits as asked), `relation` (of prompts with two digits: they lie apart as asked).
    Shares of the digits: `digit_each`, `colour_each`, `direction_each`. `frechet` is the Fréchet distance (Heusel et
    al. 2017, eq. 6) between the classifier's features of the clips' glyphs, five frames of each digit, and those of
    the `reference`; a missing digit is an empty glyph.
    """
    digits = np.concatenate([reading.right for reading in readings])
    names = ("digit", "colour", "direction")
    return {
        **shares(readings),
        "frechet": frechet_distance(*(np.concatenate([r.features for r in side]) for side in (readings, reference))),
        **{f"{name}_each": float(share) for name, share in zip(names, digits.mean(0), strict=True)},
        "videos": len(readings),
    }


def shares(readings: Sequence[Any]) -> dict[str, float | None]:
    """Of every outcome, the share of the prompts in which it is right; None where no prompt has a say."""
    of_prompts = [reading.outcomes for reading in readings]
    told = {name: [each[name] for each in of_prompts if each[name] is not None] for name in of_prompts[0]}
    return {name: float(np.mean(values)) if values else None for name, values in told.items()}


def real_clips(scenes: Sequence[Scene], half: int) -> Iterator[np.ndarray]:
    """Real clips uint8 [T, S, S, 3] of the scenes, drawn with half 0 or 1 of the held-out glyphs; always the same."""
    digits = load_digits("held-out")
    for index, scene in enumerate(scenes):
        rng = np.random.default_rng([_REAL_SEED, half, index])
        glyphs = [digits.images[rng.choice(np.flatnonzero(digits.labels == d.value)[half::2])] for d in scene.digits]
        yield render(scene, glyphs, rng)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The squared Fréchet distance between the normal distributions fitted to features [N, F] and [M, F]."""
    mean_a, mean_b = a.mean(0, dtype=np.float64), b.mean(0, dtype=np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(features.astype(np.float64), rowvar=False)) for features in (a, b))
    # trace(sqrt(A B)) is that of the symmetric sqrt(A) B sqrt(A), whose eigenvalues are real.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * shared
    return float(max(0.0, distance))
