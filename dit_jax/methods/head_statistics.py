"""What PARE measures of attention heads while the plain model runs: norms, and where they look (arXiv 2605.27336).

Shapes: B samples, R batch rows (guidance branches included), N tokens, Q sampled queries, L text tokens, G blocks, H
heads, K head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.network import Attended, State, lattice, with_context
from dit_jax.ops.attention import attend
from dit_jax.sampling.sampler import Guided
from dit_jax.sampling.schedules import TRAIN_STEPS

QUERIES = 256  # sampled a head


class HeadSums(NamedTuple):
    """Sums over steps of means over rows, fp32 [G, H] each.

    The norms are w(t)·‖ṽ‖_F with w(t) = log(1 + t/T), ṽ being a head's attended values before the output projection:
    tokens       of the tokens' own attention
    context      of the text that shares it (FLUX), and `joint` of both together
    cross_text   of cross-attention to the text, `cross_image` to the image (Wan)
    inside       not a norm but the share of attention that falls on the query's own latent frame
    """

    tokens: jax.Array
    context: jax.Array
    joint: jax.Array
    cross_text: jax.Array
    cross_image: jax.Array
    inside: jax.Array


class HeadProbe(NamedTuple):
    """What a step is told: its weight w(t) [] and which tokens are sampled as queries [Q]."""

    weight: jax.Array
    queries: jax.Array


@dataclass(frozen=True)
class Recording:
    """Dense attention that adds up `HeadSums`; `inside` says whether it looks at where heads look."""

    inside: bool

    def __call__(self, attention, x_BMD, place, block, cache: HeadSums, aux: HeadProbe):
        q, k, v = attention.qkv(x_BMD, place.rope)
        if self.inside:
            ratio = intra_slice_ratio(q, k, place.positions[..., 0], aux.queries, place.valid)
            cache = cache._replace(inside=cache.inside.at[block].add(jnp.mean(ratio, axis=0)))
        valid, text = place.valid, None
        if place.context is not None:
            k, v, valid = with_context(place.context, k, v, valid)
            text = attend(place.context.q, k, v, valid)
        y = attend(q, k, v, valid)
        found = {"tokens": _squares(y, place.valid)}
        if text is not None:
            found["context"] = _squares(text, None)
            found["joint"] = found["tokens"] + found["context"]
        return Attended(attention.out(y), text), _added(cache, found, block, aux)

    def watch_cross(self, heads: tuple[jax.Array, ...], place, block, cache: HeadSums, aux: HeadProbe) -> HeadSums:
        """Adds the norms of cross-attention's attended values: to the text, and to the image where there is one."""
        names = ("cross_text", "cross_image")[: len(heads)]
        found = {name: _squares(of_all, place.valid) for name, of_all in zip(names, heads, strict=True)}
        return _added(cache, found, block, aux)


def _squares(y_RNHK: jax.Array, valid_RN: jax.Array | None) -> jax.Array:
    squares = jnp.square(y_RNHK.astype(jnp.float32))
    squares = squares if valid_RN is None else jnp.where(valid_RN[..., None, None], squares, 0)
    return jnp.sum(squares, axis=(1, 3))


def _added(sums: HeadSums, squares: dict[str, jax.Array], block, probe: HeadProbe) -> HeadSums:
    """The sums with the weighted norms of sums of squares [R, H] added, each averaged over the rows."""

    def plus(of_all, squares_RH):
        return of_all.at[block].add(probe.weight * jnp.mean(jnp.sqrt(squares_RH), axis=0))

    return sums._replace(**{name: plus(getattr(sums, name), found) for name, found in squares.items()})


def intra_slice_ratio(q_RNHK, k_RNHK, frame_RN, queries_Q, valid_RN=None) -> jax.Array:
    """Mean over the sampled queries of the attention that falls on keys of their own latent frame [R, H]."""
    scale = q_RNHK.shape[-1] ** -0.5
    same_RQN = frame_RN[:, queries_Q, None] == frame_RN[:, None]
    unseen = None if valid_RN is None else ~valid_RN[:, None]

    def of_head(q_and_k):
        q_RQK, k_RNK = q_and_k
        scores = jnp.einsum("rqk,rnk->rqn", q_RQK, k_RNK, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(scores if unseen is None else jnp.where(unseen, -jnp.inf, scores), axis=-1)
        return jnp.mean(jnp.sum(jnp.where(same_RQN, weights, 0), axis=-1), axis=-1)

    # Head by head: all of them at once would hold as many scores as the plain model's attention never does.
    by_head = jax.lax.map(of_head, (jnp.moveaxis(q_RNHK[:, queries_Q], 2, 0), jnp.moveaxis(k_RNHK, 2, 0)))
    return jnp.moveaxis(by_head, 0, 1)


def sampled_queries(latents_shape: tuple[int, ...], patch: tuple[int, int, int], count: int = QUERIES) -> np.ndarray:
    """Raster indexes of about `count` tokens, as many of every latent frame, evenly spread over it [Q]."""
    positions, tokens = lattice(latents_shape, patch)
    frames = int(positions[:tokens, 0].max()) + 1
    of_frame = tokens // frames
    each = min(max(count // frames, 1), of_frame)
    inside = ((np.arange(each) + 0.5) * of_frame / each).astype(np.int64)
    return (np.arange(frames)[:, None] * of_frame + inside).reshape(-1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("queries",), meta_fields=())
@dataclass(frozen=True, kw_only=True)
class ProbeSteering:
    """Tells every step its weight w(t) = log(1 + t/T), and the sampled queries [Q]."""

    queries: jax.Array

    def __call__(self, aux, seen, step, conditioning):
        return aux._replace(attention=HeadProbe(jnp.log1p(step.t / TRAIN_STEPS), self.queries))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("guided",), meta_fields=())
@dataclass(frozen=True, kw_only=True)
class RecordedHeads:
    """The plain denoiser, with `HeadSums` of its run in its state's `attention`."""

    guided: Guided

    def init(self, latents, before: State | None = None):
        """Each stage has sums of its own: those of another expert are none of its."""
        shape = (sum(self.guided.model.stacks), self.guided.model.config.heads)
        return State(attention=HeadSums(*(jnp.zeros(shape, jnp.float32) for _ in HeadSums._fields)))

    def __call__(self, latents, state, step):
        return self.guided(latents, state, step)

    def finish(self, latents):
        return self.guided.finish(latents)


def recorded(guided: Guided, latents_shape: tuple[int, ...], queries: int = QUERIES) -> RecordedHeads:
    """A denoiser that records its heads; of videos also where they look."""
    sampled = jnp.asarray(sampled_queries(latents_shape, guided.model.config.patch, queries))
    call: Any = replace(guided.call, attention=Recording(inside=latents_shape[1] > 1))
    return RecordedHeads(guided=replace(guided, call=call, steering=(*guided.steering, ProbeSteering(queries=sampled))))
