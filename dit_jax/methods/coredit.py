"""CoReDiT: tokens that are like their neighbours leave self-attention, and their outputs are made of those that stay
(arXiv 2605.14191).

Cross-attention, MLP and the residual stream stay dense. Skipped tokens are not projected at all; text that shares the
attention stays.

Shapes: B samples, R batch rows (guidance branches included), N tokens, M tokens with padding, D width, G blocks, S
sampler steps.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import UserError
from dit_jax.flops import Config, Shape, StepAt, StepWork
from dit_jax.methods.coherence import Lattice, cell_sizes, kept, taken, with_zeros
from dit_jax.methods.coredit_ratios import CAP, Ratios, bucketed, ratios_of, read_ratios
from dit_jax.methods.method import Part, Run, Words
from dit_jax.models.network import Attended, Dense, attended, grid, padded_length
from dit_jax.ops import mesh as meshes
from dit_jax.sampling.sampler import Guided

Selection = Literal["coherence", "random"]
Rebuilding = Literal["mean", "none"]
Branches = Literal["own", "shared"]
MOST_SEED = 2**31


class RandomOrder(NamedTuple):
    """What random selection is told: the bucket of every block [G], and the random key of the step."""

    buckets: jax.Array
    key: jax.Array


@dataclass(frozen=True)
class Coherent:
    """Attention without the tokens that are most like their cell; the others alone are projected.

    lattice  the tokens, in raster order with padding behind
    skipped  tokens to skip, one number a bucket; `aux` is the bucket of every block [G], and is not read where there
             is one bucket
    select   `random`: unprotected tokens are skipped by lot, and `aux` is a `RandomOrder`
    rebuild  `none`: the output of skipped tokens is zero
    rows     guidance branches of a sample, next to each other
    shared   whether these skip the same tokens: those of the largest mean over them
    """

    lattice: Lattice
    skipped: tuple[int, ...]
    select: Selection = "coherence"
    rebuild: Rebuilding = "mean"
    rows: int = 1
    shared: bool = False

    def __call__(self, attention, x_BMD, place, block, cache, aux):
        if self.skipped == (0,):
            return Dense()(attention, x_BMD, place, block, cache, None)
        buckets, key = aux if self.select == "random" else (aux, None)

        def ranked():
            coherence = self.lattice.coherence(x_BMD[:, : self.lattice.tokens], block)
            likes = coherence if key is None else self._lots(key, block, coherence.shape)
            if self.shared:
                of_samples = likes.reshape(-1, self.rows, self.lattice.tokens).mean(axis=1)
                likes = jnp.repeat(of_samples, self.rows, axis=0)
            return coherence, self.lattice.skipping_order(likes, block)

        if len(self.skipped) == 1:
            return self._bucket(attention, x_BMD, place, *ranked(), skipped=self.skipped[0]), cache
        skips = jnp.asarray(self.skipped)[buckets[block]] > 0
        unranked = jax.tree.map(lambda of_all: jnp.zeros(of_all.shape, of_all.dtype), jax.eval_shape(ranked))
        ranking = jax.lax.cond(skips, ranked, lambda: unranked)
        bucket = functools.partial(self._bucket, attention, x_BMD, place, *ranking)
        return jax.lax.switch(buckets[block], [functools.partial(bucket, skipped=skip) for skip in self.skipped]), cache

    def _bucket(self, attention, x_BMD, place, coherence, order, *, skipped: int) -> Attended:
        if skipped == 0:
            return Dense()(attention, x_BMD, place, None, None, None)[0]
        lattice = self.lattice
        stay = kept(order, skipped, padded_length(lattice.tokens - skipped))
        x, rope = jax.tree.map(lambda of_all: meshes.constrain_tokens(taken(of_all, stay.rows)), (x_BMD, place.rope))
        found = attended(attention, attention.qkv(x, rope), place.context, stay.valid)
        slots = jnp.maximum(jnp.cumsum(stay.mask, axis=1) - 1, 0)
        if self.rebuild == "none":
            y = with_zeros(found.tokens, slots, stay.mask)
        else:
            y = lattice.reconstructed(found.tokens, slots, stay.mask, coherence)
        return found._replace(tokens=_padded(y, x_BMD.shape[1]))

    def _lots(self, key: jax.Array, block: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A number in [0, 1) for every token of a block [B, N], others in each guidance branch. Every sample has the
        same ones, so that what it skips does not depend on its place in the batch."""
        of_branches = jax.random.uniform(jax.random.fold_in(key, block), (self.rows, shape[1]))
        return jnp.tile(of_branches, (shape[0] // self.rows, 1))


@dataclass(frozen=True)
class MaskedCoherent:
    """The same by masks, for training: every token is projected, skipped keys are masked and skipped outputs
    overwritten, so that `aux`, the tokens to skip in every block [G], or in every block of every row [G, R], may be
    traced."""

    lattice: Lattice

    def __call__(self, attention, x_BMD, place, block, cache, aux):
        tokens = self.lattice.tokens
        coherence = self.lattice.coherence(x_BMD[:, :tokens], block)
        rank = jnp.argsort(self.lattice.skipping_order(coherence, block), axis=1)
        stay = rank >= aux[block][..., None]
        valid = jnp.pad(stay, ((0, 0), (0, x_BMD.shape[1] - tokens)))
        found = attended(attention, attention.qkv(x_BMD, place.rope), place.context, valid)
        slots = jnp.broadcast_to(jnp.arange(tokens), stay.shape)
        y = self.lattice.reconstructed(found.tokens[:, :tokens], slots, stay, coherence)
        return found._replace(tokens=_padded(y, x_BMD.shape[1])), cache


def _padded(y_BND: jax.Array, count: int) -> jax.Array:
    return meshes.constrain_tokens(jnp.pad(y_BND, ((0, 0), (0, count - y_BND.shape[1]), (0, 0))))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("table",), meta_fields=())
@dataclass(frozen=True)
class Buckets:
    """Tells the attention the bucket of every block at a step: int32 [S, G]."""

    table: jax.Array

    def __call__(self, aux, seen, step, conditioning):
        return aux._replace(attention=self.table[step.index])


@functools.partial(jax.tree_util.register_dataclass, data_fields=("seed",), meta_fields=())
@dataclass(frozen=True)
class RandomOrders:
    """Adds a random key of the step to what `Buckets` tells: every step and block skips other tokens.

    seed  uint32 [], data: another one compiles nothing
    """

    seed: jax.Array

    def __call__(self, aux, seen, step, conditioning):
        key = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), step.index)
        return aux._replace(attention=RandomOrder(aux.attention, key))


