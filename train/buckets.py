"""The shapes that training data come in: a fixed list, so that a training step compiles once for each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from dit_jax.config import UserError
from infer.request import Defaults, Limits

RATIOS = tuple(Fraction(*sides) for sides in ((16, 9), (4, 3), (1, 1), (3, 4), (9, 16)))
SIZES = {"480p": (832, 480), "720p": (1280, 720), "1024": (1024, 1024)}
"""Sets of buckets by name -> a size whose area they have; `model` is the model's own."""
OWN = "model"


@dataclass(frozen=True, kw_only=True, order=True)
class Bucket:
    """One shape: `frames` frames (1 for a picture) of `width` x `height` pixels."""

    width: int
    height: int
    frames: int

    @property
    def name(self) -> str:
        """As the command line has it: 832x480x81."""
        return f"{self.width}x{self.height}x{self.frames}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height


def usual_buckets(
    defaults: Defaults, limits: Limits, *, video: bool, size: tuple[int, int] | None = None
) -> tuple[Bucket, ...]:
    """The usual aspect ratios at about the area of `size`; videos in the model's length and in half of it.

    size  None for the model's own, which then stands for the ratio nearest to it, and turned for the inverse
    """
    width, height = size or defaults.size
    step = limits.space
    sizes = {ratio: _sides(width * height, ratio, step) for ratio in RATIOS}
    if width % step == 0 and height % step == 0:
        nearest = min(RATIOS, key=lambda ratio: abs(math.log(ratio * height / width)))
        sizes |= {1 / nearest: (height, width), nearest: (width, height)}
    lengths = [1]
    if video:
        half = (defaults.frames - 1) // 2 // limits.time * limits.time + 1
        lengths = sorted({defaults.frames, half}, reverse=True)
    shapes = [(w, h, frames) for frames in lengths for w, h in sizes.values()]
    return tuple(Bucket(width=w, height=h, frames=frames) for w, h, frames in dict.fromkeys(shapes))


def _sides(area: int, ratio: Fraction, step: int) -> tuple[int, int]:
    wanted = math.sqrt(area * ratio), math.sqrt(area / ratio)
    width, height = (max(round(side / step), 1) * step for side in wanted)
    return width, height


def parse_buckets(text: str, defaults: Defaults, limits: Limits, *, video: bool) -> tuple[Bucket, ...]:
    """`model`, a name of SIZES, or shapes joined by commas such as 832x480x81,480x832x81 (of pictures: 1024x1024).

    Raises UserError for a shape that is not understood, or that the model has no latents for.
    """
    if text == OWN or text in SIZES:
        return usual_buckets(defaults, limits, video=video, size=SIZES.get(text))
    buckets = tuple(_parse(shape.strip(), limits, video) for shape in text.split(","))
    if len(set(buckets)) < len(buckets):
        raise UserError(f"--buckets {text} has a shape twice: expected each once; leave one out")
    return buckets


def _parse(text: str, limits: Limits, video: bool) -> Bucket:
    sides = [int(side) for side in text.lower().split("x") if side.isdigit()]
    wanted = "WIDTHxHEIGHTxFRAMES such as 832x480x81" if video else "WIDTHxHEIGHT such as 1024x1024"
    if len(sides) != text.lower().count("x") + 1 or len(sides) not in ((3,) if video else (2, 3)):
        raise UserError(f"bucket {text!r} is not understood: expected {wanted}, or one of {', '.join((OWN, *SIZES))}")
    width, height, frames = (*sides, 1)[:3]
    if not all(side > 0 and side % limits.space == 0 for side in (width, height)):
        raise UserError(f"bucket {text} does not fit the model: expected sides that {limits.space} divides; change it")
    if frames < 1 or (frames - 1) % limits.time or (frames > 1 and not video):
        length = f"{limits.time}·k + 1 frames" if video else "one frame, for pictures"
        raise UserError(f"bucket {text} does not fit the model: expected {length}; change it")
    return Bucket(width=width, height=height, frames=frames)


def choose_bucket(buckets: Sequence[Bucket], size: tuple[float, float], frames: int) -> Bucket | None:
    """The bucket of a medium of `size` with so many frames; None where it has too few for any.

    Nearest in aspect ratio, so that the least is cropped; of those the longest; of those the largest that enlarges
    nothing, or else the smallest.
    """

    def preference(bucket: Bucket) -> tuple[float, int, bool, float]:
        crop = abs(math.log(bucket.width / bucket.height * size[1] / size[0]))
        scale = max(bucket.width / size[0], bucket.height / size[1])
        return crop, -bucket.frames, scale > 1, abs(math.log(scale))

    return min((bucket for bucket in buckets if bucket.frames <= frames), key=preference, default=None)
