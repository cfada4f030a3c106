"""Which variant of a stage's denoiser runs next, where a plan chooses between steps (patch sizes)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from dit_jax.methods.method import Chooser, Run, Scheduler
from dit_jax.sharding import batch_shardings, replicated
from infer.programs import Programs

Chosen = Callable[[int, int, np.ndarray | None], None]
"""Is told a step, the variant that it runs with, and what that was chosen by (None: it was known beforehand)."""


class Variants:
    """The denoisers of a stage: one, or one for each variant of the plan's chooser; `denoiser` is the one in use.

    chooser  of the plan, or None
    applied  makes a variant's denoiser of the run that names it
    told     is told of the choices
    A chooser that looks at latents is shown one sample's before every step, from the stage's first step on.
    """

    denoiser: Any

    def __init__(
        self,
        chooser: Chooser | None,
        applied: Callable[[Run], Any],
        run: Run,
        programs: Programs,
        told: Chosen | None = None,
    ):
        self._chooser, self._applied, self._run = chooser, applied, run
        self._programs, self._told = programs, told
        self._made: dict[int, Any] = {}
        self.current: int | None = None
        self._history: Any = None
        self._asked: tuple[int, list[int]] | None = None

    @property
    def all(self) -> list[Any]:
        """Every denoiser that the stage may need."""
        return [self.of_variant(variant) for variant in (self._chooser.variants if self._chooser else (1,))]

    @property
    def unforetold(self) -> list[Any]:
        """All denoisers where latents say whose turn it is."""
        return self.all if self._chooser is not None and self._chooser.by_latents else []

    def compile_choice(self, latents: jax.Array) -> None:
        """Compiles what chooses by such latents, if anything does."""
        if self._chooser is not None and self._chooser.by_latents:
            self._by_latents(self._chooser.scheduler(self.of_variant(1)), latents)
            self._history = None

    def wanted(self, step: int, latents: jax.Array) -> list[int]:
        """The variant that each sample asks for at this step."""
        if self._asked is None or self._asked[0] != step:
            self._asked = (step, self._choices(step, latents))
        return self._asked[1]

    def choose(self, step: int, latents: jax.Array) -> bool:
        """Puts the denoiser of this step in use; whether it is another than that of the step before."""
        variant, *others = set(self.wanted(step, latents))
        if others:
            raise ValueError(f"samples of one run disagree about step {step}")
        if variant == self.current:
            return False
        self.current, self.denoiser = variant, self.of_variant(variant)
        return True

    def of(self, rows: Sequence[int], others: Variants) -> None:
        """Goes on from where other variants are, with these of their samples."""
        self._asked = others._asked and (others._asked[0], [others._asked[1][row] for row in rows])
        self.current = others.current
        if self.current is not None:
            self.denoiser = self.of_variant(self.current)
        if others._history is not None:
            taken = jax.tree.map(lambda leaf: rows_of(leaf, rows), others._history)
            self._history = _placed(taken, _mesh_of(others._history))

    def of_variant(self, variant: int | None) -> Any:
        """The denoiser of this variant."""
        assert variant is not None
        if variant not in self._made:
            self._made[variant] = self._applied(replace(self._run, variant=variant))
        return self._made[variant]

    def _choices(self, step: int, latents: jax.Array) -> list[int]:
        if self._chooser is None:
            return [1] * len(latents)
        if not self._chooser.by_latents:
            variant = self._chooser.scheduled(step)
            if self._told:
                self._told(step, variant, None)
            return [variant] * len(latents)
        index, values = self._by_latents(self._chooser.scheduler(self.of_variant(1)), latents)
        chosen = [self._chooser.variants[one] for one in np.asarray(index)]
        if self._told:
            for variant, by in zip(chosen, np.asarray(values), strict=True):
                self._told(step, variant, by)
        return chosen

    def _by_latents(self, scheduler: Scheduler, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        mesh = _mesh_of(latents)
        if self._history is None:
            begun = self._programs.run(("history", type(scheduler)), type(scheduler).init, scheduler, latents)
            self._history = _placed(begun, mesh)
        pinned = None
        if mesh is not None:
            of_history = jax.tree.map(lambda leaf: leaf.sharding, self._history)
            pinned = (of_history, replicated(mesh), replicated(mesh))
        self._history, index, values = self._programs.run(
            ("choose", type(scheduler)), type(scheduler).__call__, scheduler, self._history, latents,
            donate=(1,), out_shardings=pinned,
        )  # fmt: skip
        return index, values


def _mesh_of(arrays: Any) -> Any:
    sharding = jax.tree.leaves(arrays)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _placed(history: Any, mesh: Any) -> Any:
    return jax.device_put(history, None if mesh is None else batch_shardings(history, mesh))


def rows_of(leaf: Any, rows: Sequence[int], axis: int = 0, of_each: int = 1) -> np.ndarray:
    """These samples of an array that has `of_each` rows of every sample on this axis."""
    wanted = [row * of_each + part for row in rows for part in range(of_each)]
    return np.take(np.asarray(leaf), wanted, axis)
