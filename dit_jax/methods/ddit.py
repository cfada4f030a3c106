"""DDiT: the patch size is chosen anew at every step, by how much the latents still bend (arXiv 2602.16968).

Where the third difference of the last latents varies little within large patches, the step runs on large patches: few
tokens. The choice is each sample's own, and crosses to the host, which has one program a size.

Shapes: B samples, T Y X latent grid, C latent channels, N patches, S sampler steps, Q patch sizes beyond the base one.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeGuard

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import UserError
from dit_jax.flops import Config, Shape, StepAt, StepWork
from dit_jax.methods.method import Part, Run, RunRecord, Words
from dit_jax.methods.patch_adapters import AdapterSettings, adapted, adapters_from, scales_of, size_name
from dit_jax.models.network import Patch, grid
from dit_jax.sampling.sampler import Guided
from dit_jax.sampling.solvers import SOLVERS

REMEMBERED = 4  # latents that a third difference is of
SCALES = AdapterSettings().scales


def written_sizes(scales: Sequence[int]) -> str:
    """Sizes as plans and files have them: 2p/4p."""
    return "/".join(map(size_name, scales))


# What latents may be left to choose from, as it is written.
CHOICES = {written_sizes(scales): scales for scales in (SCALES, *((scale,) for scale in SCALES))}


class History(NamedTuple):
    """The last latents, newest last [B, 4, T, Y, X, C] in fp32, and how many have been seen [B]."""

    latents: jax.Array
    seen: jax.Array


def third_difference(latents_B4TYXC: jax.Array) -> jax.Array:
    """z₋₁ − 3·z₋₂ + 3·z₋₃ − z₋₄ of latents whose newest is last, in fp32."""
    oldest, old, new, newest = jnp.moveaxis(latents_B4TYXC.astype(jnp.float32), 1, 0)
    return newest - 3 * new + 3 * old - oldest


def difference(latents_B4TYXC: jax.Array, order: int) -> jax.Array:
    """The difference of this order (1 to 3) of latents whose newest is last, in fp32."""
    if order == 3:
        return third_difference(latents_B4TYXC)
    return jnp.diff(latents_B4TYXC[:, -order - 1 :].astype(jnp.float32), n=order, axis=1)[:, 0]


def deviations(x_BTYXC: jax.Array, patch: Patch) -> jax.Array:
    """Standard deviation over the cells and channels of every patch [B, N], cells beyond the lattice left out."""
    inside = jnp.ones((1, *x_BTYXC.shape[1:4], 1), jnp.float32)
    missing = [-size % step for size, step in zip(x_BTYXC.shape[1:4], patch, strict=True)]

    def rows(array):
        array = jnp.pad(array, ((0, 0), *((0, count) for count in missing), (0, 0)))
        return einops.rearrange(
            array, "b (t pt) (y py) (x px) c -> b (t y x) (pt py px) c", pt=patch[0], py=patch[1], px=patch[2]
        )

    values, weights = rows(x_BTYXC), rows(inside)
    count = jnp.sum(weights, axis=(2, 3)) * x_BTYXC.shape[-1]
    mean = jnp.sum(values * weights, axis=(2, 3)) / count
    squares = jnp.square(values - mean[:, :, None, None]) * weights
    return jnp.sqrt(jnp.sum(squares, axis=(2, 3)) / count)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("threshold", "quantile"),
    meta_fields=("patch", "scales", "held", "order"),
)
@dataclass(frozen=True, kw_only=True)
class PatchScheduler:
    """The largest size whose patches' deviations have a quantile ρ below τ, else the base size.

    threshold  τ []
    quantile   ρ [], over the patches of all frames
    patch      the base size; the others are `scales` times as wide and high
    held       first latent frames that are known: they do not move, and have no say
    order      of the difference (the paper's is the third)
    """

    threshold: jax.Array
    quantile: jax.Array
    patch: Patch
    scales: tuple[int, ...]
    held: int = 0
    order: int = 3

    def init(self, latents: jax.Array) -> History:
        """The history before the first step."""
        batch, *shape = latents.shape
        return History(jnp.zeros((batch, REMEMBERED, *shape), jnp.float32), jnp.zeros(batch, jnp.int32))

    def __call__(self, history: History, latents: jax.Array) -> tuple[History, jax.Array, jax.Array]:
        """(history, index among base size and scales [B], the sizes' quantiles [B, Q], infinite until as many latents
        have been seen as the difference is of, and where no frame moves)."""
        last = jnp.concatenate([history.latents[:, 1:], latents[:, None]], axis=1)
        history = History(last, history.seen + 1)
        moved = difference(last, self.order)[:, self.held :]
        values_BQ = jnp.where(history.seen[:, None] <= self.order, jnp.inf, self._quantiles(moved))
        below = values_BQ < self.threshold
        return history, jnp.max(below * jnp.arange(1, len(self.scales) + 1), axis=1), values_BQ

    def _quantiles(self, moved_BTYXC: jax.Array) -> jax.Array:
        """Of each size's patches [B, Q]."""
        batch, frames = moved_BTYXC.shape[:2]
        if not frames:
            return jnp.full((batch, len(self.scales)), jnp.inf)
        time, rows, columns = self.patch
        values = [
            jnp.quantile(deviations(moved_BTYXC, (time, rows * scale, columns * scale)), self.quantile, axis=1)
            for scale in self.scales
        ]
        return jnp.stack(values, axis=1)


class Span(NamedTuple):
    """Steps from first to last, both included, at a patch size."""

    scale: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Ddit:
    """DDiT as a plan has it.

    threshold       τ of the third difference, in the latents' units; it depends on the model, the schedule and the
                    number of steps (`calibrated_threshold`)
    quantile        ρ, over patches
    sizes           that latents may choose beyond p
    spans           steps at larger sizes, known beforehand; where there are any, latents have no say
    calibrated_for  number of steps that τ was calibrated for, or None
    calibrated_with  solver likewise: another one's latents bend otherwise
    """

    threshold: float = 0.001
    order: int = 3  # of the difference
    quantile: float = 0.4
    sizes: tuple[int, ...] = SCALES
    spans: tuple[Span, ...] = ()
    calibrated_for: int | None = None
    calibrated_with: str | None = None

    name: ClassVar[str] = "ddit"

    @property
    def steps(self) -> int | None:
        return self.calibrated_for

    @property
    def solver(self) -> str | None:
        return self.calibrated_with

    @property
    def by_latents(self) -> bool:
        return not self.spans

    @property
    def variants(self) -> tuple[int, ...]:
        """Base patches that a token may cover along y and along x."""
        return 1, *(self.sizes if self.by_latents else sorted({span.scale for span in self.spans}))

    def breaks(self, steps: int) -> tuple[int, ...]:
        """Steps before which the size may change."""
        if self.by_latents:
            return tuple(range(steps))
        late = [span for span in self.spans if span.last >= steps]
        if late:
            raise UserError(
                f"ddit: {size_name(late[0].scale)} is to run until step {late[0].last}, the last of {steps} steps is "
                f"{steps - 1}; shorten its span or ask for more steps"
            )
        return tuple(sorted({step for span in self.spans for step in (span.first, span.last + 1)} - {steps}))

    def scheduled(self, step: int) -> int:
        """The size of a step, where it is known beforehand."""
        return next((span.scale for span in self.spans if span.first <= step <= span.last), 1)

    def scheduler(self, denoiser: Guided) -> PatchScheduler:
        """What chooses the size by the latents."""
        return PatchScheduler(
            threshold=jnp.float32(self.threshold),
            quantile=jnp.float32(self.quantile),
            patch=denoiser.model.config.patch,
            scales=self.sizes,
            order=self.order,
            held=0 if denoiser.held is None else denoiser.held.shape[1],
        )

    def check(self, stacks: tuple[int, ...], parts: Mapping[str, Part]) -> None:
        """UserError for a model without adapters of these sizes."""
        known = scales_of(parts[self.name].settings) if self.name in parts else ()
        missing = [size_name(scale) for scale in self.variants if scale > 1 and scale not in known]
        if missing and known and self.by_latents:
            raise UserError(
                f"ddit chooses among patches of {written_sizes(self.sizes)}, and this model has adapters for "
                f"{written_sizes(known)} alone: say ddit:sizes={written_sizes(known)}"
            )
        if missing:
            raise UserError(
                f"ddit needs adapters for patches of {' and '.join(missing)}, which this model has not: attach "
                "untrained ones with `dit-adapt --add ddit`, or name a model that has them"
            )

    def measured(self, record: RunRecord) -> list[float]:
        """The share of the base size's tokens that each step had."""
        scales = record.variants if self.by_latents else map(self.scheduled, range(record.steps))
        return [scale**-2 for scale in scales]

    def step_work(self, work: StepWork, at: StepAt) -> StepWork:
        """Fewer tokens of more cells, at the sizes that are known beforehand or, where latents choose, were measured
        (all tokens, if nothing was). Adapters are not counted."""
        share = at.measured.get(self.name, 1.0) if self.by_latents else self.scheduled(at.step) ** -2
        fewer = work.in_blocks(
            lambda block: block._replace(
                tokens=block.tokens * share, projected=block.projected * share, keys=block.keys * share
            )
        )
        return fewer._replace(tokens=work.tokens * share, cells=work.cells / share)

    def kept_bytes(self, config: Config, shape: Shape) -> int:
        return 0

    def applied(self, denoiser: Guided, run: Run) -> Guided:
        if run.variant == 1:
            return denoiser
        self.check((), run.parts)
        adapter = adapters_from(denoiser.model.config, run.parts[self.name])[size_name(run.variant)]
        model = adapted(denoiser.model, adapter, run.variant)
        return replace(denoiser, model=model, residual=adapter.residual)


def token_counts(latents_shape: tuple[int, ...], patch: Patch, scales: tuple[int, ...] = (1, *SCALES)) -> np.ndarray:
    """Tokens at each size, the base size first; a patch that the lattice does not fill counts."""
    time, rows, columns = patch
    return np.array([np.prod(grid(latents_shape, (time, rows * scale, columns * scale))) for scale in scales])


def calibrated_threshold(values_RSQ: np.ndarray, tokens: np.ndarray, wanted: float) -> float:
    """The τ whose choices have a mean token count nearest to `wanted`, from values recorded in runs at any sizes.

    values_RSQ  what a `PatchScheduler` chose by, of R samples and S steps, sizes from small to large
    tokens      tokens at the base size and at each of the Q sizes
    UserError if no τ can reach it within the range from all large patches to all base ones.
    """
    values = np.asarray(values_RSQ, np.float64).reshape(-1, values_RSQ.shape[-1])
    finite = np.unique(values[np.isfinite(values)])
    # τ between neighbouring values, below the least and above the largest: all that can differ.
    candidates = np.concatenate([finite[:1] / 2, (finite[:-1] + finite[1:]) / 2, finite[-1:] * 2])
    if not len(candidates):
        raise UserError("no step was chosen for: expected runs of at least four steps; record longer ones")

    def mean(threshold: float) -> float:
        return mean_tokens(values, tokens, threshold)

    least, most = mean(candidates[-1]), mean(candidates[0])
    if not least <= wanted <= most:
        raise UserError(
            f"a mean of {wanted:g} tokens is out of reach: expected {least:.0f} to {most:.0f}; choose one of these"
        )
    # The mean falls as τ grows.
    after = bisect.bisect_left(candidates, True, key=lambda threshold: mean(threshold) <= wanted)
    nearest = min(candidates[max(after - 1, 0) : after + 1], key=lambda threshold: abs(mean(threshold) - wanted))
    return float(nearest)


def mean_tokens(values: np.ndarray, tokens: np.ndarray, threshold: float) -> float:
    """Mean token count over steps that were chosen for by these values [..., Q]."""
    sizes = np.arange(1, values.shape[-1] + 1)
    return float(np.mean(tokens[np.max((values < threshold) * sizes, axis=-1)]))


def read_threshold(path: Path) -> Ddit:
    """What a file of `dit-calibrate ddit` chooses by, and the number of steps and the solver that it is for."""
    remedy = "calibrate again with `dit-calibrate ddit`, or write ddit:tau=T"
    try:
        told = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: expected a file with DDiT's threshold, found {error.strerror}; {remedy}") from None
    except ValueError:
        raise UserError(f"{path}: expected JSON with DDiT's threshold, found something else; {remedy}") from None
    told = told if isinstance(told, dict) else {}
    tau, rho, steps, solver = (told.get(name) for name in ("tau", "rho", "steps", "solver"))
    order, sizes = told.get("order", Ddit().order), told.get("sizes", written_sizes(SCALES))
    if not _is_number(tau, math.inf) or not _is_number(rho, 1) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"{path}: expected `tau` from 0, `rho` from 0 to 1 and a number of `steps`; {remedy}")
    solvers = SOLVERS if solver is not None else (None,)
    for name, value, known in (("solver", solver, solvers), ("order", order, (1, 2, 3)), ("sizes", sizes, CHOICES)):
        if value not in tuple(known):
            expected = ", ".join(map(str, known))
            raise UserError(f"{path}: expected `{name}` to be one of {expected}, found {value!r}; {remedy}")
    return Ddit(
        threshold=tau, quantile=rho, order=order, sizes=CHOICES[sizes], calibrated_for=steps, calibrated_with=solver
    )


