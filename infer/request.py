"""What one call of a pipeline is asked for, checked before anything runs."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from dit_jax.config import UserError
from dit_jax.methods.plan import DENSE, FEW_STEPS, JOINT, Plan, parse_plan
from dit_jax.sampling.solvers import SOLVERS

OF_SAMPLES = ("prompts", "negative_prompts", "seeds", "images", "last_images", "latents")
SEEDS = 2**32  # a threefry key keeps no more of a seed

Given = Literal["never", "optional", "always"]
Guidance = float | tuple[float, float]  # one scale, or those of the (high, low) noise expert
Scales = Literal["guidance", "both", "true_cfg"]
"""Which scales a model has: `guidance` alone, which is real guidance (Wan); one that it is told and `true_cfg` of real
guidance (FLUX dev); or `true_cfg` alone, of which `guidance` is another name (FLUX schnell)."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a model is run with unless the request says otherwise; `generation_defaults.json` in the model's folder.

    guidance  scale of real guidance (Wan), or the one that the model is told (FLUX dev); a model of two experts may
              have two, (high, low)
    true_cfg  scale of real guidance of FLUX; 1 turns it off
    video     whether it makes videos
    grammar   a name of GRAMMARS that prompts keep to, so that a word outside it deserves a warning
    """

    size: tuple[int, int] = (832, 480)
    frames: int = 81
    steps: int = 50
    guidance: Guidance = 5.0
    true_cfg: float = 1.0
    solver: str = "unipc"
    fps: int = 16
    video: bool = True
    grammar: str | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller asks for; None leaves the choice to the model's defaults.

    size               (width, height) in pixels
    image, last_image  the first and last frame, for an image-to-video model: one for each prompt, or one for all
    guidance           the model's guidance scale: the one that it is told (FLUX dev) or, if it is told none, of real
                       guidance; (high, low) for the two experts of Wan 2.2, where one number serves both
    true_cfg           FLUX: scale of real guidance against `negative_prompt`
    shift              constant shift of the noise levels in place of the scheduler's own (of FLUX dev, of its dynamic
                       one); diffusers' flow_shift
    images_per_prompt  how many samples of each prompt, next to each other
    seed               of the first sample's noise; sample i has seed + i
    latents            starting noise in its place: fp32 [B, T, Y, X, C], in the sampler's normalised units
    plan               methods joined by +, such as hsa:50 (`dit_jax/methods/plan.py`)
    """

    prompt: str | list[str]
    negative_prompt: str = ""
    image: Image.Image | list[Image.Image] | None = None
    last_image: Image.Image | list[Image.Image] | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: Guidance | None = None
    true_cfg: float | None = None
    shift: float | None = None
    images_per_prompt: int = 1
    solver: str | None = None
    seed: int = 0
    latents: np.ndarray | None = None
    plan: str | Plan = DENSE


@dataclass(frozen=True, kw_only=True)
class Job:
    """Samples with every choice made: each has a prompt, a negative prompt, a seed, first and last image or none.

    guidance, true_cfg  the same number for a model that has `true_cfg` alone
    """

    prompts: list[str]
    negative_prompts: list[str]
    seeds: list[int]
    size: tuple[int, int]
    frames: int
    steps: int
    guidance: Guidance
    true_cfg: float
    solver: str
    shift: float | None = None
    images: list[Image.Image] | None = None
    last_images: list[Image.Image] | None = None
    latents: np.ndarray | None = None
    plan: Plan = field(default_factory=Plan)

    def describe(self) -> dict[str, Any]:
        """The job without images and latents, as JSON can hold it."""
        told = (
            "prompts",
            "negative_prompts",
            "seeds",
            "size",
            "frames",
            "steps",
            "guidance",
            "true_cfg",
            "solver",
            "shift",
        )
        return {name: getattr(self, name) for name in told} | {"plan": str(self.plan)}

    def single(self, index: int) -> Job:
        """The job of one of its samples."""
        one = slice(index, index + 1)
        return replace(
            self,
            prompts=self.prompts[one],
            negative_prompts=self.negative_prompts[one],
            seeds=self.seeds[one],
            images=None if self.images is None else self.images[one],
            last_images=None if self.last_images is None else self.last_images[one],
            latents=None if self.latents is None else self.latents[one],
        )

    def shared(self) -> Job:
        """What its samples have in common: the job without them."""
        nothing: dict[str, Any] = dict.fromkeys(OF_SAMPLES)
        return replace(self, **nothing)

    @property
    def guidance_scales(self) -> tuple[float, float]:
        """Guidance scales of the (high, low) noise expert."""
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)