@dataclass(frozen=True, kw_only=True)
class Coredit:
    """CoReDiT as a plan has it.

    ratios      share of the tokens that each block skips; one number is every block's, none are the checkpoint's own
    experts     those of further transformers, by name (Wan 2.2), where they have their own
    late        what the ratios are multiplied with in the last steps
    late_share  of the steps that are the last ones
    buckets     different ratios that blocks may have; ratios are rounded to the means of as many groups
    stride      one token in this many, along rows and columns, is never skipped
    sub_cell    side of the cells that skipped tokens are reconstructed in
    select      which of the unprotected tokens are skipped: the most coherent, or (the paper's ablation) random ones
    rebuild     what takes a skipped token's place: the mean of its sub-cell, or (the paper's ablation) zero
    branches    whether each guidance branch of a sample skips tokens of its own or both the same
    seed        of random selection
    """

    ratios: tuple[float, ...] = ()
    experts: tuple[tuple[str, tuple[float, ...]], ...] = ()
    late: float = 0.25
    late_share: float = 0.25
    buckets: int = 4
    stride: int = 3
    sub_cell: int = 3
    select: Selection = "coherence"
    rebuild: Rebuilding = "mean"
    branches: Branches = "own"
    seed: int = 0

    name: ClassVar[str] = "coredit"
    solver: ClassVar[str | None] = None
    steps: ClassVar[int | None] = None

    def told(self, parts: Mapping[str, Part]) -> Coredit:
        """With the checkpoint's own ratios, those of all its transformers, where the plan has none; UserError where
        the checkpoint has none either."""
        if self.ratios:
            return self
        if self.name not in parts:
            raise UserError(
                "coredit needs ratios, which the model lacks: expected them in its folder methods/coredit; write "
                "coredit:0.45, or coredit:ratios.json with a file of `dit-calibrate coredit`"
            )
        return replace(self, **ratios_of(parts[self.name].settings, "methods/coredit/config.json")._asdict())

    def check(self, stacks: tuple[int, ...], parts: Mapping[str, Part]) -> None:
        """UserError where the ratios are of another number of blocks."""
        blocks = sum(stacks)
        for ratios in (self.ratios, *dict(self.experts).values()):
            if len(ratios) not in (1, blocks):
                raise UserError(
                    f"coredit has ratios of {len(ratios)} blocks: expected {blocks}, as many as the model has; "
                    "calibrate with this model"
                )

    def lattice(self, latents_shape, patch) -> Lattice:
        """The tokens of such latents."""
        tokens = grid(latents_shape, patch)
        return Lattice(grid=tokens, cells=cell_sizes(tokens), stride=self.stride, sub_cell=self.sub_cell)

    def late_steps(self, steps: int) -> int:
        """How many steps of so many are the last ones: `late_share` of them, rounded down."""
        return int(Fraction(self.late_share).limit_denominator(10_000) * steps)

    def skipped(self, lattice: Lattice, blocks: int, steps: int) -> np.ndarray:
        """Tokens that each block of each transformer skips at each step [E, S, G]."""
        every = [np.broadcast_to(ratios, blocks) for ratios in (self.ratios, *dict(self.experts).values())]
        rounded = bucketed(tuple(np.concatenate(every).tolist()), self.buckets)
        early = np.reshape(rounded, (len(every), 1, blocks))
        late = np.arange(steps)[:, None] >= steps - self.late_steps(steps)
        wanted = np.rint(np.where(late, self.late * early, early) * lattice.tokens)
        # So much of a small lattice may be protected that less is left than the ratio asks for.
        return np.minimum(wanted, lattice.most_skipped).astype(np.int64)

    def step_work(self, work: StepWork, at: StepAt) -> StepWork:
        """Self-attention, its projections included, is of the tokens that are kept."""
        late = at.step >= at.steps - self.late_steps(at.steps)
        ratios = dict(self.experts).get(at.component, self.ratios)
        kept = 1 - np.broadcast_to(ratios, len(work.blocks)) * (self.late if late else 1)
        return work._replace(
            blocks=tuple(
                block._replace(projected=block.projected * float(share), keys=block.keys * float(share))
                for block, share in zip(work.blocks, kept, strict=True)
            )
        )

    def kept_bytes(self, config: Config, shape: Shape) -> int:
        return 0

    def applied(self, denoiser: Guided, run: Run) -> Guided:
        model = denoiser.model
        lattice = self.lattice(run.latents_shape, model.config.patch)
        skipped = self.skipped(lattice, sum(model.stacks), run.steps)
        # The same buckets for all experts, so that they share a program.
        levels, table = in_buckets(skipped)
        attention = Coherent(
            lattice,
            levels,
            select=self.select,
            rebuild=self.rebuild,
            rows=denoiser.branches,
            shared=self.branches == "shared",
        )
        expert = 1 + list(dict(self.experts)).index(run.component) if run.component in dict(self.experts) else 0
        told: tuple = (Buckets(jnp.asarray(table[expert], jnp.int32)),)
        if self.select == "random":
            told += (RandomOrders(jnp.uint32(self.seed)),)
        call = replace(denoiser.call, attention=attention)
        return replace(denoiser, call=call, steering=denoiser.steering + told)