def _is_number(value: Any, most: float) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def parse_ddit(words: Words) -> Ddit:
    """`ddit`, `ddit:tau=0.001:rho=0.4:sizes=2p`, as calibrated, `ddit:ddit.json`, or steps known beforehand,
    `ddit:2p@0-19/4p@20-29` (others at p)."""
    usual = Ddit()
    if words.first is None:
        ddit = replace(
            usual,
            order=int(words.choice("order", str(usual.order), ("1", "2", "3"))),
            sizes=CHOICES[words.choice("sizes", written_sizes(SCALES), tuple(CHOICES))],
            threshold=words.number("tau", usual.threshold, low=0, high=float("inf")),
            quantile=words.number("rho", usual.quantile, low=0, high=1),
        )
    elif Path(words.first).suffix == ".json":
        ddit = read_threshold(Path(words.first))
    else:
        ddit = replace(usual, spans=_spans(words, words.first))
    words.finish()
    return ddit


def _spans(words: Words, text: str) -> tuple[Span, ...]:
    sizes = "|".join(size_name(scale) for scale in SCALES)
    found = [re.fullmatch(rf"({sizes})@(\d+)-(\d+)", part) for part in text.split("/")]
    spans = sorted((Span(int(m[1][:-1]), int(m[2]), int(m[3])) for m in found if m), key=lambda span: span.first)
    if not all(found) or any(span.last < span.first for span in spans):
        expected = f"expected sizes ({sizes.replace('|', ' or ')}) and their first and last step, found {text!r}"
        raise words.error(expected, "write 2p@0-19/4p@20-29, tau= and rho=, or FILE.json")
    for one, other in itertools.pairwise(spans):
        if other.first <= one.last:
            raise words.error(f"step {other.first} has two sizes", "let spans not overlap")
    return tuple(spans)
