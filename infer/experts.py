"""The experts of a model: transformers of one config that take turns in a run, all resident or one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax


class Experts:
    """`experts[name]` is an expert, ready to run.

    `resident` holds those whose weights are on the devices.

    one_at_a_time  the weights of the last one used leave the devices before those of another are read from the
                   checkpoint; otherwise all are read at once and stay
    """

    def __init__(self, load: Mapping[str, Callable[[], Any]], one_at_a_time: bool = False):
        self._load, self._one_at_a_time = load, one_at_a_time
        self.resident: dict[str, Any] = {}
        for name in load:
            if not (one_at_a_time and self.resident):
                self.resident[name] = load[name]()

    def __len__(self) -> int:
        return len(self._load)

    def __iter__(self) -> Iterator[str]:
        return iter(self._load)

    def __getitem__(self, name: str) -> Any:
        if name not in self.resident:
            self._clear()
            self.resident[name] = self._load[name]()
        return self.resident[name]

    def _clear(self) -> None:
        # Deleted, not merely forgotten: a denoiser of the stage before may still hold the arrays.
        while self.resident:
            _, model = self.resident.popitem()
            for leaf in jax.tree.leaves(model):
                leaf.delete()
