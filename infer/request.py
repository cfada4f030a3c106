"""What one call of a pipeline is asked for, checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from dit_jax.config import UserError
from dit_jax.sampling.solvers import SOLVERS


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a model is run with unless the request says otherwise; `generation_defaults.json` in the model's folder."""

    size: tuple[int, int] = (832, 480)
    frames: int = 81
    steps: int = 50
    guidance: float = 5.0
    fps: int = 16
    grammar: str | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call: `size` is (width, height) in pixels, `seed` that of the first prompt (the next has seed + 1, and so on).

    `latents` replaces the starting noise: fp32 [B, T, Y, X, C], in the sampler's normalised units.
    """

    prompt: str | list[str]
    negative_prompt: str = ""
    image: Image.Image | list[Image.Image] | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    solver: str = "unipc"
    seed: int = 0
    latents: np.ndarray | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    def filled(self, defaults: Defaults) -> Request:
        """This request with every open choice taken from the model's defaults."""
        return replace(
            self,
            size=self.size or defaults.size,
            frames=self.frames or defaults.frames,
            steps=self.steps or defaults.steps,
            guidance=defaults.guidance if self.guidance is None else self.guidance,
        )


@dataclass(frozen=True, kw_only=True)
class Strides:
    """Pixels a latent cell (times the patch) covers, and frames a latent frame covers."""

    space: int
    time: int


def check(request: Request, strides: Strides, takes_image: bool) -> None:
    """Raises UserError for a filled request that the model cannot serve."""
    assert request.size is not None and request.frames is not None and request.guidance is not None
    if not request.prompts or not all(text.strip() for text in request.prompts):
        raise UserError("the prompt is empty: expected a description of the video; pass one with --prompt")
    if request.solver not in SOLVERS:
        raise UserError(f"unknown solver {request.solver!r}: expected one of {', '.join(SOLVERS)}")
    if not isinstance(request.steps, int) or request.steps < 1:
        raise UserError(f"steps is {request.steps}: expected a whole number of at least 1")
    if not math.isfinite(request.guidance) or request.guidance < 0:
        raise UserError(f"guidance is {request.guidance}: expected a number of at least 0 (1 turns guidance off)")
    _check_size(request.size, strides.space)
    if request.frames < 1 or (request.frames - 1) % strides.time:
        low = max(request.frames - 1, 0) // strides.time * strides.time + 1
        raise UserError(
            f"{request.frames} frames do not fit: expected {strides.time}·k + 1; the nearest are {low} and {low + strides.time}"
        )
    if takes_image and request.image is None:
        raise UserError("this model animates an image and none was given: pass one with --image")
    if not takes_image and request.image is not None:
        raise UserError("an image was given to a text-to-video model: leave out --image or choose an image-to-video model")


def _check_size(size: tuple[int, int], multiple: int) -> None:
    if all(side > 0 and side % multiple == 0 for side in size):
        return
    nearest = "x".join(str(max(round(side / multiple), 1) * multiple) for side in size)
    raise UserError(
        f"size {size[0]}x{size[1]} does not fit: width and height must be multiples of {multiple}; the nearest is {nearest}"
    )


def parse_size(text: str) -> tuple[int, int]:
    """`832x480` -> (832, 480)."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise UserError(f"size {text!r} is not understood: expected WIDTHxHEIGHT such as 832x480")
    return int(width), int(height)


def describe(request: Request) -> dict[str, Any]:
    """The request as it goes into a file's metadata."""
    return {
        "prompt": request.prompt, "negative_prompt": request.negative_prompt, "size": request.size, "frames": request.frames,
        "steps": request.steps, "guidance": request.guidance, "solver": request.solver, "seed": request.seed,
    }  # fmt: skip
