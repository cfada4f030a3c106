"""What the server is asked and answers, in the words of OpenAI's API for images and videos."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PROMPT = 4000  # characters
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class _Request(BaseModel):
    """What images and videos are both asked with; the last five fields are this server's own."""

    model_config = ConfigDict(extra="forbid", str_max_length=PROMPT, protected_namespaces=())

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    size: Annotated[str, Field(examples=["832x480"])] | None = None
    quality: str | None = None
    user: str | None = None
    seed: Seed | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Scale | None = None
    negative_prompt: str | None = None
    plan: str | None = None


class ImageRequest(_Request):
    """`POST /v1/images/generations`."""

    n: Annotated[int, Field(ge=1, le=10)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: str | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=100)] | None = None
    stream_progress: bool | None = None


class VideoRequest(_Request):
    """`POST /v1/videos`; a picture to begin with comes as multipart, in `input_reference`."""

    seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] | None = None
    frames: Annotated[int, Field(ge=1, le=100_000)] | None = None
    fps: Annotated[int, Field(ge=1, le=240)] | None = None


class Video(BaseModel):
    """A job that makes a video."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    started_at: int | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    size: str
    seconds: str
    frames: int
    fps: int
    seed: int
    plan: str
    quality: str | None = None
    remixed_from_video_id: None = None
    error: dict[str, str] | None = None
    timings: dict[str, float] | None = None
    notes: list[str] | None = None


class Error(BaseModel):
    """What is wrong with a request, as OpenAI's clients expect it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(BaseModel):
    error: Error


class Picture(BaseModel):
    """An image of an answer."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class Pictures(BaseModel):
    """The answer of `POST /v1/images/generations`."""

    created: int
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: str
    quality: str
    size: str
    plan: str
    usage: dict[str, Any]
    timings: dict[str, float]
    notes: list[str] | None = None
