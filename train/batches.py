"""Batches of several kinds of examples, from small and cheap to large: which kind comes at which step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np

from train.data import LatentSet

Told = Mapping[str, np.ndarray]  # what a model is told of N captions, each array [N, ...]


@dataclass(frozen=True, kw_only=True)
class Window:
    """A square part of the latents: so many tokens a side, of so many latent cells each.

    on  share of the windows whose middle is a cell that stands out; the others are anywhere
    """

    tokens: int
    patch: int = 2
    on: float = 0.0

    def cut(self, latents_BTYXC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(windows [B, T, side, side, C], the (t, y, x) of their first tokens int32 [B, 3])."""
        room = np.array(latents_BTYXC.shape[2:4]) // self.patch - self.tokens
        first = rng.integers(0, room + 1, (len(latents_BTYXC), 2))
        for index in np.flatnonzero(rng.random(len(first)) < self.on):
            middle = rng.choice(outstanding(latents_BTYXC[index])) // self.patch
            first[index] = np.clip(middle - self.tokens // 2, 0, room)
        side = self.tokens * self.patch
        cut = [
            latents[:, y : y + side, x : x + side]
            for latents, (y, x) in zip(latents_BTYXC, first * self.patch, strict=True)
        ]
        return np.stack(cut), np.pad(first, ((0, 0), (1, 0))).astype(np.int32)


def outstanding(latents_TYXC: np.ndarray) -> np.ndarray:
    """The (y, x) [N, 2] of the sixteenth of all cells that are farthest from the median, over all frames."""
    far = np.abs(latents_TYXC - np.median(latents_TYXC, axis=(0, 1, 2))).sum((0, 3), dtype=np.float32)
    return np.argwhere(far >= np.quantile(far, 15 / 16))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Examples of one shape: `load` makes or reads their latents when the first batch is due; of each all, or a
    window."""

    load: Callable[[], LatentSet]
    batch: int
    window: Window | None = None

    @cached_property
    def latents(self) -> LatentSet:
        """All of them."""
        return self.load()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`steps` batches of one kind (None: all that follow); each `every`-th is of another, such as an earlier one that
    is not to be forgotten."""

    kind: str
    steps: int | None = None
    beside: str | None = None
    every: int = 4

    def counts(self, steps: int) -> Counter[str]:
        """How many of the first `steps` batches are of which kind."""
        if self.beside is None:
            return Counter({self.kind: steps})
        return Counter({self.beside: steps // self.every, self.kind: steps - steps // self.every})

    def at(self, step: int) -> str:
        """The kind of this batch of the stage."""
        return self.beside if self.beside and step % self.every == self.every - 1 else self.kind


@dataclass(kw_only=True)
class Batches:
    """`batches(i)` is the host batch of step i: `latents` and what `embed` tells of their captions, some of them blank.

    Every kind goes through all its examples, pass after pass, whatever comes in between.
    """

    kinds: Mapping[str, Kind]
    stages: Sequence[Stage]
    embed: Callable[[list[str]], Told]
    caption_dropout: float
    seed: int

    def __post_init__(self) -> None:
        self._blank = self.embed([""])
        self._told: dict[str, Told] = {}

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        name, turn = self._due(position)
        kind = self.kinds[name]
        if name not in self._told:
            self._told[name] = self.embed(kind.latents.captions)
        picked = kind.latents.indices(kind.batch, self.seed, turn)
        rng = np.random.default_rng([self.seed, position])
        dropped = rng.random(kind.batch) < self.caption_dropout
        shown = {"latents": kind.latents.latents[picked]}
        if kind.window:
            shown["latents"], shown["origin"] = kind.window.cut(shown["latents"], rng)
        return shown | {
            key: np.where(dropped.reshape(-1, *[1] * (values.ndim - 1)), self._blank[key], values[picked])
            for key, values in self._told[name].items()
        }

    def _due(self, position: int) -> tuple[str, int]:
        """The kind of this step's batch, and how many batches of that kind came before."""
        before: Counter[str] = Counter()
        for stage in self.stages:
            if stage.steps is None or position < stage.steps:
                name = stage.at(position)
                return name, (before + stage.counts(position))[name]
            before += stage.counts(stage.steps)
            position -= stage.steps
        raise IndexError("the stages end before this step; give the last one no number of steps")


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
