"""From what the API is asked to what a pipeline runs: only what is compiled, or one sentence that says what is."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from dit_jax.config import UserError
from infer.api_types import ImageRequest, VideoRequest
from infer.buckets import Buckets, Frame, ModelBuckets
from infer.pipeline import Pipeline
from infer.request import SEEDS, Job, Request, fill, parse_size


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that can be served: the model, its samples, and the quality that it amounts to."""

    model: str
    job: Job
    quality: str
    fps: int

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT, as the API writes it."""
        return "x".join(map(str, self.job.size))


def asked_of(
    request: ImageRequest | VideoRequest,
    pipelines: Mapping[str, Pipeline],
    buckets: Buckets,
    reference: Image.Image | None = None,
) -> Asked:
    """What is to be run; UserError for what this server does not serve."""
    videos = isinstance(request, VideoRequest)
    model = _model(request.model, pipelines, videos)
    pipe, offered = pipelines[model], buckets[model]
    offer = offered.offer(request.quality, request.plan, request.num_inference_steps)
    fps = (request.fps if isinstance(request, VideoRequest) else None) or pipe.defaults.fps
    shape = _shape(request, pipe, offered, fps)
    offered.check(shape)
    count = (request.n or 1) if isinstance(request, ImageRequest) else 1
    seed = secrets.randbelow(SEEDS - count + 1) if request.seed is None else request.seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a plan that needs Euler gets it
        job = pipe.prepare(
            Request(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt or "",
                image=reference,
                size=shape.size,
                frames=shape.frames,
                steps=offer.steps,
                images_per_prompt=count,
                seed=seed,
                plan=offer.plan,
                guidance=request.guidance_scale,
            )
        )
        _check_guidance(pipe, job)
    quality = next(name for name, one in offered.offers.items() if one == offer)
    return Asked(model=model, job=job, quality=quality, fps=fps)


def _model(name: str | None, pipelines: Mapping[str, Pipeline], videos: bool) -> str:
    kind = "videos" if videos else "images"
    able = [known for known, pipe in pipelines.items() if pipe.defaults.video == videos]
    if not able:
        raise UserError(f"this server has no model that makes {kind}: expected one of {', '.join(pipelines)}")
    if name is None:
        return able[0]
    found = [known for known in able if name in (known, pipelines[known].name)]
    if not found:
        served = ", ".join(pipelines[known].name for known in able)
        raise UserError(f"no model {name!r} makes {kind} here: expected one of {served}; see /v1/models")
    return found[0]


def _shape(request: ImageRequest | VideoRequest, pipe: Pipeline, offered: ModelBuckets, fps: int) -> Frame:
    usual = offered.usual(pipe)
    if request.size not in (None, "auto"):
        usual = replace(usual, width=(size := parse_size(request.size))[0], height=size[1])
    if not isinstance(request, VideoRequest) or (request.frames is None and request.seconds is None):
        return usual
    if request.frames is not None and request.seconds is not None:
        raise UserError("frames and seconds were both given: expected one of them; leave the other out")
    time = pipe.limits.time
    frames = request.frames or time * round((request.seconds or 0) * fps / time) + 1
    return replace(usual, frames=frames)


def _check_guidance(pipe: Pipeline, job: Job) -> None:
    """Guidance takes a second branch, so programs have it or not."""
    usual = fill(Request(prompt="x", steps=job.steps, plan=job.plan), pipe.defaults, pipe.limits.scales)
    scale, compiled = (max(one.guidance_scales) if pipe.defaults.video else one.true_cfg for one in (job, usual))
    if (scale > 1) != (compiled > 1):
        raise UserError(
            f"guidance_scale is {scale:g}: expected {'more than 1' if compiled > 1 else '0 to 1'}, since guidance is "
            f"{'on' if compiled > 1 else 'off'} in what is compiled; leave it out"
        )
