"""A small classifier of handwritten digits, trained on real ones; its features tell drawn digits from real ones.

python -m infer.digit_reader [FILE]    (trains it anew, about a minute on two cores)

Shapes: B glyphs, 28 x 28 pixels, F features.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file, save_file

from dit_jax.parameters import named_leaves, with_leaves
from infer.digit_tracks import glyph_crops
from infer.moving_digits import load_digits

SHIPPED = Path(__file__).parents[1] / "dit_jax" / "demo" / "digit_reader.safetensors"
FEATURES = 64
_BATCH = 128
_READ_BATCH = 32
_VARIANTS = 60
_EPOCHS = 3


class DigitReader(nnx.Module):
    """A convolutional classifier of glyphs.

    Glyphs fp32 [B, 28, 28] in 0..1 go to logits [B, 10] and, before the last layer, features [B, F].
    """

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(5 * 5, 24, rngs=rngs)
        self.second = nnx.Linear(3 * 3 * 24, 48, rngs=rngs)
        self.third = nnx.Linear(3 * 3 * 48, 64, rngs=rngs)
        self.gather = nnx.Linear(5 * 5 * 64, FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, 10, rngs=rngs)

    def __call__(self, glyphs: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nnx.relu(self.first(_patches(glyphs[..., None], 5, 2)))
        x = nnx.relu(self.second(_patches(x, 3, 1)))
        x = nnx.relu(self.third(_patches(jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0))), 3, 2)))
        features = nnx.relu(self.gather(x.reshape(len(x), -1)))
        return self.head(features), features


def _patches(x: jax.Array, side: int, stride: int) -> jax.Array:
    # A convolution as a product of patches: at these sizes XLA's own takes 5 to 30 times as long to train on a CPU.
    end = (x.shape[1] - side) // stride * stride + 1
    shifts = [x[:, i : i + end : stride, j : j + end : stride] for i in range(side) for j in range(side)]
    return jnp.concatenate(shifts, axis=-1)


@jax.jit
def _read(reader: DigitReader, glyphs: jax.Array) -> tuple[jax.Array, jax.Array]:
    return reader(glyphs)


def read(reader: DigitReader, glyphs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, 10] and features [B, F] of glyphs fp32 [B, 28, 28], by one compiled program of a fixed batch."""
    padded = np.pad(glyphs, ((0, -len(glyphs) % _READ_BATCH), (0, 0), (0, 0)))
    batches = [_read(reader, batch) for batch in padded.reshape(-1, _READ_BATCH, *glyphs.shape[1:])]
    logits, features = (np.concatenate(parts)[: len(glyphs)] for parts in zip(*batches, strict=True))
    return logits, features


