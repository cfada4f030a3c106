"""Compiled programs, each under a key, so that a pipeline compiles every shape once and knows how long that took."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

import jax

from infer.program_keys import Call, runs_untraced
from infer.program_store import Lowered, ProgramStore, compiled_now
from infer.stable_text import UnstableError

LOG = logging.getLogger(__name__)


class Programs:
    """Programs made ready ahead of their first run, from any thread: by compiling or, where there is one, from a store.

    seconds         that compiling took, loading included; where threads compile at once, of all of them together
    compiled_count  programs that were compiled
    loaded_count    programs that came from the store
    used            keys of those run since it was last cleared
    """

    def __init__(self, store: ProgramStore | None = None) -> None:
        self.seconds, self.compiled_count, self.loaded_count = 0.0, 0, 0
        self.used: set[Hashable] = set()
        self._store = store
        self._lock = threading.Lock()
        self._ready: dict[Hashable, Future[jax.stages.Compiled]] = {}

    def __len__(self) -> int:
        return len(self._ready)

    def run(
        self, name: Hashable, function: Callable, *arguments, donate: tuple[int, ...] = (), out_shardings: Any = None
    ):
        """function(*arguments), as `compiled` has it."""
        call = Call(name=name, function=function, arguments=arguments, donate=donate, out_shardings=out_shardings)
        key = _key(call)
        program = self._program(key, call)
        with self._lock:
            self.used.add(key)
        return program(*arguments)

    def compiled(
        self, name: Hashable, function: Callable, *arguments, donate: tuple[int, ...] = (), out_shardings: Any = None
    ) -> Callable:
        """`function`, compiled for the arguments' shapes, dtypes and shardings under `name`.

        `name` tells apart what the arguments do not: the function and every static choice closed over by it. Where the
        outputs live follows from the arguments: `out_shardings` (None leaves it to the compiler) is no part of the key.
        Threads that ask for one program wait for the one that compiles it.
        """
        call = Call(name=name, function=function, arguments=arguments, donate=donate, out_shardings=out_shardings)
        return self._program(_key(call), call)

    def peak_bytes(self) -> int | None:
        """Most bytes of a device that one of the programs `used` holds at once, its arguments (the weights) included;
        None where the compiler does not say."""
        with self._lock:
            used = [self._ready[key] for key in self.used]
        found: list[Any] = [program.result().memory_analysis() for program in used]
        peaks = [
            one.argument_size_in_bytes + one.output_size_in_bytes - one.alias_size_in_bytes + one.temp_size_in_bytes
            for one in found
            if one is not None
        ]
        return max(peaks, default=None)

    def _program(self, key: Hashable, call: Call) -> jax.stages.Compiled:
        with self._lock:
            waiting = self._ready.get(key)
            if waiting is None:
                mine = self._ready[key] = Future()
        if waiting is not None:
            return waiting.result()
        began = time.perf_counter()
        try:
            program, loaded = (_lowered(call).compile(), False) if self._store is None else _stored(self._store, call)
        except BaseException as error:
            with self._lock:
                del self._ready[key]
            mine.set_exception(error)
            raise
        with self._lock:
            self.seconds += time.perf_counter() - began
            self.loaded_count += loaded
            self.compiled_count += not loaded
        mine.set_result(program)
        return program


def _lowered(call: Call) -> jax.stages.Lowered:
    return jax.jit(call.function, donate_argnums=call.donate, out_shardings=call.out_shardings).lower(*call.arguments)


def _stored(store: ProgramStore, call: Call) -> tuple[jax.stages.Compiled, bool]:
    """The program of a call, and whether the store had it."""
    call_key = _told(call.key)
    known = store.recall(call_key) if call_key else None
    program = store.load(known.key, call.in_tree, known.out_tree, call.devices) if known else None
    if program is not None:
        return program, True
    lowered = _lowered(call)
    key = _told(call.lowered_key, lowered)
    if key is None:
        return lowered.compile(), False
    if known is None or known.key != key:  # or it has just been found unusable
        program = store.load(key, lowered.in_tree, lowered.out_tree, call.devices)
    loaded = kept = program is not None
    if program is None:
        program, new = compiled_now(lowered)
        kept = new and store.save(key, program, call.devices)
    if kept and call_key and runs_untraced(lowered):
        store.remember(call_key, Lowered(key, lowered.out_tree))
    return program, loaded


def _told(key: Callable[..., str], *told: Any) -> str | None:
    """A key, or None where there is none that would mean the same in another process."""
    try:
        return key(*told)
    except UnstableError as error:
        LOG.info("a program is not looked for by its %s: it holds %s", key.__name__, error)
        return None


def _key(call: Call) -> Hashable:
    leaves, structure = jax.tree.flatten(call.arguments)
    return call.name, structure, tuple(_signature(leaf) for leaf in leaves)


def _signature(leaf) -> Hashable:
    aval = jax.typeof(leaf)
    return aval.shape, aval.dtype, getattr(leaf, "sharding", None)
