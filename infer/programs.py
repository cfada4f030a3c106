"""Compiled programs, each under a key, so that a pipeline compiles every shape once and knows how long that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import jax


class Programs:
    """Programs compiled ahead of their first run. `seconds` adds up what compiling took; `used` are the keys of those
    run since it was last cleared."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.used: set[Hashable] = set()
        self._compiled: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def run(
        self, name: Hashable, function: Callable, *arguments, donate: tuple[int, ...] = (), out_shardings: Any = None
    ):
        """function(*arguments), as `compiled` has it."""
        program = self.compiled(name, function, *arguments, donate=donate, out_shardings=out_shardings)
        self.used.add(_key(name, arguments))
        return program(*arguments)

    def compiled(
        self, name: Hashable, function: Callable, *arguments, donate: tuple[int, ...] = (), out_shardings: Any = None
    ) -> Callable:
        """`function`, compiled for the arguments' shapes, dtypes and shardings under `name`.

        `name` tells apart what the arguments do not: the function and every static choice closed over by it. Where the
        outputs live follows from the arguments: `out_shardings` (None leaves it to the compiler) is no part of the key.
        """
        key = _key(name, arguments)
        if key not in self._compiled:
            began = time.perf_counter()
            jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)
            self._compiled[key] = jitted.lower(*arguments).compile()
            self.seconds += time.perf_counter() - began
        return self._compiled[key]

    def peak_bytes(self) -> int | None:
        """Most bytes of a device that one of the programs `used` holds at once, its arguments (the weights) included;
        None where the compiler does not say."""
        found = [self._compiled[key].memory_analysis() for key in self.used]
        peaks = [
            one.argument_size_in_bytes + one.output_size_in_bytes - one.alias_size_in_bytes + one.temp_size_in_bytes
            for one in found
            if one is not None
        ]
        return max(peaks, default=None)


def _key(name: Hashable, arguments: tuple) -> Hashable:
    return name, jax.tree.structure(arguments), tuple(_signature(leaf) for leaf in jax.tree.leaves(arguments))


def _signature(leaf) -> Hashable:
    aval = jax.typeof(leaf)
    return aval.shape, aval.dtype, getattr(leaf, "sharding", None)
