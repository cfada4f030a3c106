"""Batches of two kinds: small, cheap examples first, then large ones with a small batch every now and then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from train.data import LatentSet

Told = Mapping[str, np.ndarray]  # what a model is told of N captions, each array [N, ...]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Examples of one shape: `load` makes or reads their latents when the first batch is due."""

    load: Callable[[], LatentSet]
    batch: int


@dataclass(frozen=True, kw_only=True)
class Course:
    """Which kind comes when: `small_steps` small batches, then large ones and, each `small_every`-th, a small one."""

    small_steps: int
    small_every: int
    caption_dropout: float
    seed: int


class Batches:
    """The host batch of any step: `latents` and what `embed` tells of the captions, blank for some of them."""

    def __init__(self, small: Kind, large: Kind, course: Course, embed: Callable[[list[str]], Told]):
        self.small, self.large, self.course, self.embed = small, large, course, embed
        self.blank = embed([""])
        self.loaded: dict[str, tuple[LatentSet, Told]] = {}

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        course = self.course
        into_large = position - course.small_steps
        between = max(0, into_large + 1) // course.small_every  # small batches among the large ones so far
        if into_large < 0:
            return self._batch("small", position, position)
        if into_large % course.small_every == course.small_every - 1:
            return self._batch("small", position, course.small_steps + between - 1)
        return self._batch("large", position, into_large - between)

    def _batch(self, name: str, position: int, turn: int) -> dict[str, np.ndarray]:
        kind: Kind = getattr(self, name)
        if name not in self.loaded:
            latents = kind.load()
            self.loaded[name] = latents, self.embed(latents.captions)
        latents, told = self.loaded[name]
        picked = latents.indices(kind.batch, self.course.seed, turn)
        dropped = np.random.default_rng([self.course.seed, position]).random(kind.batch) < self.course.caption_dropout
        return {"latents": latents.latents[picked]} | {
            key: np.where(dropped.reshape(-1, *[1] * (values.ndim - 1)), self.blank[key], values[picked])
            for key, values in told.items()
        }


def in_groups(embed: Callable[[list[str]], Mapping[str, jax.Array]]) -> Callable[[list[str]], Told]:
    """An embedder of any number of captions, fp16, from one that is compiled for groups of 16 or 256."""

    def embed_all(captions: list[str]) -> Told:
        group = 256 if len(captions) > 64 else 16
        padded = captions + [""] * (-len(captions) % group)
        parts = [embed(padded[i : i + group]) for i in range(0, len(padded), group)]
        return {
            key: np.concatenate([np.asarray(part[key], np.float16) for part in parts])[: len(captions)]
            for key in parts[0]
        }

    return embed_all
