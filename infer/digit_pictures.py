"""Pictures of standing digits: handwritten glyphs in colour, one or two of each kind, placed as a caption says. Numpy.

Shapes: S side of the picture in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from infer.digit_grammar import Digit, Scene, caption, random_picture
from infer.moving_digits import (
    JITTER,
    SIDE_ALONE,
    SIDE_PAIRED,
    Placement,
    background,
    ink_box,
    load_digits,
    near_middle,
    paint,
)

SIZE = 128
CLOSE_UP = 64
_MARGIN = 3.5  # round a digit's ink
_BORDER_SHIFT = 6.0  # how far the border between two halves of a picture may lie from the middle

Cell = tuple[np.ndarray, np.ndarray]  # the lowest and the highest (x, y) of a part of the picture


def each_digit(scene: Scene) -> list[Digit]:
    """The digits of a scene one by one: a kind that is there twice comes twice."""
    return [digit for digit in scene.digits for _ in range(digit.count)]


def choose_glyphs(scene: Scene, split: str, rng: np.random.Generator, half: int | None = None) -> list[np.ndarray]:
    """One handwritten glyph [28, 28] of the split for each digit; `half` 0 or 1 takes every second glyph only."""
    digits = load_digits(split)
    among = slice(None) if half is None else slice(half, None, 2)
    chosen = [rng.choice(np.flatnonzero(digits.labels == digit.value)[among]) for digit in each_digit(scene)]
    return [digits.images[index] for index in chosen]


def render_picture(
    scene: Scene, glyphs: Sequence[np.ndarray], rng: np.random.Generator, size: int = SIZE
) -> np.ndarray:
    """Draws a scene with one glyph [28, 28] for each of `each_digit`: uint8 [S, S, 3].

    The kinds lie in two halves of the picture as their relation says, two digits of a kind in two quarters, each near
    the middle of its part; no two touch. Digits are 36 to 52 pixels long whatever the `size`, so that 64 pixels are a
    close-up that holds one.
    Places, sizes and the background's look are drawn from `rng`.
    """
    boxes = [ink_box(glyph) for glyph in glyphs]
    sides = SIDE_ALONE if len(glyphs) == 1 else SIDE_PAIRED
    canvas = background(scene.background, rng, SIZE)[None, :size, :size]
    for digit, glyph, box, cell in zip(each_digit(scene), glyphs, boxes, _cells(scene, rng, size), strict=True):
        scale = rng.uniform(*sides) / box[1].max()
        border = _MARGIN + box[1] * scale / 2
        centre = near_middle(cell[0] + border, cell[1] - border, rng, JITTER)
        paint(canvas, digit, glyph, box, Placement(centre=centre, travel=np.zeros(2), scale=scale))
    return (canvas[0] + 0.5).astype(np.uint8)


def _cells(scene: Scene, rng: np.random.Generator, size: int) -> list[Cell]:
    """The part of the picture that each digit stands in."""
    whole = np.zeros(2), np.full(2, float(size))
    if scene.relation is None:
        return _parts(whole, scene.digits[0].count, int(rng.integers(2)), rng)
    axis = 1 if scene.relation in ("above", "below") else 0
    halves = _parts(whole, 2, axis, rng)
    if scene.relation in ("below", "right of"):
        halves.reverse()
    return [
        cell
        for digit, half in zip(scene.digits, halves, strict=True)
        for cell in _parts(half, digit.count, 1 - axis, rng)
    ]


def _parts(cell: Cell, count: int, axis: int, rng: np.random.Generator) -> list[Cell]:
    if count == 1:
        return [cell]
    low, high = cell
    border = (low[axis] + high[axis]) / 2 + rng.uniform(-_BORDER_SHIFT, _BORDER_SHIFT)
    first_high, second_low = high.copy(), low.copy()
    first_high[axis] = second_low[axis] = border
    return [(low, first_high), (second_low, high)]


def make_pictures(
    seed: int, indices: Sequence[int], split: str, size: int = SIZE
) -> tuple[np.ndarray, list[str], list[Scene]]:
    """Pictures uint8 [B, S, S, 3], captions and scenes; picture `i` depends on `seed`, `i`, split and size alone.

    At 64 pixels every scene is of one digit.
    """
    pictures, captions, scenes = [], [], []
    for index in indices:
        rng = np.random.default_rng([seed, index])
        scene = random_picture(rng)
        if size == CLOSE_UP:
            scene = close_up(scene)
        captions.append(caption(scene, rng, of_picture=True))
        pictures.append(render_picture(scene, choose_glyphs(scene, split, rng), rng, size))
        scenes.append(scene)
    return np.stack(pictures), captions, scenes


def close_up(scene: Scene) -> Scene:
    """The first digit of a scene, alone on its background."""
    first = scene.digits[0]
    return Scene(digits=(Digit(value=first.value, colour=first.colour),), background=scene.background)
