"""Batches of training data, read ahead by grain; the data position is a number.

The batch of step i follows from the seed, i and the global batch size alone: hosts, threads and restarts change
nothing. Every batch is of one bucket. An epoch has of each bucket as many batches as it has examples for, in a random
order; what is left over counts for the next, so that in the long run every example comes equally often.

Shapes: B batch, T Y X latent grid, C latent channels, L text tokens, E text width, I image tokens.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from dit_jax.config import UserError
from train.buckets import Bucket
from train.data_libraries import grain
from train.shards import Example, Shards

_ORDER, _DROPPED = 0, 1  # what random numbers are for, so that no two uses share them


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How batches are drawn.

    batch            rows of all hosts together
    caption_dropout  share of the rows that are told the empty caption
    own              numbers of the rows that this host reads; None: all
    ahead            batches that are read before their turn, each in a thread of its own
    """

    batch: int
    seed: int = 0
    caption_dropout: float = 0.1
    own: tuple[int, ...] | None = None
    ahead: int = 4

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"the batch is of {self.batch} rows: expected a number above 0; change it")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"caption_dropout is {self.caption_dropout}: expected a share from 0 to 1; change it")
        if self.ahead < 1:
            raise UserError(f"{self.ahead} batches are to be read ahead: expected 1 or more; change it")

    @property
    def rows(self) -> np.ndarray:
        """The numbers of this host's rows."""
        return np.arange(self.batch) if self.own is None else np.array(self.own)


class ShardBatches:
    """`batches(i)` are this host's rows of the batch of step i, as `at(i)` gives them.

    Steps asked for one after the other are read ahead; any other may be asked for, and the reading goes on from there.
    """

    def __init__(self, shards: Shards, settings: BatchSettings):
        self.shards, self.settings = shards, settings
        self._counts = [shards.count(bucket) for bucket in shards.buckets]
        self._orders: dict[int, dict[int, np.ndarray]] = {}
        self._next = -1
        self._ahead: Iterator[dict[str, np.ndarray]] = iter(())

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        if position != self._next:
            self._ahead = self.starting(position)
        self._next = position + 1
        return next(self._ahead)

    def starting(self, first: int) -> Iterator[dict[str, np.ndarray]]:
        """The batches of step `first` and all that follow, read ahead by threads of grain."""
        options = grain.ReadOptions(num_threads=self.settings.ahead, prefetch_buffer_size=self.settings.ahead)
        return iter(grain.MapDataset.source(_ByStep(self))[first:].to_iter_dataset(options))

    def at(self, position: int) -> dict[str, np.ndarray]:
        """This host's rows of a batch.

        latents  fp16 [B, T, Y, X, C]
        text     fp16 [B, L, E], with zeros behind where a caption is stored without its padding
        and `pooled`, `image`, `first_frame` where the model is told them (`Encoders.encode`). UserError naming the
        shard that is damaged.
        """
        examples = self.examples(position)
        dropped = self._dropped(position)
        empty = self.shards.empty
        told = [
            example.arrays | empty if blank else example.arrays
            for example, blank in zip(examples, dropped, strict=True)
        ]
        batch = {name: np.stack([arrays[name] for arrays in told]) for name in told[0] if name != "text"}
        return batch | {"text": padded([arrays["text"] for arrays in told], self.shards.manifest.text)}

    def examples(self, position: int) -> list[Example]:
        """What the rows of a batch were made from: captions (dropped or not) and file names among it."""
        return self.shards.read(*self.picks(position))

    def picks(self, position: int) -> tuple[Bucket, list[int]]:
        """The bucket of a batch, and which of its examples this host's rows are.

        Rows go through a bucket epoch after epoch, each in an order of its own. A bucket smaller than the batch has its
        examples several times in one, and such batches come as seldom as it is small.
        """
        which, turn = self._due(position)
        first, count = turn * self.settings.batch, self._counts[which]
        epochs_and_places = [divmod(first + row, count) for row in self.settings.rows.tolist()]
        picked = [int(self._order(which, epoch, count)[place]) for epoch, place in epochs_and_places]
        return self.shards.buckets[which], picked

    def _due(self, position: int) -> tuple[int, int]:
        """The bucket of this step, and which of that bucket's batches it is."""
        # The last epoch that begins at or before the step; epochs of a set smaller than a batch may be empty.
        highest = (position + len(self._counts) + 1) * self.settings.batch // sum(self._counts) + 2
        epoch = bisect.bisect_right(range(highest), position, key=lambda e: sum(self._begins(e))) - 1
        begins, ends = self._begins(epoch), self._begins(epoch + 1)
        shares = list(accumulate(end - begin for begin, end in zip(begins, ends, strict=True)))
        place = int(self._order(len(self._counts), epoch, shares[-1])[position - sum(begins)])
        which = bisect.bisect_right(shares, place)
        return which, begins[which] + place - (shares[which - 1] if which else 0)

    def _order(self, what: int, epoch: int, count: int) -> np.ndarray:
        """Numbers below `count` in this epoch's order, of a bucket or (behind the last bucket) of the buckets' turns.

        Not grain's own shuffle, which takes 15 ms a number for a few examples.
        """
        held = self._orders.setdefault(what, {})
        order = held.get(epoch)
        if order is None:
            rng = np.random.default_rng([self.settings.seed, _ORDER, what, epoch])
            order = held[epoch] = rng.permutation(np.arange(count, dtype=np.int32))
            # Two are held: threads may be reading the end of one epoch and the start of the next.
            for old in sorted(held, key=lambda other: abs(other - epoch))[2:]:
                held.pop(old, None)
        return order

    def _begins(self, epoch: int) -> list[int]:
        """How many batches of each bucket come before an epoch."""
        return [epoch * count // self.settings.batch for count in self._counts]

    def _dropped(self, position: int) -> np.ndarray:
        rng = np.random.default_rng([self.settings.seed, _DROPPED, position])
        # Drawn for the rows of all hosts, so that a row's lot is not a matter of who reads it.
        return (rng.random(self.settings.batch) < self.settings.caption_dropout)[self.settings.rows]


class _ByStep:
    """The batches as grain's source: as many as there may ever be."""

    def __init__(self, batches: ShardBatches):
        self._batches = batches

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        return self._batches.at(int(position))


def batches(shards: Shards, settings: BatchSettings) -> ShardBatches:
    """Batches of training data for `train.loop.train`; UserError for data without examples."""
    if not shards.buckets:
        raise UserError(f"{shards.folder} holds no example: expected some; make them with dit-encode")
    return ShardBatches(shards, settings)


def padded(texts: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Texts [L, E] of different lengths as one array [B, *shape], with zeros behind them."""
    rows = np.zeros((len(texts), *shape), np.float16)
    for row, text_LE in zip(rows, texts, strict=True):
        row[: len(text_LE)] = text_LE
    return rows
