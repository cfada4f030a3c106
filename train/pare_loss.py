"""The losses of PARE's stages I and II: a narrower student, then a routed one, against the model that it was made from
(arXiv 2605.27336).

Shapes: B samples, M tokens with padding, P tapped blocks, D width, G blocks, T Y X latent grid, C latent channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.methods.routing import Router, Routing, budget, content_features, straight_through_gates
from dit_jax.models.network import Aux, grid
from dit_jax.sampling.schedules import TRAIN_STEPS
from train.losses import Batch, FlowSettings, Metrics, Models, Noised, conditioning_of, mean_square, noised, predicted


@dataclass(frozen=True, kw_only=True)
class PareWeights:
    """Weights of the terms; the paper's for text to video."""

    features: float = 10.0
    teacher: float = 6.0
    data: float = 1.0
    motion: float = 8.0


TEXT_TO_VIDEO = PareWeights()
IMAGE_TO_VIDEO = PareWeights(motion=4.0)


@dataclass(frozen=True, kw_only=True)
class PareSettings:
    """Settings of both stages.

    flow            noise levels, and how both networks are called
    sampled_blocks  of how many blocks, others at every step, the outputs are compared
    outliers        a token whose norm lies so many standard deviations above the mean is not compared
    routing         how many blocks a routed student runs
    """

    flow: FlowSettings = field(default_factory=FlowSettings)
    weights: PareWeights = TEXT_TO_VIDEO
    sampled_blocks: int = 4
    outliers: float = 3.0
    routing: Routing = field(default_factory=Routing)


def pare(
    trained: Models, frozen: Models, batch: Batch, key: jax.Array, *, settings: PareSettings
) -> tuple[jax.Array, Metrics]:
    """L = w_f·L_feat + w_t·|v_S − v_T|² + w_d·|v_S − (ε − x0)|² + w_τ·|Δ_F v_S − Δ_F v_T|², means over elements.

    trained["student"], and in stage II trained["router"]: the student is gated by it, and features are compared on
    blocks that it runs. frozen["teacher"] has as many blocks of the same width. Latents of one frame, such as an
    image's, have no last term.
    """
    student, teacher = trained["student"], frozen["teacher"]
    noise_key, tap_key = jax.random.split(key)
    at = noised(batch["latents"], noise_key, settings.flow)
    taps = drawn_blocks(tap_key, sum(student.stacks), settings.sampled_blocks)
    gates = router_gates(trained["router"], at, batch, settings.routing) if "router" in trained else None
    target, of_teacher = jax.lax.stop_gradient(predicted(teacher, at, batch, settings.flow.call, Aux(taps=taps)))
    found, of_student = predicted(student, at, batch, settings.flow.call, Aux(taps=taps, gates=gates))
    assert of_teacher.taps is not None and of_student.taps is not None
    runs = None if gates is None else jax.lax.stop_gradient(gates).T[taps]
    tokens = math.prod(grid(at.latents.shape, student.config.patch))
    terms = {
        "loss_features": feature_distance(of_student.taps, of_teacher.taps, tokens, runs, settings.outliers),
        "loss_teacher": mean_square(found - target, at.held),
        "loss_data": mean_square(found - at.velocity, at.held),
    }
    if at.latents.shape[1] > 1:
        terms["loss_motion"] = mean_square(jnp.diff(found - target, axis=1), at.held)
    loss = sum(getattr(settings.weights, name.removeprefix("loss_")) * term for name, term in terms.items())
    return loss, terms | jax.lax.stop_gradient(active_blocks(gates))


def drawn_blocks(key: jax.Array, blocks: int, count: int) -> jax.Array:
    """Indexes of `count` different blocks (all, where there are no more) [P]."""
    return jax.random.choice(key, blocks, (min(count, blocks),), replace=False)


def router_gates(router: Router, at: Noised, batch: Batch, routing: Routing) -> jax.Array:
    """Gates of every sample's blocks at its noise level [B, G], to train by (`straight_through_gates`)."""
    t = at.levels * TRAIN_STEPS
    content = content_features(router.config.content, at.latents, conditioning_of(batch), branches=1)
    return straight_through_gates(router(t, content), budget(t, *routing.limits(router.config.blocks))[:, None])


def active_blocks(gates: jax.Array | None) -> Metrics:
    """How many blocks run on average, and in what share of the samples each does [G]; nothing without a router."""
    if gates is None:
        return {}
    return {"active_blocks": jnp.mean(jnp.sum(gates, axis=1)), "active_by_block": jnp.mean(gates, axis=0)}


def feature_distance(
    student_PBMD: jax.Array,
    teacher_PBMD: jax.Array,
    tokens: int,
    runs_PB: jax.Array | None = None,
    outliers: float = 3.0,
) -> jax.Array:
    """L_feat: squared distance of block outputs, the mean over the channels and usual tokens of a block and sample, and
    then over blocks and samples, those that run alone [] (0 where none does).

    A token is unusual in a block and sample where the norm of the teacher's output lies above mean + `outliers`·std
    over the tokens. Padding, behind the first `tokens`, has no part in anything.
    """
    student, teacher = student_PBMD.astype(jnp.float32), teacher_PBMD.astype(jnp.float32)
    usual = usual_tokens(jnp.linalg.norm(teacher, axis=-1), tokens, outliers)
    error_PBM = jnp.mean(jnp.square(student - teacher), axis=-1)
    of_block_PB = jnp.sum(error_PBM, axis=-1, where=usual) / jnp.sum(usual, axis=-1)
    if runs_PB is None:
        return jnp.mean(of_block_PB)
    return jnp.sum(runs_PB * of_block_PB) / jnp.maximum(jnp.sum(runs_PB), 1)


def usual_tokens(norms_PBM: jax.Array, tokens: int, outliers: float) -> jax.Array:
    """Which of the first `tokens` have a norm of at most mean + `outliers`·std over these [P, B, M]."""
    real = jnp.broadcast_to(np.arange(norms_PBM.shape[-1]) < tokens, norms_PBM.shape)
    mean, deviation = (of(norms_PBM, axis=-1, keepdims=True, where=real) for of in (jnp.mean, jnp.std))
    return real & (norms_PBM <= mean + outliers * deviation)
