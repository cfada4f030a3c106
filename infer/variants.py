"""Which variant of a stage's denoiser runs next, where a plan chooses between steps (patch sizes)."""

from __future__ import annotations

from collections.abc import Callable
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
        self._current: int | None = None
        self._history: Any = None

    @property
    def may_run(self) -> list[Any]:
        """All denoisers whose turn cannot be foretold."""
        by_latents = self._chooser is not None and self._chooser.by_latents
        return [self._of(variant) for variant in self._chooser.variants] if self._chooser and by_latents else []

    def choose(self, step: int, latents: jax.Array) -> bool:
        """Puts the denoiser of this step in use; whether it is another than that of the step before."""
        variant = self._choice(step, latents)
        if variant == self._current:
            return False
        self._current, self.denoiser = variant, self._of(variant)
        return True

    def _of(self, variant: int) -> Any:
        if variant not in self._made:
            self._made[variant] = self._applied(replace(self._run, variant=variant))
        return self._made[variant]

    def _choice(self, step: int, latents: jax.Array) -> int:
        if self._chooser is None:
            return 1
        variant, values = self._chooser.scheduled(step), None
        if self._chooser.by_latents:
            index, values = self._by_latents(self._chooser.scheduler(self._of(1)), latents)
            variant = self._chooser.variants[int(index[0])]
        if self._told:
            self._told(step, variant, None if values is None else np.asarray(values)[0])
        return variant

    def _by_latents(self, scheduler: Scheduler, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        mesh: Any = latents.sharding.mesh if isinstance(latents.sharding, NamedSharding) else None
        if self._history is None:
            self._history = scheduler.init(latents)
            if mesh is not None:
                self._history = jax.device_put(self._history, batch_shardings(self._history, mesh))
        pinned = None
        if mesh is not None:
            of_history = jax.tree.map(lambda leaf: leaf.sharding, self._history)
            pinned = (of_history, replicated(mesh), replicated(mesh))
        self._history, index, values = self._programs.run(
            ("choose", type(scheduler)), type(scheduler).__call__, scheduler, self._history, latents,
            donate=(1,), out_shardings=pinned,
        )  # fmt: skip
        return index, values