def in_buckets(skipped: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """(the different numbers of skipped tokens, rising; which of them each is, in the shape of `skipped`)."""
    levels, table = np.unique(skipped, return_inverse=True)
    return tuple(int(level) for level in levels), table.reshape(skipped.shape)


def parse_coredit(words: Words) -> Coredit:
    """`coredit:0.45` (in every block), `coredit:ratios.json` (as dit-calibrate writes it), `coredit` (the checkpoint's
    own ratios); for ablations `select=random:seed=1` and `rebuild=none`."""
    usual = Coredit()
    told = _ratios(words, usual)
    select = words.choice("select", usual.select, get_args(Selection))
    if select != "random" and "seed" in words.options:
        raise words.error("found seed=, which only select=random reads", "remove it, or add select=random")
    coredit = Coredit(
        **told._asdict(),
        late=words.number("late", usual.late, low=0, high=1),
        late_share=words.number("late_share", usual.late_share, low=0, high=1),
        buckets=words.whole("buckets", usual.buckets, low=1, high=32),
        select=select,
        rebuild=words.choice("rebuild", usual.rebuild, get_args(Rebuilding)),
        branches=words.choice("branches", usual.branches, get_args(Branches)),
        seed=words.whole("seed", usual.seed, low=0, high=MOST_SEED),
    )
    words.finish()
    return coredit


def _ratios(words: Words, usual: Coredit) -> Ratios:
    if words.first is None:
        return Ratios(usual.ratios, usual.experts, usual.stride)
    try:
        ratio = float(words.first)
    except ValueError:
        return read_ratios(Path(words.first))
    return Ratios((words.as_number("ratios", repr(ratio), low=0, high=CAP),), (), usual.stride)
