"""What a server compiles before it is ready, and so all that it can be asked for: shapes, plans, steps and batches."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dit_jax.config import UserError
from dit_jax.methods.plan import JOINT, Plan, parse_plan
from infer.pipeline import Pipeline
from infer.request import Job, Request, parse_size

PRESETS = Path(__file__).parent / "presets"
NEAREST = 3


@dataclass(frozen=True, order=True)
class Frame:
    """A shape of pictures or videos."""

    width: int
    height: int
    frames: int = 1

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames > 1 else "")

    def away(self, other: Frame) -> float:
        """How far another shape is: the largest ratio of their sides and lengths."""
        mine, its = (self.width, self.height, self.frames), (other.width, other.height, other.frames)
        return max(max(a / b, b / a) for a, b in zip(mine, its, strict=True))


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A plan that is served, with its number of steps."""

    plan: Plan
    steps: int


@dataclass(frozen=True, kw_only=True)
class ModelBuckets:
    """What is served of one model.

    shapes   width, height and frames
    offers   by quality
    batches  how many samples run together, in ascending order; the smallest that holds them is taken
    """

    shapes: tuple[Frame, ...]
    offers: Mapping[str, Offer]
    batches: tuple[int, ...] = (1,)

    def jobs(self, pipe: Pipeline) -> Iterator[Job]:
        """A job of every program: each shape, plan and batch, with a picture to begin with, without, or either."""
        grey, given = Image.new("RGB", (8, 8), "grey"), pipe.limits.image
        if pipe.limits.last_image == "always":
            raise UserError(
                f"{pipe.name} draws between two pictures: expected a model that begins with one at most, since "
                "requests hold no second; serve another"
            )
        starts: list[Image.Image | None] = [] if given == "always" else [None]
        starts += [] if given == "never" else [grey]
        for shape, offer, batch, image in itertools.product(self.shapes, self.offers.values(), self.batches, starts):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a plan that needs Euler gets it
                yield pipe.prepare(
                    Request(
                        prompt=["warming up"] * batch,
                        image=image,
                        size=shape.size,
                        frames=shape.frames,
                        steps=offer.steps,
                        plan=offer.plan,
                    )
                )

    def usual(self, pipe: Pipeline) -> Frame:
        """The shape of requests that name none: the model's own, or the first that is served."""
        own = Frame(*pipe.defaults.size, pipe.defaults.frames if pipe.defaults.video else 1)
        return own if own in self.shapes else self.shapes[0]

    def batch(self, samples: int) -> int:
        """The batch that so many samples run in."""
        return next(batch for batch in self.batches if batch >= samples)

    def offer(self, quality: str | None, plan: str | None, steps: int | None) -> Offer:
        """What a request asks for: a plan, or a quality, or neither; UserError for what is not served."""
        if plan is not None:
            wanted = JOINT.join(word.strip() for word in plan.split(JOINT))  # not parsed: a plan may name a file
            found = [offer for offer in self.offers.values() if str(offer.plan) == wanted]
        elif quality in (None, "auto"):
            found = [next(iter(self.offers.values()))]
        else:
            found = [offer for name, offer in self.offers.items() if name == quality]
        told = ", ".join(f"{name} ({one.plan}, {one.steps} steps)" for name, one in self.offers.items())
        if not found:
            name, value = ("plan", plan) if plan is not None else ("quality", quality)
            raise UserError(f"{name} {value!r} is not served: expected one of {told}; ask for one of these")
        if steps is not None and steps not in [offer.steps for offer in found]:
            raise UserError(
                f"{steps} steps of {found[0].plan} are not served: expected {found[0].steps}; leave out "
                f"num_inference_steps, or ask for one of {told}"
            )
        return next(offer for offer in found if steps in (None, offer.steps))

    def check(self, shape: Frame) -> None:
        """UserError for a shape that is not served; it names the nearest."""
        if shape not in self.shapes:
            nearest = sorted(self.shapes, key=shape.away)[:NEAREST]
            raise UserError(
                f"{shape} is not served: expected one of the shapes that are compiled; the nearest are "
                f"{', '.join(map(str, nearest))}"
            )


Buckets = Mapping[str, ModelBuckets]


def read_buckets(source: str, models: Sequence[str]) -> Buckets:
    """Buckets of these models from a JSON file or the name of a preset; UserError for what they do not hold."""
    path = PRESETS / f"{source}.json" if "/" not in source and not source.endswith(".json") else Path(source)
    known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.json")))
    try:
        told = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"cannot read buckets from {source!r} ({error.strerror}): expected a JSON file or one of {known}; name one"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found {error}; mend the file") from None
    missing = [model for model in models if not isinstance(told, dict) or Path(model).name not in told]
    if missing:
        raise UserError(
            f"{path} has no buckets for {missing[0]!r}: expected an entry named {Path(missing[0]).name!r}; write one, "
            "or name another file with --buckets"
        )
    return {model: _of_model(path, Path(model).name, told[Path(model).name]) for model in models}


def _of_model(path: Path, name: str, told: Any) -> ModelBuckets:
    try:
        shapes = tuple(_shape(text) for text in told["shapes"])
        offers = {
            str(quality): Offer(plan=parse_plan(offer["plan"]), steps=int(offer["steps"]))
            for quality, offer in told["plans"].items()
        }
        batches = tuple(sorted(int(batch) for batch in told.get("batches", [1])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: {name} is not understood ({error!r}): expected shapes such as 832x480x81, plans as "
            '{"high": {"plan": "dense", "steps": 50}} and batches such as [1, 4]; mend the file'
        ) from None
    if not shapes or not offers or not batches or batches[0] != 1:
        raise UserError(
            f"{path}: {name} has {len(shapes)} shapes, {len(offers)} plans and the batches {list(batches)}: expected "
            "at least one each, and 1 among the batches; mend the file"
        )
    return ModelBuckets(shapes=shapes, offers=offers, batches=batches)


def _shape(text: str) -> Frame:
    size, frames = text.rsplit("x", 1) if text.count("x") == 2 else (text, "1")
    return Frame(*parse_size(size), int(frames))
