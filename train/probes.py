"""What linear probes of a text encoder are asked about captions of digits, and how their answers are scored.

A probe's scores [..., sum(sizes)] answer several questions at once, one of `sizes` choices each; `classes`
[..., len(sizes)] are the right answers, -1 where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from infer.digit_grammar import BACKGROUNDS, COLOURS, RELATIONS, Digit, Scene

PLACES = ("alone", *RELATIONS)
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def digit_places(text: str) -> list[int]:
    """Where the first and the last digit of a caption stand, in tokens of a tokenizer of whole words."""
    found = [place for place, word in enumerate(text.split()) if word[0].isdigit()]
    return [found[0], found[-1]]


def digit_classes(scene: Scene, third: Callable[[Digit], int]) -> list[list[int]]:
    """Value, colour, what `third` says and place of both digits of a scene; -1 four times for one that is not there."""
    seats = ["alone"] if scene.relation is None else [scene.relation, OPPOSITE[scene.relation]]
    rows = [
        [digit.value, COLOURS.index(digit.colour), third(digit), PLACES.index(seat)]
        for digit, seat in zip(scene.digits, seats, strict=True)
    ]
    return rows + [[-1] * 4] * (2 - len(rows))


def scene_classes(scene: Scene, third: Callable[[Digit], int], sizes: Sequence[int]) -> list[int]:
    """The first three of both digits, the last of the `sizes` for one that is not there; relation and background."""
    rows = digit_classes(scene, third)
    values = [index % size for classes in rows for index, size in zip(classes[:3], sizes[:3], strict=True)]
    return [*values, PLACES.index(scene.relation or "alone"), BACKGROUNDS.index(scene.background)]


def cross_entropy(scores: jax.Array, classes: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """The sum over the questions of the mean cross-entropy where there is an answer."""
    total = jnp.zeros(())
    for answers, right in _questions(scores, classes, sizes):
        known = right >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(answers, jnp.maximum(right, 0))
        total += jnp.sum(losses * known) / jnp.sum(known)
    return total


def none_wrong(scores: jax.Array, classes: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Whether every question with an answer is answered rightly, bool [...]."""
    right = [(jnp.argmax(s, -1) == c) | (c < 0) for s, c in _questions(scores, classes, sizes)]
    return jnp.all(jnp.stack(right), axis=0)


def _questions(scores, classes, sizes):
    starts = np.cumsum((0, *sizes))
    return [(scores[..., starts[i] : starts[i + 1]], classes[..., i]) for i in range(len(sizes))]
