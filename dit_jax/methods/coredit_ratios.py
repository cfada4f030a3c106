"""How much each block skips in CoReDiT: ratios allocated from recorded coherence, their file, their buckets (arXiv
2605.14191).

Shapes: B samples, R batch rows (guidance branches included), N tokens, G blocks, S sampler steps.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import UserError
from dit_jax.methods.coherence import Lattice, protected
from dit_jax.models.network import Dense, State, Strategy
from dit_jax.sampling.sampler import Guided

CAP = 0.6  # most of its tokens that a block may skip
STEPS_TO_ALL = 64  # an allocation goes in steps of one part in this many of the tokens: 64 of 4,096


def bucketed(ratios: tuple[float, ...], buckets: int) -> tuple[float, ...]:
    """The ratios with at most `buckets` different values: each the mean of its group, so that their mean stays.

    Groups are made by cutting the widest one at its largest gap until there are enough.
    """
    groups = [sorted(ratios)]
    while len(groups) < buckets and (widest := max(groups, key=lambda group: group[-1] - group[0]))[0] < widest[-1]:
        cut = int(np.argmax(np.diff(widest))) + 1
        groups.remove(widest)
        groups += [widest[:cut], widest[cut:]]
    # A mean of equal numbers may differ from them in the last bit.
    means = [group[0] if group[0] == group[-1] else sum(group) / len(group) for group in groups]
    of_ratio = {ratio: mean for group, mean in zip(groups, means, strict=True) for ratio in group}
    return tuple(of_ratio[ratio] for ratio in ratios)


def next_block(sorted_GN: np.ndarray, skipped_G: np.ndarray, more: int, most: int) -> int | None:
    """The block that skips `more` tokens more at the least loss: the one of the largest ΔR, the sum of the coherence of
    its next `more` tokens; None where that would exceed `most` in every block.

    sorted  coherence of the tokens that a block may skip, falling
    """
    gains = [
        tokens[skip : skip + more].sum() if skip + more <= most else -np.inf
        for tokens, skip in zip(sorted_GN, skipped_G, strict=True)
    ]
    best = int(np.argmax(gains))
    return None if gains[best] == -np.inf else best


def ramped(
    sorted_GN: np.ndarray, skipped_G: np.ndarray, ratio: float, most: int, more: int | None = None
) -> np.ndarray:
    """Tokens that each block skips [G] after one turn of the ramp: `next_block` skips `more`, the last time as many as
    the mean of `ratio` over blocks still lacks. Unchanged where that is reached, or where no block may skip more.

    more  one part in 64 of the tokens, if None
    """
    skipped = np.array(skipped_G, int)
    more = _turn(skipped, sorted_GN.shape[1], ratio, more)
    block = next_block(sorted_GN, skipped, more, most) if more > 0 else None
    if block is not None:
        skipped[block] += more
    return skipped


def ramped_alike(skipped_G: np.ndarray, tokens: int, ratio: float, most: int, more: int | None = None) -> np.ndarray:
    """`ramped` without a look at coherence (the paper's uniform ratios): of `tokens` a block, as many more are skipped
    in all, each by the block that skips fewest, the first of several."""
    skipped = np.array(skipped_G, int)
    for _ in range(_turn(skipped, tokens, ratio, more)):
        block = int(np.argmin(skipped))
        skipped[block] = min(skipped[block] + 1, most)
    return skipped


def _turn(skipped_G: np.ndarray, tokens: int, ratio: float, more: int | None) -> int:
    """Tokens that all blocks together skip more after one turn of the ramp; 0 or less where `ratio` is reached."""
    left = round(ratio * tokens * len(skipped_G)) - int(skipped_G.sum())
    return min(max(tokens // STEPS_TO_ALL, 1) if more is None else more, left)


def allocate(sorted_GN: np.ndarray, ratio: float, most: int) -> np.ndarray:
    """Tokens that each block skips [G], so that the mean over blocks is `ratio` of all: the whole ramp at once."""
    skipped, before = np.zeros(len(sorted_GN), int), None
    while before is None or (skipped != before).any():
        skipped, before = ramped(sorted_GN, skipped, ratio, most), skipped
    return skipped


def most_skipped(lattice: Lattice) -> int:
    """The most tokens of a lattice that a block may be given: the paper's cap, or all that are never protected."""
    return min(int(CAP * lattice.tokens), lattice.most_skipped)


@dataclass(frozen=True)
class Recorder:
    """Attention (dense, or another without a state) that adds up, in the state of the block loop [G, R, N], the
    coherence of what may be skipped, sorted: protected tokens are behind with 0."""

    lattice: Lattice
    attention: Strategy = Dense()

    def __call__(self, attention, x_BMD, place, block, cache, aux):
        coherence = self.lattice.coherence(x_BMD[:, : self.lattice.tokens], block)
        protects = jnp.asarray(protected(self.lattice))[block % self.lattice.stride]
        falling = -jnp.sort(jnp.where(protects, jnp.inf, -coherence), axis=1)
        attended, _ = self.attention(attention, x_BMD, place, block, None, aux)
        return attended, cache.at[block].add(jnp.where(jnp.isinf(falling), 0, falling))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("guided",), meta_fields=("lattice",))
