"""Finds the digits of a clip without knowing its prompt: where each is in every frame, its colour, its way, its glyph.

Shapes: T frames, S side of the frame in pixels, P frames in which a digit was found.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from infer.digit_grammar import STILL
from infer.moving_digits import DIRECTIONS, PALETTE

CROP = 28
"""Side of a normalised glyph, whose ink is 20 pixels long and centred."""

# Levels of 255: backgrounds stay below the first, the ink's middle is above the second.
_DARKEST_INK, _INK = 85.0, 120.0
# Pixels of a 128-pixel frame: what is shorter is a fragment; what moved less stands still (motions travel 20 and more).
_SHORTEST_DIGIT, _STILL_TRAVEL = 28.0, 10.0
_MOST_PARTS = 32


@dataclass(frozen=True, kw_only=True)
class Track:
    """One digit through a clip.

    `colour` is a name of PALETTE, `frames` int [P]; `boxes` fp [P, 4] (left, top, right, bottom) and `centres` [P, 2]
    (x, y) are in pixels; `crops` fp32 [P, 28, 28] are the normalised glyphs, ink 1 on 0; `area` is the mean number of
    ink pixels.
    """

    colour: str
    frames: np.ndarray
    boxes: np.ndarray
    centres: np.ndarray
    crops: np.ndarray
    area: float

    def motion(self, length: int, size: int) -> str:
        """The motion, a phrase of MOTIONS, in a clip of `length` frames of `size` pixels, by linear regression."""
        times = self.frames - self.frames.mean()
        travel = times @ self.centres / max(1e-9, times @ times) * (length - 1)
        if np.hypot(*travel) < _STILL_TRAVEL * size / 128:
            return STILL
        return max(DIRECTIONS, key=lambda motion: float(travel @ DIRECTIONS[motion]))


def find_tracks(clip: np.ndarray) -> list[Track]:
    """The digits of a clip uint8 [T, S, S, 3], the largest first.

    Ink is what is brighter than the dark background. It falls into parts that hang together in space and time and have
    one palette colour; parts in one another's place, and fragments beside a digit, are joined.
    """
    clip = clip.astype(np.float32)
    backdrop = np.median(clip.reshape(-1, 3), axis=0)
    value = clip.max(-1)
    parts = _parts(clip, value > _INK, backdrop)
    unit = clip.shape[1] / 128
    tracks = [_track(clip, value, mask, backdrop) for mask in _joined(parts, value.shape, unit)]
    lasting = [track for track in tracks if len(track.frames) >= 0.6 * len(clip)]
    return sorted(lasting, key=lambda track: -track.area)


def glyph_crops(ink: np.ndarray) -> np.ndarray:
    """Pictures of ink fp32 [P, Y, X] between 0 and 1 brought to glyphs [P, 28, 28]: centred, the longer side 20 pixels.

    A picture without ink stays empty.
    """
    dark = ink > 0.4
    boxes = []
    for across in (dark.max(2), dark.max(1)):
        low, high = across.argmax(1), across.shape[1] - across[:, ::-1].argmax(1)
        boxes.append(((low + high) / 2, high - low))
    scale = np.maximum(1, np.maximum(boxes[0][1], boxes[1][1])) / 20
    found = dark.max((1, 2))
    rows, columns = (
        _shrinking(centre, scale, length) * found[:, None, None]
        for (centre, _), length in zip(boxes, ink.shape[1:], strict=True)
    )
    return np.matmul(np.matmul(rows, ink), columns.transpose(0, 2, 1))


def _shrinking(centres: np.ndarray, scale: np.ndarray, length: int) -> np.ndarray:
    """Weights [P, 28, length] that gather pixels under a triangle about as wide as one pixel of the glyph, or wider."""
    wanted = centres[:, None] + (np.arange(CROP) + 0.5 - CROP / 2) * scale[:, None]
    width = np.maximum(1, scale)[:, None, None]
    apart = np.abs(wanted[:, :, None] - np.arange(length) - 0.5) / width
    return (np.maximum(0, 1 - apart) / width).astype(np.float32)


def nearest_colour(rgb: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
    """The index in PALETTE of the nearest hue for colours [..., 3] on a backdrop [3], whatever their brightness."""

    def hue(colours):
        above = np.maximum(colours - backdrop, 0)
        return above / np.maximum(above.max(-1, keepdims=True), 1)

    palette = hue(np.array(list(PALETTE.values()), dtype=np.float32))
    return np.linalg.norm(hue(rgb)[..., None, :] - palette, axis=-1).argmin(-1)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A piece of ink of one colour: `voxels` int [V, 3] (frame, y, x), `boxes` fp [T, 4], not-a-number where absent."""

    colour: int
    voxels: np.ndarray
    boxes: np.ndarray


