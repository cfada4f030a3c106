"""What figures see of a run: a denoiser's state after every step, and the files that calibration makes for a plan.

Shapes: S sampler steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.methods.method import Run
from dit_jax.sampling.sampler import handed_over
from infer import calibrate
from infer.pipeline import Pipeline

VIDEO_PROMPTS = (
    "a blue 0 moving down",
    "a red 7 moving left",
    "a white 5 standing still",
    "a green 3 moving right on a striped background",
)


class ObservedState(NamedTuple):
    """A denoiser's own state, and what has been seen of it after every step so far, arrays [S, ...]."""

    state: Any
    seen: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=("denoiser",), meta_fields=("steps", "look"))
@dataclass(frozen=True, kw_only=True)
class Observed:
    """A denoiser whose state is looked at after every step of a run of so many.

    look  picks arrays from the state; part of the program's key, so the same function every time
    """

    denoiser: Any
    steps: int
    look: Callable[[Any], Any]

    def init(self, latents, before: ObservedState | None = None):
        state = self.denoiser.init(latents, None if before is None else before.state)
        nothing = jax.tree.map(lambda of: jnp.zeros((self.steps, *of.shape), of.dtype), self.look(state))
        return ObservedState(state, nothing if before is None else before.seen)

    def handed(self, state: ObservedState) -> ObservedState:
        return ObservedState(handed_over(self.denoiser, state.state), state.seen)

    def __call__(self, latents, state: ObservedState, step):
        velocity, after = self.denoiser(latents, state.state, step)
        seen = jax.tree.map(lambda of_all, new: of_all.at[step.index].set(new), state.seen, self.look(after))
        return velocity, ObservedState(after, seen)

    def finish(self, latents):
        return self.denoiser.finish(latents)


class StepWatch:
    """Keeps what `look` sees of the state after every step, as NumPy arrays [S, ...] in `seen`.

    changed  puts what is to be looked at into the denoiser first
    """

    seen: Any

    def __init__(self, look: Callable[[Any], Any], changed: Callable[[Any], Any] = lambda denoiser: denoiser):
        self._look, self._changed = look, changed

    def around(self, denoiser: Any, run: Run) -> Observed:
        return Observed(denoiser=self._changed(denoiser), steps=run.steps, look=self._look)

    def finished(self, component: str, state: ObservedState) -> None:
        self.seen = jax.tree.map(np.asarray, state.seen)


def calibrated(
    pipe: Pipeline, kind: str, prompts: Sequence[str], folder: Path, told: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """The file that `dit-calibrate KIND` writes for these prompts in this folder, and its report.

    told  its options by name
    """
    text, out = folder / "prompts.txt", folder / f"{kind}.json"
    text.write_text("\n".join(prompts) + "\n")
    words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    required = ["--model", pipe.name, "--prompts", str(text), "--out", str(out)]
    options = calibrate.parser().parse_args([kind, *required, *words])
    return out, calibrate.KINDS[kind].run(pipe, options, calibrate.request_of(options))