@dataclass(frozen=True, kw_only=True)
class Recording:
    """The plain model; its state is the sum of the sorted coherence of every block over the steps so far [G, R, N]."""

    guided: Guided
    lattice: Lattice

    def init(self, latents, before=None):
        rows = latents.shape[0] * self.guided.branches
        return jnp.zeros((sum(self.guided.model.stacks), rows, self.lattice.tokens), jnp.float32)

    def __call__(self, latents, state, step):
        recorder = replace(self.guided, call=replace(self.guided.call, attention=Recorder(self.lattice)))
        velocity, after = recorder(latents, State(attention=state), step)
        return velocity, after.attention

    def finish(self, latents):
        return self.guided.finish(latents)


class Ratios(NamedTuple):
    """What a file of ratios holds: those of the blocks of the first transformer, of the others by name, the stride."""

    ratios: tuple[float, ...]
    experts: tuple[tuple[str, tuple[float, ...]], ...]
    stride: int


def ratios_file(ratios: Mapping[str, list[float]], stride: int) -> dict[str, Any]:
    """Ratios of the blocks of each transformer as JSON that `read_ratios` reads."""
    (_, first), *others = ratios.items()
    return {"ratios": first, "stride": stride} | ({"experts": dict(others)} if others else {})


def read_ratios(path: Path) -> Ratios:
    """A file of `dit-calibrate coredit`; UserError for any other."""
    try:
        told = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"cannot read the ratios in {str(path)!r}: {error.strerror}; expected a number such as coredit:0.45, or a "
            "file that dit-calibrate coredit writes"
        ) from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is no JSON ({error}): expected ratios of dit-calibrate coredit") from error
    return ratios_of(told if isinstance(told, dict) else {}, repr(str(path)))


def ratios_of(told: Mapping[str, Any], source: str) -> Ratios:
    """The ratios in the contents of such a file; UserError, which names the source, where there are none."""
    ratios, experts = told.get("ratios", []), told.get("experts", {})
    if not _are_ratios(ratios) or not isinstance(experts, dict) or not all(map(_are_ratios, experts.values())):
        raise UserError(f'{source} has no ratios: expected {{"ratios": [number of every block]}}; calibrate again')
    for ratio in itertools.chain(ratios, *experts.values()):
        if not 0 <= ratio <= CAP:
            raise UserError(f"{source}: expected ratios from 0 to {CAP}, found {ratio!r}; calibrate again")
    stride = told.get("stride", 3)
    if not isinstance(stride, int) or stride < 2:
        raise UserError(f"{source} has stride {stride!r}: expected a whole number from 2; calibrate again")
    others = tuple((name, tuple(map(float, of_expert))) for name, of_expert in experts.items())
    return Ratios(tuple(map(float, ratios)), others, stride)


def _are_ratios(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(ratio, int | float) and not isinstance(ratio, bool) for ratio in value)
