"""What a load test asks of a server: which models, shapes and qualities, when, how, and which of it is given up."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dit_jax.config import UserError
from infer.digit_grammar import all_captions_sample, all_picture_captions_sample
from infer.load_bad import BAD

Way = Literal["whole", "url", "stream", "poll", "events"]
IMAGE_WAYS: Sequence[Way] = ("whole", "whole", "url", "stream")
VIDEO_WAYS: Sequence[Way] = ("poll", "events")
EXTRAS: Mapping[Way, Mapping[str, Any]] = {
    "stream": {"stream": True, "partial_images": 2},
    "url": {"response_format": "url"},
}
FORMATS = ("png", "jpeg", "webp")
BUILT_IN = 32  # prompts of each kind, so that some come again
SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Something that a server offers: a model at a shape and a quality.

    image_input  never, optional or always
    """

    model: str
    shape: str
    quality: str
    video: bool
    image_input: str = "never"

    def __str__(self) -> str:
        return f"{self.model} {self.shape} {self.quality}"

    @property
    def size(self) -> str:
        return "x".join(self.shape.split("x")[:2])

    @property
    def frames(self) -> int:
        return int([*self.shape.split("x"), "1"][2])


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request that is to be sent.

    due        seconds from the start
    way        how its result is had
    form       whether a video is asked for by multipart
    reference  whether a picture to begin with goes along
    forget     whether a video is deleted once it was fetched
    patience   it is given up after this share of the time that its kind usually takes; None: never
    bad        how it is malformed, a name of `BAD`; None: not at all
    """

    due: float
    kind: Kind
    prompt: str
    seed: int
    way: Way
    form: bool = False
    reference: bool = False
    forget: bool = False
    patience: float | None = None
    bad: str | None = None

    def body(self) -> dict[str, Any]:
        """What a sound request says."""
        kind = self.kind
        told: dict[str, Any] = {"model": kind.model, "prompt": self.prompt, "size": kind.size}
        told |= {"quality": kind.quality, "seed": self.seed}
        if kind.video:
            return told | {"frames": kind.frames}
        return {**told, "output_format": FORMATS[self.seed % len(FORMATS)], **EXTRAS.get(self.way, {})}


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of all requests, how many are given up and how many are malformed."""

    cancels: float = 0.0
    bad: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Kinds with their weights, and prompts of videos and of pictures."""

    kinds: Sequence[Kind]
    weights: Sequence[float]
    video_prompts: Sequence[str]
    image_prompts: Sequence[str]

    def draw(self, rng: random.Random, due: float = 0.0, shares: Shares = Shares()) -> Arrival:
        """A request."""
        (kind,) = rng.choices(self.kinds, self.weights)
        fate = rng.random()
        bad, cancelled = fate < shares.bad, shares.bad <= fate < shares.bad + shares.cancels
        return Arrival(
            due=due,
            kind=kind,
            prompt=rng.choice(self.video_prompts if kind.video else self.image_prompts),
            seed=rng.randrange(SEEDS),
            way=rng.choice(VIDEO_WAYS if kind.video else IMAGE_WAYS),
            form=rng.random() < 0.25,
            reference=kind.image_input == "always" or (kind.image_input == "optional" and rng.random() < 0.5),
            forget=rng.random() < 0.25,
            patience=rng.random() if cancelled else None,
            bad=rng.choice(tuple(BAD)) if bad else None,
        )

    def arrivals(self, rng: random.Random, rate: float, seconds: float, shares: Shares) -> list[Arrival]:
        """A Poisson process: `rate` requests a second, for so many seconds."""
        drawn, due = [], rng.expovariate(rate)
        while due < seconds:
            drawn.append(self.draw(rng, due, shares))
            due += rng.expovariate(rate)
        return drawn


def read_mix(models: Any, weights: str | None, prompts: Sequence[str] | None, seed: int) -> Mix:
    """The mix of what `/v1/models` lists, every kind alike or as `weights` says; UserError for another list or kinds.

    weights  MODEL[:SHAPE[:QUALITY]]=WEIGHT, joined by commas: of each kind that this names; the later one counts
    """
    try:
        kinds = [kind for model in models["data"] for kind in _kinds(model)]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"the server's list of models has no shapes and qualities ({error!r}): expected one of dit-serve; name "
            "such a server"
        ) from None
    if not kinds:
        raise UserError("the server lists no model: expected at least one; start it with --model")
    weighted = dict.fromkeys(kinds, 1.0) if weights is None else _weighted(kinds, weights)
    return Mix(
        kinds=list(weighted),
        weights=list(weighted.values()),
        video_prompts=prompts or all_captions_sample(BUILT_IN, seed),
        image_prompts=prompts or all_picture_captions_sample(BUILT_IN, seed),
    )


def _kinds(model: Mapping[str, Any]) -> list[Kind]:
    video, image_input = model["kind"] == "video", model.get("image_input", "never")
    return [
        Kind(model=model["id"], shape=shape, quality=quality, video=video, image_input=image_input)
        for shape in model["shapes"]
        for quality in model["qualities"]
    ]


def _weighted(kinds: Sequence[Kind], text: str) -> dict[Kind, float]:
    weights: dict[Kind, float] = {}
    for entry in text.split(","):
        name, _, number = entry.strip().rpartition("=")
        parts = name.split(":")
        found = [kind for kind in kinds if [kind.model, kind.shape, kind.quality][: len(parts)] == parts]
        if not found or len(parts) > 3:
            offered = ", ".join(":".join((kind.model, kind.shape, kind.quality)) for kind in kinds)
            raise UserError(
                f"--mix {entry!r} names nothing that is served: expected MODEL[:SHAPE[:QUALITY]]=WEIGHT of {offered}"
            )
        weights |= dict.fromkeys(found, _weight(entry, number))
    weights = {kind: weight for kind, weight in weights.items() if weight > 0}
    if not weights:
        raise UserError(f"--mix {text!r} leaves nothing to ask for: expected a weight above 0; give one")
    return weights


def _weight(entry: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise UserError(f"--mix {entry!r} has no weight: expected a number from 0 after =; write one")
    return weight