def fill(request: Request, defaults: Defaults, scales: Scales) -> Job:
    """The request with its open choices taken from the defaults of a model with these scales."""
    prompts = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
    copies = request.images_per_prompt
    if not isinstance(copies, int) or copies < 1:
        raise UserError(f"images_per_prompt is {copies}: expected a whole number of at least 1")
    images, last_images = (_images(given, len(prompts), copies) for given in (request.image, request.last_image))
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    plan = request.plan if isinstance(request.plan, Plan) else parse_plan(request.plan)
    guidance, true_cfg = _scales(request, defaults, scales)

    def choice(name: str) -> Any:
        asked = getattr(request, name)
        return getattr(defaults, name) if asked is None else asked

    return Job(
        prompts=prompts,
        negative_prompts=[request.negative_prompt] * len(prompts),
        seeds=_seeds(request.seed, len(prompts)),
        size=choice("size"),
        frames=choice("frames"),
        steps=plan.steps if plan.steps and request.steps is None else choice("steps"),
        guidance=guidance,
        true_cfg=true_cfg,
        solver=_solver(plan, request.solver, defaults.solver),
        shift=request.shift,
        images=images,
        last_images=last_images,
        latents=request.latents,
        plan=plan,
    )


def _seeds(first: Any, count: int) -> list[int]:
    if not isinstance(first, int) or not 0 <= first <= SEEDS - count:
        raise UserError(
            f"seed is {first}: expected a whole number from 0 to {SEEDS - count} "
            f"(prompt i has seed + i, below 2**32); choose another seed"
        )
    return list(range(first, first + count))


def joined(jobs: Sequence[Job]) -> Job:
    """One job of the samples of several that are alike in all else; ValueError if they are not."""
    first = jobs[0]
    alike = [job.shared() for job in jobs]
    if any(job != alike[0] for job in alike):
        raise ValueError("jobs of one batch differ in more than their samples")

    def all_of(name: str) -> Any:
        parts = [getattr(job, name) for job in jobs]
        if parts[0] is None:
            return None
        return np.concatenate(parts) if name == "latents" else [one for part in parts for one in part]

    return replace(first, **{name: all_of(name) for name in OF_SAMPLES})


def _solver(plan: Plan, asked: str | None, usual: str) -> str:
    chosen = usual if asked is None else asked
    if plan.solver in (None, chosen):
        return chosen
    if asked is not None:
        raise UserError(f"plan {plan} works with the {plan.solver} solver alone, found {asked}: leave out --solver")
    warnings.warn(f"plan {plan} works with the {plan.solver} solver: it takes the place of {usual}", stacklevel=2)
    return plan.solver


def _images(given: Image.Image | list[Image.Image] | None, prompts: int, copies: int) -> list[Image.Image] | None:
    if given is None:
        return None
    images = [given] * prompts if isinstance(given, Image.Image) else given
    if len(images) != prompts:
        raise UserError(f"{len(images)} images came with {prompts} prompts: expected one for each, or one for all")
    return [image for image in images for _ in range(copies)]


def _scales(request: Request, defaults: Defaults, scales: Scales) -> tuple[Guidance, float]:
    """(guidance, true_cfg) of a model that has these."""
    asked = None if request.guidance is None else _guidance(request.guidance)
    guidance = defaults.guidance if asked is None else asked
    true_cfg = defaults.true_cfg if request.true_cfg is None else request.true_cfg
    if scales == "guidance" and request.true_cfg not in (None, 1):
        raise UserError(
            f"true_cfg is {request.true_cfg}: expected guidance in its place, which is real guidance in this model; "
            "say guidance"
        )
    if scales != "true_cfg" or isinstance(asked, tuple):
        return guidance, true_cfg
    if asked is not None and request.true_cfg not in (None, asked):
        raise UserError(
            f"guidance is {asked} and true_cfg {request.true_cfg}: expected one of them, since both are the scale of "
            "real guidance in this model, which is told none; leave one out"
        )
    real = true_cfg if asked is None else asked
    return real, real