def distorted(glyphs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Glyphs [B, 28, 28] written and drawn a little differently, normalised like the glyphs of a track.

    Turned, sheared and stretched a little, elastically bent (Simard et al. 2003), drawn larger with other stroke edges,
    then blurred and strewn with noise as a generated video may be.
    """
    count, side = len(glyphs), 48

    def draw(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 1, 1))

    places = (np.arange(side) - side / 2 + 0.5) * 25 / side
    turn, shear = rng.normal(0, 0.17, (2, count))
    rotation = np.moveaxis(np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]), -1, 0)
    shearing = np.moveaxis(np.array([[np.ones(count), np.zeros(count)], [shear, np.ones(count)]]), -1, 0)
    matrix = rotation @ shearing * rng.uniform(0.82, 1.18, (count, 2, 1))
    grid = np.stack(np.meshgrid(places, places, indexing="ij"))
    knots = _bell(np.linspace(0, 5, side)[:, None] - np.arange(6), 0.8)
    bend = knots @ rng.normal(0, 1, (count, 2, 6, 6)) @ knots.T
    sources = np.einsum("bij,jyx->biyx", matrix, grid) + 13.5 + bend * draw(0.3, 1.5)[..., None]
    ink = np.clip((_bilinear(glyphs, sources) - draw(0.05, 0.3)) / draw(0.3, 0.6), 0, 1)
    blur = _bell(np.subtract.outer(np.arange(side), np.arange(side))[None], draw(0.2, 1.3))
    ink = blur @ ink @ blur.transpose(0, 2, 1)
    ink = ink / np.maximum(0.3, 0.9 * ink.max((1, 2), keepdims=True))
    ink = ink + rng.normal(0, 1, ink.shape) * draw(0, 0.08) * (ink > 0.1)
    return glyph_crops(np.clip(ink, 0, 1).astype(np.float32))


def _bell(distance: np.ndarray, width) -> np.ndarray:
    """Gaussian weights of the last axis, which sum to 1."""
    weight = np.exp(-0.5 * (distance / width) ** 2)
    return weight / weight.sum(-1, keepdims=True)


def _bilinear(glyphs: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """The glyphs [B, 28, 28] at the places (y, x) of sources [B, 2, Y, X]; nothing outside."""
    padded = np.pad(glyphs, ((0, 0), (1, 2), (1, 2)))
    y, x = np.clip(sources, -1, 28).swapaxes(0, 1) + 1
    top, left = y.astype(int), x.astype(int)
    y, x = y - top, x - left
    glyph = np.arange(len(glyphs))[:, None, None]
    above = padded[glyph, top, left] * (1 - x) + padded[glyph, top, left + 1] * x
    below = padded[glyph, top + 1, left] * (1 - x) + padded[glyph, top + 1, left + 1] * x
    return above * (1 - y) + below * y


def train_reader(
    variants: int = _VARIANTS, epochs: int = _EPOCHS, progress: Callable[[str], None] | None = None
) -> DigitReader:
    """The classifier, trained on `variants` distorted forms of each of the 1,000 glyphs of the split "classifier"."""
    digits = load_digits("classifier")
    rng = np.random.default_rng(7)
    order = rng.permutation(len(digits.labels) * variants)
    if progress:
        progress(f"training the digit classifier: drawing {len(order):,} glyphs")
    batches = len(order) // _BATCH
    chosen = order[: batches * _BATCH].reshape(batches, _BATCH) % len(digits.labels)
    glyphs = jnp.asarray(np.stack([distorted(digits.images[batch], rng) for batch in chosen]))
    labels = jnp.asarray(digits.labels[chosen])
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, batches * epochs), weight_decay=0.02)

    def loss(reader, batch):
        logits, _ = reader(batch[0])
        targets = optax.smooth_labels(jax.nn.one_hot(batch[1], 10), 0.05)
        return optax.softmax_cross_entropy(logits, targets).mean()

    def step(carry, batch):
        reader, state = carry
        value, gradient = jax.value_and_grad(loss)(reader, batch)
        updates, state = optimizer.update(gradient, state, reader)
        return (optax.apply_updates(reader, updates), state), value

    @jax.jit
    def epoch(carry, glyphs, labels):
        return jax.lax.scan(step, carry, (glyphs, labels))

    reader = DigitReader(rngs=nnx.Rngs(7))
    carry = (reader, optimizer.init(reader))
    for number in range(epochs):
        carry, losses = epoch(carry, glyphs, labels)
        if progress:
            progress(f"training the digit classifier: epoch {number + 1} of {epochs}, loss {losses.mean():.3f}")
    return carry[0]


@lru_cache(maxsize=1)
def load_reader() -> DigitReader:
    """The classifier that ships: all scores are by the same one, so that those of two machines can be compared."""
    abstract = nnx.eval_shape(lambda: DigitReader(rngs=nnx.Rngs(0)))
    return with_leaves(abstract, {name: jnp.asarray(leaf) for name, leaf in load_file(SHIPPED).items()})


def main() -> None:
    """Trains the classifier and writes it to where it ships from, or to a file that is named."""
    file = Path(sys.argv[1]) if sys.argv[1:] else SHIPPED
    reader = train_reader(progress=lambda told: print(told, file=sys.stderr, flush=True))
    save_file({name: np.asarray(leaf) for name, leaf in named_leaves(reader)}, file)


if __name__ == "__main__":
    main()
