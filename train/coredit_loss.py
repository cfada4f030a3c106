"""The loss of CoReDiT's fine-tuning while the ratios rise, and the coherence that the ramp goes by (arXiv 2605.14191).

The numbers of skipped tokens are data: the ramp compiles nothing.

Shapes: B samples, N tokens, M tokens with padding, D width, G blocks, P compared blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.methods.coherence import Lattice
from dit_jax.methods.coredit import Coherent, Coredit, MaskedCoherent, in_buckets
from dit_jax.methods.coredit_ratios import Recorder
from dit_jax.models.network import Aux, Dense, State, Strategy, padded_length
from dit_jax.sampling.schedules import shifted
from train.losses import Batch, FlowSettings, Metrics, Models, mean_square, noised, predicted
from train.pare_loss import drawn_blocks


@dataclass(frozen=True, kw_only=True)
class CoreditSettings:
    """Settings of the fine-tuning.

    flow            noise levels, and how both networks are called but for their attention
    stride          one token in this many, along rows and columns, is never skipped
    teacher         weight of the velocity's distance to the teacher's
    attention       weight of the attention outputs' distance to the teacher's
    sampled_blocks  of how many blocks, others at every step, the attention's outputs are compared; None: of all
    late            what the number of skipped tokens is multiplied with where a run's last steps are
    late_share      of a run's steps that are the last ones
    """

    flow: FlowSettings = field(default_factory=FlowSettings)
    stride: int = 3
    teacher: float = 0.5
    attention: float = 0.5
    sampled_blocks: int | None = None
    late: float = Coredit.late
    late_share: float = Coredit.late_share

    def lattice(self, latents_shape: tuple[int, ...], patch: tuple[int, int, int]) -> Lattice:
        """The tokens of such latents."""
        return Coredit(ratios=(0.0,), stride=self.stride).lattice(latents_shape, patch)

    def skipped(self, of_blocks: jax.Array, levels: jax.Array) -> jax.Array:
        """Tokens that blocks skip in samples at these noise levels, int32 [G, B], of those in the early steps [G]."""
        late = levels < shifted(self.late_share, self.flow.shift)
        early = of_blocks[:, None]
        return jnp.where(late, jnp.rint(self.late * early).astype(early.dtype), early)


class Compared(NamedTuple):
    """What a compared attention is told.

    attention  what the attention itself is told
    places     where each block's output is in `teacher` [G]; P where it is not compared
    teacher    attention outputs [P, B, M, D], with one more, which says nothing, where not all blocks are compared
    """

    attention: jax.Array
    places: jax.Array
    teacher: jax.Array


@dataclass(frozen=True)
class OutputRecorder:
    """Dense attention that keeps the outputs of some blocks in its state [P, B, M, D], each at its own of the places
    [G] that it is told."""

    def __call__(self, attention, x_BMD, place, block, cache, aux):
        attended, _ = Dense()(attention, x_BMD, place, block, None, None)
        return attended, jax.lax.dynamic_update_index_in_dim(cache, attended.tokens.astype(cache.dtype), aux[block], 0)


@dataclass(frozen=True)
class ComparedAttention:
    """Another attention, which adds up in its state [] how far its outputs are from a teacher's: the mean square over
    samples, the first `tokens` and channels, of the `count` blocks that are compared."""

    attention: Strategy
    tokens: int
    count: int

    def __call__(self, attention, x_BMD, place, block, cache, aux: Compared):
        attended, _ = self.attention(attention, x_BMD, place, block, None, aux.attention)
        at = aux.places[block]
        teacher = jax.lax.dynamic_index_in_dim(aux.teacher, at, keepdims=False)
        error_BM = jnp.mean(jnp.square(attended.tokens.astype(jnp.float32) - teacher.astype(jnp.float32)), axis=-1)
        real = jnp.broadcast_to(np.arange(error_BM.shape[1]) < self.tokens, error_BM.shape)
        return attended, cache + jnp.where(at < self.count, jnp.mean(error_BM, where=real), 0)


def coredit(
    trained: Models, frozen: Models, batch: Batch, key: jax.Array, *, settings: CoreditSettings
) -> tuple[jax.Array, Metrics]:
    """L = |v_S − (ε − x0)|² + w·|v_S − v_T|² + w'·mean over blocks of |attn_S − attn_T|², means over elements.

    trained["student"] runs the masked form of CoReDiT, in which each block skips as many tokens as batch["skipped"]
    says (int32 [G], traced, at most `most_skipped`), fewer in samples at the noise levels of a run's last steps;
    frozen["teacher"] is dense. Attention outputs are projected, not yet gated; FLUX's are the image's, in a single
    block without the MLP's part.

    Memory beyond that of flow matching: the teacher's attention outputs, once, as many bytes as its tokens have in all
    compared blocks; of the student's there is one at a time where blocks are recomputed (`remat`). `sampled_blocks`
    bounds it where that is too much: the same mean, estimated.
    """
    student, teacher, call = trained["student"], frozen["teacher"], settings.flow.call
    noise_key, block_key = jax.random.split(key)
    at = noised(batch["latents"], noise_key, settings.flow)
    lattice = settings.lattice(at.latents.shape, student.config.patch)
    blocks = sum(student.stacks)
    places, count = compared_blocks(block_key, blocks, settings.sampled_blocks)
    shape = (min(count + 1, blocks), len(at.latents), padded_length(lattice.tokens), student.config.width)
    nothing = State(attention=jnp.zeros(shape, teacher.patch.kernel[...].dtype))
    recording = replace(call, attention=OutputRecorder())
    target, kept = jax.lax.stop_gradient(predicted(teacher, at, batch, recording, Aux(attention=places), nothing))
    comparing = ComparedAttention(MaskedCoherent(lattice), lattice.tokens, count)
    skipped = settings.skipped(batch["skipped"], at.levels)
    aux = Aux(attention=Compared(skipped, places, kept.attention))
    none_yet = State(attention=jnp.float32(0))
    found, distance = predicted(student, at, batch, replace(call, attention=comparing), aux, none_yet)
    terms = {
        "loss_data": mean_square(found - at.velocity, at.held),
        "loss_teacher": mean_square(found - target, at.held),
        "loss_attention": distance.attention / count,
    }
    loss = terms["loss_data"] + settings.teacher * terms["loss_teacher"] + settings.attention * terms["loss_attention"]
    shares = batch["skipped"] / lattice.tokens
    return loss, terms | {"skipped_share": jnp.mean(shares), "skipped_by_block": shares}


def gathered(
    student, teacher, batch: Batch, key: jax.Array, *, settings: CoreditSettings, ratios: tuple[float, ...]
) -> Metrics:
    """The student as it is sampled, with the kept tokens gathered and its ratios rounded to those of a plan:
    `gathered_error`, the relative distance [] of its velocities from those of the masked form at the same ratios, and
    `gathered_loss_teacher`, their mean square from the teacher's []. At the noise that `coredit` would draw."""
    call, noise_key = settings.flow.call, jax.random.split(key)[0]
    at = noised(batch["latents"], noise_key, settings.flow)
    lattice = settings.lattice(at.latents.shape, student.config.patch)
    plan = Coredit(ratios=ratios, stride=settings.stride)
    skipped = plan.skipped(lattice, sum(student.stacks), steps=1)[0, 0]
    levels, buckets = in_buckets(skipped)
    gathering = Coherent(lattice, levels)

    def velocity(model, attention: Strategy, aux: Aux = Aux()) -> jax.Array:
        return predicted(model, at, batch, replace(call, attention=attention), aux)[0]

    masked = velocity(student, MaskedCoherent(lattice), Aux(attention=jnp.asarray(skipped, jnp.int32)))
    found = velocity(student, gathering, Aux(attention=jnp.asarray(buckets, jnp.int32)))
    return {
        "gathered_error": jnp.linalg.norm(found - masked) / jnp.linalg.norm(masked),
        "gathered_loss_teacher": mean_square(found - velocity(teacher, Dense()), at.held),
    }