def _guidance(asked: Any) -> Guidance:
    if isinstance(asked, int | float):
        return asked
    if isinstance(asked, Sequence) and len(asked) == 2 and all(isinstance(scale, int | float) for scale in asked):
        return asked[0], asked[1]
    raise UserError(f"guidance is {asked!r}: expected a number, or (high, low) for the experts of Wan 2.2")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model can be asked for.

    space       pixels that a latent cell (times the patch) covers
    time        frames that a latent frame covers
    image       whether a first frame is refused, may be given, or must be
    last_image  likewise a last frame
    experts     how many transformers take turns, and so may have a guidance scale of their own
    video       whether it makes videos
    scales      which guidance scales it has
    """

    space: int
    time: int
    image: Given = "never"
    last_image: Given = "never"
    experts: int = 1
    video: bool = True
    scales: Scales = "guidance"


def check(job: Job, limits: Limits) -> None:
    """Raises UserError for a job that the model cannot serve; warns of methods that it gains nothing by."""
    if not limits.video and job.frames != 1:
        raise UserError(f"{job.frames} frames were asked of a model that makes images: leave their number out")
    if not job.prompts or not all(text.strip() for text in job.prompts):
        raise UserError("the prompt is empty: expected a description of the picture; write one")
    if job.solver not in SOLVERS:
        raise UserError(f"unknown solver {job.solver!r}: expected one of {', '.join(SOLVERS)}")
    if not isinstance(job.steps, int) or job.steps < 1:
        raise UserError(f"steps is {job.steps}: expected a whole number of at least 1")
    plan = job.plan
    if plan.steps and job.steps != plan.steps:
        raise UserError(
            f"plan {plan} is for {plan.steps} steps, found {job.steps}: leave the steps out or change the plan"
        )
    _check_scales(job, limits.experts)
    _check_size(job.size, limits.space)
    if job.frames < 1 or (job.frames - 1) % limits.time:
        low = max(job.frames - 1, 0) // limits.time * limits.time + 1
        raise UserError(
            f"{job.frames} frames do not fit: expected {limits.time}·k + 1; "
            f"the nearest are {low} and {low + limits.time}"
        )
    _check_images(job, limits)
    if pointless := plan.pointless(job.steps):
        warnings.warn(
            f"{JOINT.join(pointless)} is pointless in a run of {job.steps} steps, which have too little in common: "
            f"leave it out, or ask for more than {FEW_STEPS}",
            stacklevel=2,
        )


def _check_images(job: Job, limits: Limits) -> None:
    if limits.image == "always" and job.images is None:
        raise UserError(
            "this model animates an image and none was given: pass one as image (--image FILE in a command)"
        )
    if limits.image == "never" and job.images is not None:
        raise UserError(
            f"an image was given to a text-to-{'video' if limits.video else 'image'} model: leave it out or "
            "choose an image-to-video model"
        )
    if limits.last_image == "always" and job.last_images is None:
        raise UserError(
            "this model draws between two images and one was given: pass the other as last_image (--last-image FILE in "
            "a command)"
        )
    if job.last_images is not None and (limits.last_image == "never" or job.frames == 1):
        raise UserError(
            "a last image was given where only a first one has a place: leave it out, ask for more frames, "
            "or choose a model that draws between two"
        )


def _check_scales(job: Job, experts: int) -> None:
    if isinstance(job.guidance, tuple) and experts == 1:
        raise UserError(
            f"guidance is {job.guidance}: expected one number for a model of one transformer; two are for the experts "
            "of Wan 2.2"
        )
    for name, scales in (("true_cfg", (job.true_cfg,)), ("guidance", job.guidance_scales)):
        for scale in scales:
            if not math.isfinite(scale) or scale < 0:
                raise UserError(f"{name} is {scale}: expected a number of at least 0 (1 turns guidance off)")
    if job.shift is not None and not 0 < job.shift < math.inf:
        raise UserError(f"shift is {job.shift}: expected a number above 0 (1 shifts nothing)")


def _check_size(size: tuple[int, int], multiple: int) -> None:
    if all(side > 0 and side % multiple == 0 for side in size):
        return
    nearest = "x".join(str(max(round(side / multiple), 1) * multiple) for side in size)
    raise UserError(
        f"size {size[0]}x{size[1]} does not fit: expected a width and height that {multiple} divides; "
        f"the nearest is {nearest}"
    )


def parse_guidance(text: str) -> Guidance:
    """`5` -> 5.0, `4,3` -> (4.0, 3.0)."""
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if len(scales) not in (1, 2):
        raise UserError(f"guidance {text!r} is not understood: expected a number such as 5, or two such as 4,3")
    return scales[0] if len(scales) == 1 else (scales[0], scales[1])


def parse_size(text: str) -> tuple[int, int]:
    """`832x480` -> (832, 480)."""
    sides = re.fullmatch("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text.lower())
    if sides is None:
        raise UserError(f"size {text[:40]!r} is not understood: expected WIDTHxHEIGHT such as 832x480")
    return int(sides[1]), int(sides[2])
