"""The caches' figure: how the trunk's residual moves from step to step beside what TeaCache and MagCache look at, and
which steps each cache runs.

Shapes: R batch rows (guidance branches included), M tokens, D width, S sampler steps.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.methods.magcache import MagCache, read_ratios
from dit_jax.methods.taylorseer import TaylorSeer
from dit_jax.methods.teacache import relative_change
from dit_jax.models.network import State, Trunk
from dit_jax.sampling.sampler import Guided
from infer.figures import style
from infer.figures.recording import VIDEO_PROMPTS, StepWatch, calibrated
from infer.pipeline import Pipeline
from infer.request import Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROMPTS = VIDEO_PROMPTS[:2]
TEACACHE, MAGCACHE, TAYLORSEER = (0.1, 0.2, 0.4), (0.01, 0.03, 0.1), (2, 4, 6)
SEED = 3
HEIGHT = 5.8


class Moved(NamedTuple):
    """What a step made of the trunk, and how far that is from the step before.

    residual, signal  of this step [R, M, D] and [R, ...]
    of_residual       ‖r_i − r_{i−1}‖ / ‖r_{i−1}‖ of each row [R], and `of_signal` TeaCache's d
    """

    residual: jax.Array
    signal: jax.Array
    of_residual: jax.Array
    of_signal: jax.Array


@dataclass(frozen=True)
class Moves:
    """A trunk's cache that reuses nothing: it notes how far the residual and TeaCache's signal have moved."""

    def init(self, model, x_BMD, signal):
        seen = jax.eval_shape(model.cache_signal, x_BMD, signal)
        nothing = jnp.zeros(x_BMD.shape[0], jnp.float32)
        residual = jnp.zeros(x_BMD.shape, jnp.float32)
        return State(cache=Moved(residual, jnp.zeros(seen.shape, seen.dtype), nothing, nothing))

    def __call__(self, trunk: Trunk, x_BMD, state: State):
        before: Moved = state.cache
        after, block_state = trunk.run(x_BMD, state.attention)
        residual = (after - x_BMD).astype(jnp.float32)
        if trunk.place.valid is not None:
            residual = jnp.where(trunk.place.valid[..., None], residual, 0)
        signal = trunk.model.cache_signal(x_BMD, trunk.signal)
        size = jnp.linalg.norm(before.residual, axis=(1, 2))
        moved = jnp.linalg.norm(residual - before.residual, axis=(1, 2)) / size
        return after, State(
            block_state, Moved(residual, signal, moved, relative_change(signal, before.signal, trunk.place.valid))
        )


def watched_moves(denoiser: Guided) -> Guided:
    """A plain denoiser whose state's `cache` is `Moved`."""
    return replace(denoiser, call=replace(denoiser.call, cache=Moves()))


@dataclass(frozen=True, kw_only=True)
class Cached:
    """What whole-step caches see of a model, arrays [S], and which steps run [S] by the caches' settings.

    residual, signal  mean relative change to the step before, NaN at the first
    ratios            MagCache's γ
    """

    residual: np.ndarray
    signal: np.ndarray
    ratios: np.ndarray
    runs: dict[str, dict[str, np.ndarray]]


def measured(
    pipe: Pipeline,
    prompts: Sequence[str] = PROMPTS,
    seed: int = SEED,
    calibration: dict[str, Any] | None = None,
    **options: Any,
) -> Cached:
    """Records plain runs of the prompts, measures MagCache's ratios, and runs the first under TeaCache.

    calibration  further options of `dit-calibrate magcache`, by name; `options` are of a `Request`
    """
    moves = []
    for prompt in prompts:
        job = pipe.prepare(Request(prompt=prompt, seed=seed, **options))
        pipe.denoise(job, watch=(watch := StepWatch(_moves, watched_moves)))
        moves.append([of_all.mean(axis=1) for of_all in watch.seen])
    residual, signal = np.mean(moves, axis=0)
    residual[0] = signal[0] = np.nan
    with tempfile.TemporaryDirectory() as folder:
        file, _ = calibrated(
            pipe, "magcache", prompts, Path(folder), {"steps": job.steps, "seed": seed} | (calibration or {})
        )
        ratios = read_ratios(file)
    runs = {
        "TeaCache": {f"δ = {limit:g}": teacache_runs(pipe, limit, prompts[0], seed, options) for limit in TEACACHE},
        "MagCache": {f"{limit:g}": ~MagCache(threshold=limit, ratios=ratios).reuses() for limit in MAGCACHE},
        "TaylorSeer": {f"n = {n}": np.asarray(TaylorSeer(interval=n).timeline(job.steps).full) for n in TAYLORSEER},
    }
    return Cached(residual=residual, signal=signal, ratios=np.asarray(ratios), runs=runs)


def _moves(state: State) -> tuple[jax.Array, jax.Array]:
    return state.cache.of_residual, state.cache.of_signal


def _runs(state: State) -> jax.Array:
    return state.cache.residual.runs


def teacache_runs(pipe: Pipeline, threshold: float, prompt: str, seed: int, options: dict[str, Any]) -> np.ndarray:
    """Which steps run the trunk [S]."""
    with warnings.catch_warnings():
        # That this model has no polynomial of its own is said in the figure's caption.
        warnings.simplefilter("ignore")
        job = pipe.prepare(Request(prompt=prompt, plan=f"teacache:{threshold}", seed=seed, **options))
        pipe.denoise(job, watch=(watch := StepWatch(_runs)))
    return np.diff(watch.seen, prepend=0) > 0


def draw(figure: Figure, found: Cached) -> None:
    """Changes by step, and below them a table of the steps that run for each cache and setting."""
    above, below = figure.subplots(2, sharex=True, height_ratios=(1, 1.35))
    steps = np.arange(len(found.ratios))
    above.plot(steps, found.residual, color=style.RED, label="trunk's residual, ‖r − r′‖ / ‖r′‖")
    above.plot(steps, found.signal, color=style.BLUE, label="TeaCache's signal, d")
    above.plot(steps[1:], np.abs(found.ratios[1:] - 1), color=style.YELLOW, label="residual's size, |γ − 1|")
    above.set_yscale("log")
    above.set_ylim(5e-4, 1)
    above.set_xticks(steps[::5])
    above.set_xlim(-0.6, len(steps) + 1.2)
    above.set_title("relative change to the step before")
    above.legend(loc="upper center", ncols=3)
    _draw_runs(below, found.runs)


def _draw_runs(axes: Axes, runs: dict[str, dict[str, np.ndarray]]) -> None:
    colours, row, labels, places = (style.BLUE, style.YELLOW, style.GREEN), 0.0, [], []
    for (cache, settings), colour in zip(runs.items(), colours, strict=True):
        for setting, ran in settings.items():
            steps = np.arange(len(ran))
            axes.bar(steps, 0.8, bottom=row - 0.4, width=0.85, color=np.where(ran, colour, style.FAINT))
            axes.text(len(ran) - 0.3, row, f"{ran.mean():.0%}", va="center", fontsize=8)
            labels.append(f"{cache} {setting}")
            places.append(row)
            row += 1
        row += 0.5
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(row - 1, -0.6)
    axes.set_xlabel("step")
    axes.spines[:].set_visible(False)
    axes.set_title("steps that run the trunk, and their share")
