"""Scores of pictures of digits: does every object, colour and relation of the prompt show?

Shapes: S side of the picture in pixels, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infer.digit_grammar import Scene
from infer.digit_pictures import choose_glyphs, each_digit, render_picture
from infer.digit_reader import FEATURES, DigitReader, read
from infer.digit_scores import axis_and_sign, frechet_distance, shares
from infer.digit_tracks import CROP, Track, find_tracks

_REAL_SEED = 4712


@dataclass(frozen=True, kw_only=True)
class PictureReading:
    """What one picture shows of its scene.

    `right` bool [digits, 2]: value and colour of each of `each_digit`; `count` whether there are as many as asked;
    `relation` whether two kinds lie as asked (None for one kind); `features` fp32 [digits, F].
    """

    right: np.ndarray
    count: bool
    relation: bool | None
    features: np.ndarray

    @property
    def everything(self) -> bool:
        """Whether all that the prompt says of the digits is right."""
        return bool(self.right.all()) and self.count and self.relation is not False

    @property
    def outcomes(self) -> dict[str, bool | None]:
        """Whether the picture is right in each of the scores that are shares of the prompts; None where it has no
        say."""
        digit, colour = (bool(column.all()) for column in self.right.T)
        told = {"all": self.everything, "digit": digit, "colour": colour}
        return {**told, "count": self.count, "relation": self.relation}


def read_picture(picture: np.ndarray, scene: Scene, reader: DigitReader) -> PictureReading:
    """Compares a picture uint8 [S, S, 3] with its scene.

    The digits are found without the scene and read one by one. The largest are given to the scene's kinds in the order
    that the relation says ("above": from top to bottom). A digit that was not found is wrong in everything.
    """
    tracks = find_tracks(picture[None])
    wanted = each_digit(scene)
    found = _in_order(tracks[: len(wanted)], scene)
    crops = np.zeros((len(wanted), CROP, CROP), np.float32)
    for index, track in enumerate(found):
        crops[index] = track.crops[0]
    logits, features = read(reader, crops)
    right = np.zeros((len(wanted), 2), dtype=bool)
    for index, (track, digit) in enumerate(zip(found, wanted, strict=False)):
        right[index] = int(logits[index].argmax()) == digit.value, track.colour == digit.colour
    return PictureReading(
        right=right,
        count=len(tracks) == len(wanted),
        relation=_lie_as_asked(found, scene),
        features=features.reshape(len(wanted), FEATURES),
    )


def _in_order(tracks: list[Track], scene: Scene) -> list[Track]:
    if scene.relation is None:
        return tracks
    axis, sign = axis_and_sign(scene.relation)
    return sorted(tracks, key=lambda track: sign * float(track.centres[0, axis]))


def _lie_as_asked(found: list[Track], scene: Scene) -> bool | None:
    """Whether every digit of the first kind lies clear of every digit of the second along the axis of the relation."""
    if scene.relation is None:
        return None
    if len(found) < len(each_digit(scene)):
        return False
    axis, sign = axis_and_sign(scene.relation)
    kinds = np.split(np.stack([track.boxes[0] for track in found]), [scene.digits[0].count])
    before, after = kinds[::sign]
    return bool(before[:, axis + 2].max() <= after[:, axis].min())


def summary(readings: Sequence[PictureReading], reference: Sequence[PictureReading]) -> dict[str, Any]:
    """Scores of readings; the same pictures always get the same ones.

    Shares of the prompts: `all` (everything said of the digits is right), `digit` and `colour` (right for every digit),
    `count` (as many digits as asked), `relation` (of prompts with two kinds: they lie apart as asked). Shares of the
    digits: `digit_each`, `colour_each`. `frechet` is the Fréchet distance (Heusel et al. 2017, eq. 6) between the
    classifier's features of the glyphs and those of `reference`; a missing digit is an empty glyph.
    """
    digits = np.concatenate([reading.right for reading in readings])
    features = [np.concatenate([reading.features for reading in side]) for side in (readings, reference)]
    return {
        **shares(readings),
        "frechet": frechet_distance(*features),
        "digit_each": float(digits[:, 0].mean()),
        "colour_each": float(digits[:, 1].mean()),
        "pictures": len(readings),
    }


def real_pictures(scenes: Sequence[Scene], half: int) -> Iterator[np.ndarray]:
    """Real pictures uint8 [S, S, 3] of the scenes, with half 0 or 1 of the held-out glyphs; always the same."""
    for index, scene in enumerate(scenes):
        rng = np.random.default_rng([_REAL_SEED, half, index])
        yield render_picture(scene, choose_glyphs(scene, "held-out", rng, half), rng)
