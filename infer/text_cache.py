"""Text embeddings by prompt, those of the prompts seen last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax

LIMIT = 2**29  # bytes


class TextCache:
    """Keeps what encoding a prompt gave, up to `limit` bytes of host memory; the longest unused go first."""

    def __init__(self, limit: int = LIMIT):
        self.limit, self.held, self.hits = limit, 0, 0
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._turn = threading.Lock()

    def get(self, prompt: str, encode: Callable[[str], Any]) -> Any:
        """The arrays of this prompt, encoded if they are not there."""
        with self._turn:
            found = self._kept.get(prompt)
            if found is not None:
                self.hits += 1
                self._kept.move_to_end(prompt)
                return found
        made = encode(prompt)
        with self._turn:
            if prompt not in self._kept:
                self._kept[prompt] = made
                self.held += _bytes(made)
            while self.held > self.limit and len(self._kept) > 1:
                self.held -= _bytes(self._kept.popitem(last=False)[1])
        return made

    def clear(self) -> None:
        """Forgets all, as another text encoder asks for."""
        with self._turn:
            self._kept.clear()
            self.held = 0


def _bytes(arrays: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