def compared_blocks(key: jax.Array, blocks: int, count: int | None) -> tuple[jax.Array, int]:
    """(the place of each block among those that are compared, P where it is none of them [G]; how many P are)."""
    if count is None or count >= blocks:
        return jnp.arange(blocks), blocks
    chosen = drawn_blocks(key, blocks, count)
    return jnp.full(blocks, count).at[chosen].set(jnp.arange(count)), count


def sorted_coherence(student, batch: Batch, key: jax.Array, *, settings: CoreditSettings) -> jax.Array:
    """Coherence, falling, of the tokens that each block may skip, 0 behind them [G, N]: the mean over the batch, at the
    noise that `coredit` would draw from this key, of the student as it runs now (batch["skipped"]).

    `ramped` of these gives a block more tokens to skip.
    """
    at = noised(batch["latents"], jax.random.split(key)[0], settings.flow)
    lattice = settings.lattice(at.latents.shape, student.config.patch)
    call = replace(settings.flow.call, attention=Recorder(lattice, MaskedCoherent(lattice)))
    nothing = State(attention=jnp.zeros((sum(student.stacks), len(at.latents), lattice.tokens)))
    skipped = settings.skipped(batch["skipped"], at.levels)
    _, state = predicted(student, at, batch, call, Aux(attention=skipped), nothing)
    return jnp.mean(state.attention, axis=1)
