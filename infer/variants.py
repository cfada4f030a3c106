"""Which variant of a stage's denoiser runs next, where a plan chooses between steps (patch sizes)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import jax
import numpy as np

from dit_jax.methods.method import Run
from dit_jax.methods.plan import Plan
from dit_jax.sharding import batch_shardings, replicated
from infer.programs import Programs

Chosen = Callable[[int, int, np.ndarray | None], None]
"""Is told a step, the variant that it runs with, and what that was chosen by (None: it was known beforehand)."""


class Watch(Protocol):
    """What looks into a run: it puts a denoiser around each stage's, and is shown that denoiser's last state.

    component  the transformer that the stage ran
    """

    def around(self, denoiser: Any, run: Run) -> Any: ...
    def finished(self, component: str, state: Any) -> None: ...


class Variants:
    """The denoisers of a stage: one, or one for each variant of the plan's chooser; `denoiser` is the one in use.

    A chooser that looks at latents is shown one sample's before every step, from the stage's first step on.
    """

    denoiser: Any

    def __init__(
        self,
        plan: Plan,
        base: Any,
        run: Run,
        programs: Programs,
        mesh: jax.sharding.Mesh | None = None,
        told: Chosen | None = None,
        watch: Watch | None = None,
    ):
        self._plan, self._base, self._run = plan, base, run
        self._programs, self._mesh, self._told, self._watch = programs, mesh, told, watch
        self._made: dict[int, Any] = {}
        self._current: int | None = None
        self._history: Any = None

    @property
    def may_run(self) -> list[Any]:
        """All denoisers whose turn cannot be foretold."""
        chooser = self._plan.chooser
        return [self._of(variant) for variant in chooser.variants] if chooser and chooser.by_latents else []

    def choose(self, step: int, latents: jax.Array) -> bool:
        """Puts the denoiser of this step in use; whether it is another than that of the step before."""
        variant = self._choice(step, latents)
        if variant == self._current:
            return False
        self._current, self.denoiser = variant, self._of(variant)
        return True

    def _of(self, variant: int) -> Any:
        if variant not in self._made:
            run = replace(self._run, variant=variant)
            made = self._plan.applied(self._base, run)
            self._made[variant] = made if self._watch is None else self._watch.around(made, run)
        return self._made[variant]

    def _choice(self, step: int, latents: jax.Array) -> int:
        chooser = self._plan.chooser
        if chooser is None:
            return 1
        variant, values = chooser.scheduled(step), None
        if chooser.by_latents:
            index, values = self._by_latents(chooser.scheduler(self._base), latents)
            variant = chooser.variants[int(index[0])]
        if self._told:
            self._told(step, variant, None if values is None else np.asarray(values)[0])
        return variant

    def _by_latents(self, scheduler, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self._history is None:
            self._history = scheduler.init(latents)
            if self._mesh is not None:
                self._history = jax.device_put(self._history, batch_shardings(self._history, self._mesh))
        pinned = None
        if self._mesh is not None:
            of_history = jax.tree.map(lambda leaf: leaf.sharding, self._history)
            pinned = (of_history, replicated(self._mesh), replicated(self._mesh))
        self._history, index, values = self._programs.run(
            ("choose", type(scheduler)), type(scheduler).__call__, scheduler, self._history, latents,
            donate=(1,), out_shardings=pinned,
        )  # fmt: skip
        return index, values