def _parts(clip: np.ndarray, ink: np.ndarray, backdrop: np.ndarray) -> list[_Part]:
    from scipy import ndimage

    nowhere = len(PALETTE)
    hues = np.full(ink.shape, nowhere, np.uint8)
    hues[ink] = nearest_colour(clip[ink], backdrop)
    amounts = np.bincount(hues.ravel(), minlength=nowhere)[:nowhere]
    parts = []
    for colour in np.flatnonzero(amounts >= len(clip)):
        labels, count = ndimage.label(hues == colour, structure=np.ones((3, 3, 3)))
        for label, window in zip(range(1, count + 1), ndimage.find_objects(labels), strict=True):
            voxels = np.argwhere(labels[window] == label) + [edge.start for edge in window]
            if len(voxels) >= len(clip):
                parts.append(_Part(colour=int(colour), voxels=voxels, boxes=_boxes(voxels, len(clip))))
    # A clip of noise has thousands; the digits are among the largest.
    return sorted(parts, key=lambda part: -len(part.voxels))[:_MOST_PARTS]


def _boxes(voxels: np.ndarray, length: int) -> np.ndarray:
    """Boxes [T, 4] of voxels that are in the order of their frames."""
    boxes = np.full((length, 4), np.nan)
    frames, starts = np.unique(voxels[:, 0], return_index=True)
    places = voxels[:, :0:-1]
    boxes[frames, :2] = np.minimum.reduceat(places, starts)
    boxes[frames, 2:] = np.maximum.reduceat(places, starts) + 1
    return boxes


def _meeting(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """How two boxes [T, 4] stand to each other: the gap in pixels, and the share of the smaller that lies in the other.

    Medians over the frames that have both; where none has, between the frames nearest in time.
    """
    frames_a, frames_b = (np.flatnonzero(~np.isnan(boxes[:, 0])) for boxes in (a, b))
    both = np.intersect1d(frames_a, frames_b)
    if len(both) == 0:
        apart = np.abs(frames_a[:, None] - frames_b)
        i, j = np.unravel_index(apart.argmin(), apart.shape)
        a, b = a[frames_a[i], None], b[frames_b[j], None]
    else:
        a, b = a[both], b[both]
    shared = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    smaller = np.minimum(np.prod(a[:, 2:] - a[:, :2], axis=1), np.prod(b[:, 2:] - b[:, :2], axis=1))
    return float(np.median(-shared.min(1))), float(np.median(np.prod(np.maximum(shared, 0), axis=1) / smaller))


def _joined(parts: list[_Part], shape: tuple[int, ...], unit: float) -> list[np.ndarray]:
    """Masks bool [T, S, S] of the digits that the parts make up."""
    belongs = np.arange(len(parts))
    for i, j in itertools.combinations(range(len(parts)), 2):
        gap, shared = _meeting(parts[i].boxes, parts[j].boxes)
        if shared > 0.3 or (parts[i].colour == parts[j].colour and gap < 4.2 * unit):
            belongs[belongs == belongs[j]] = belongs[i]
    whole = [_merge([parts[i] for i in np.flatnonzero(belongs == group)], shape) for group in np.unique(belongs)]
    digits = [group for group in whole if _length(group) >= _SHORTEST_DIGIT * unit]
    masks = []
    for digit in digits:
        mask = np.zeros(shape, dtype=bool)
        mask[tuple(digit.voxels.T)] = True
        masks.append(mask)
    for fragment in (group for group in whole if _length(group) < _SHORTEST_DIGIT * unit):
        strangeness = [
            _meeting(fragment.boxes, digit.boxes)[0] + 6 * unit * (fragment.colour != digit.colour) for digit in digits
        ]
        if strangeness and min(strangeness) < 8 * unit:
            masks[int(np.argmin(strangeness))][tuple(fragment.voxels.T)] = True
    return masks


def _merge(parts: list[_Part], shape: tuple[int, ...]) -> _Part:
    largest = max(parts, key=lambda part: len(part.voxels))
    voxels = np.concatenate([part.voxels for part in parts])
    voxels = voxels[np.argsort(voxels[:, 0], kind="stable")]
    return _Part(colour=largest.colour, voxels=voxels, boxes=_boxes(voxels, shape[0]))


def _length(part: _Part) -> float:
    """The longer side of the box, the median over the frames."""
    sides = part.boxes[:, 2:] - part.boxes[:, :2]
    return float(np.nanmedian(sides.max(1)))


def _track(clip: np.ndarray, value: np.ndarray, mask: np.ndarray, backdrop: np.ndarray) -> Track:
    from scipy import ndimage

    full = np.percentile(value[mask], 75)
    core = mask & (value >= full)
    colour = list(PALETTE)[int(nearest_colour(clip[core].mean(0), backdrop))]
    # Two pixels more than the mask take in the soft edges of the strokes; digits are further apart than that.
    around = ndimage.binary_dilation(mask, np.ones((1, 3, 3)), iterations=2)
    ink = around * np.clip((value - _DARKEST_INK) / (full - _DARKEST_INK), 0, 1)
    frames = np.flatnonzero(mask.any(axis=(1, 2)))
    ink = ink[frames]
    weight = ink.sum((1, 2))
    places = np.arange(clip.shape[1]) + 0.5
    centres = np.stack([ink.sum(1) @ places, ink.sum(2) @ places], axis=1) / weight[:, None]
    boxes = _boxes(np.argwhere(mask), len(clip))[frames]
    crops = glyph_crops(ink)
    return Track(colour=colour, frames=frames, boxes=boxes, centres=centres, crops=crops, area=mask.sum() / len(frames))
