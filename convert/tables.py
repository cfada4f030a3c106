"""How a table of parameters is read, in both directions.

A table is a list of `Row`s: one leaf of our model, its einops pattern, and its key in each layout of the outside world.
A key with `{i}` stands for a stack: the leading axis of our leaf is the block index, and every block has a key of its
own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import einops
import jax.numpy as jnp
import numpy as np

from dit_jax.parameters import named_leaves, with_leaves

Layout = Literal["diffusers", "original"]
Axes = list[list[str]]  # groups of names, as a side of an einops pattern has them
Pair = tuple[Axes, Axes]

LINEAR = "o i -> i o"
CONV2D = "o i y x -> y x i o"
CONV3D = "o i t y x -> t y x i o"
HEADS_IN = "(h k) d -> d h k"
HEADS_IN_BIAS = "(h k) -> h k"
HEADS_OUT = "d (h k) -> h k d"
SAME = "... -> ..."
# Queries and keys are stored with the two channels of a rotated pair half a head apart (dit_jax/ops/rope.py).
ROTATED_IN = "(h k two) d -> d h (two k)"
ROTATED_BIAS = "(h k two) -> h (two k)"
PAIRS = {"two": 2}
SLAB = 64  # rows that are reordered at once


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) along an axis of an outside tensor that holds `total` of them (a fused projection)."""

    start: int
    stop: int
    total: int
    axis: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One leaf of ours and where it lives outside.

    ours      path of the leaf in the model, dots between attributes: `blocks.attn1.q.kernel`
    pattern   einops pattern from the outside tensor (left) to ours (right), for one block
    diffusers key in diffusers/transformers layout, `original` in the authors' own; "" where that layout lacks it
    sizes     axis sizes that the pattern needs when our side groups axes
    parts     the slice of a fused outside tensor, by layout
    patterns  another pattern, for a layout whose tensor has another shape
    """

    ours: str
    pattern: str = SAME
    diffusers: str = ""
    original: str = ""
    sizes: dict[str, int] = field(default_factory=dict, hash=False)
    parts: dict[str, Part] = field(default_factory=dict, hash=False)
    patterns: dict[str, str] = field(default_factory=dict, hash=False)

    def pattern_for(self, layout: Layout) -> str:
        """The einops pattern from this layout's tensor to ours."""
        return self.patterns.get(layout, self.pattern)

    def key(self, layout: Layout, block: int | None = None) -> str:
        name: str = getattr(self, layout)
        return name if block is None else name.replace("{i}", str(block))

    def stacked(self, layout: Layout) -> bool:
        return "{i}" in getattr(self, layout)

    def outside_shape(self, ours: Sequence[int], layout: Layout) -> tuple[int, ...]:
        """Shape of the outside tensor for one block, given our leaf's shape without the stack axis."""
        shape = _shape_after(_reversed(self.pattern_for(layout)), ours, self.sizes)
        part = self.parts.get(layout)
        return (*shape[: part.axis], part.total, *shape[part.axis + 1 :]) if part else shape

    def to_ours(self, tensor: np.ndarray, ours: Sequence[int], layout: Layout) -> np.ndarray:
        """Our leaf (one block, a view where the pattern allows) from the outside tensor."""
        part = self.parts.get(layout)
        if part:
            tensor = tensor[(slice(None),) * part.axis + (slice(part.start, part.stop),)]
        pattern = self.pattern_for(layout)
        if pattern == SAME:
            return tensor
        return einops.rearrange(tensor, pattern, **(_sizes(pattern, ours) | self.sizes))

    def is_matrix(self, layout: Layout) -> bool:
        """Whether the outside tensor is a linear map or a convolution: outputs first, then inputs."""
        pattern = self.pattern_for(layout)
        left = [] if pattern == SAME else _terms(pattern.split("->")[0])
        return len(left) > 1 and left[0] != ["1"]

    def factors_to_ours(
        self, down: np.ndarray, up: np.ndarray, ours: Sequence[int], layout: Layout
    ) -> tuple[np.ndarray, np.ndarray]:
        """Factors of our leaf (one block), [*inputs, R] and [R, *outputs], from those of the outside matrix.

        down  [R, *inputs] with the outside tensor's input axes
        up    [outputs, R]
        """
        part = self.parts.get(layout)
        if part and part.axis == 0:
            up = up[part.start : part.stop]
        elif part:
            down = down[:, part.start : part.stop]
        taken, given = self._factors(layout)
        sizes = _sizes(self.pattern_for(layout), ours) | self.sizes
        return _mapped(down, *taken, sizes), _mapped(up, *given, sizes)

    def factors_to_outside(
        self, down: np.ndarray, up: np.ndarray, layout: Layout = "diffusers"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Factors of the outside matrix (or of this row's part of it) from those of our leaf of one block: the inverse
        of `factors_to_ours`."""
        taken, given = self._factors(layout)
        return _mapped(down, taken[1], taken[0], self.sizes), _mapped(up, given[1], given[0], self.sizes)

    def inputs(self, layout: Layout = "diffusers") -> int:
        """How many axes of our leaf of one block, the first of it, are what the matrix maps from."""
        (_, down), _ = self._factors(layout)
        return len(down) - 1

    def _factors(self, layout: Layout) -> tuple[Pair, Pair]:
        """Axes outside and ours, of down and of up."""
        left, right = (_terms(side) for side in self.pattern_for(layout).split("->"))
        rank, outputs, inputs = [["rank"]], left[:1], left[1:]
        produced = [group for group in right if group[0] in outputs[0]]
        taken = [group for group in right if group not in produced]
        return (rank + inputs, taken + rank), (outputs + rank, rank + produced)

    def to_outside(self, leaf: np.ndarray, layout: Layout = "diffusers") -> np.ndarray:
        """The outside tensor (or this row's part of it) from our leaf of one block."""
        pattern = self.pattern_for(layout)
        if pattern == SAME:
            return leaf
        return contiguous(einops.rearrange(leaf, _reversed(pattern), **self.sizes))


def linear_rows(
    ours: str,
    diffusers: str,
    original: str,
    pattern: str = LINEAR,
    bias: str = SAME,
    sizes: dict[str, int] | None = None,
    parts: dict[str, Part] | None = None,
    patterns: dict[str, str] | None = None,
) -> list[Row]:
    """Kernel and bias of a linear map or convolution; fields as in `Row`.

    `sizes` may name axes that only one of the two patterns has; `patterns` are the kernel's.
    """
    rows = []
    for leaf, key, its_pattern in (("kernel", "weight", pattern), ("bias", "bias", bias)):
        rows.append(
            Row(
                ours=f"{ours}.{leaf}",
                pattern=its_pattern,
                sizes={name: size for name, size in (sizes or {}).items() if name in re.findall(r"\w+", its_pattern)},
                parts=parts or {},
                patterns=(patterns or {}) if leaf == "kernel" else {},
                diffusers=f"{diffusers}.{key}",
                original=f"{original}.{key}",
            )
        )
    return rows


def norm_rows(ours: str, diffusers: str, original: str) -> list[Row]:
    """Scale and bias of a norm."""
    return [
        Row(ours=f"{ours}.scale", diffusers=f"{diffusers}.weight", original=f"{original}.weight"),
        Row(ours=f"{ours}.bias", diffusers=f"{diffusers}.bias", original=f"{original}.bias"),
    ]


def _reversed(pattern: str) -> str:
    left, right = pattern.split("->")
    return f"{right.strip()} -> {left.strip()}"


def _terms(side: str) -> Axes:
    """`(h k) d` -> [[h, k], [d]]; `1` stays as it is."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", side)]


def _text(groups: Axes) -> str:
    """[[h, k], [d]] -> `(h k) d`"""
    return " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] for group in groups)


def _mapped(array: np.ndarray, before: Axes, after: Axes, sizes: Mapping[str, int]) -> np.ndarray:
    names = {name for group in before for name in group}
    known = {name: size for name, size in sizes.items() if name in names}
    return einops.rearrange(array, f"{_text(before)} -> {_text(after)}", **known)


def _sizes(pattern: str, ours: Sequence[int]) -> dict[str, int]:
    right = _terms(pattern.split("->")[1])
    return {names[0]: size for names, size in zip(right, ours, strict=True) if len(names) == 1 and names[0] != "1"}


def _shape_after(reverse: str, ours: Sequence[int], sizes: dict[str, int]) -> tuple[int, ...]:
    if reverse == SAME:
        return tuple(ours)
    zeros = np.broadcast_to(np.zeros((), np.int8), tuple(ours))
    return einops.rearrange(zeros, reverse, **sizes).shape


def assign(model, rows: Sequence[Row], tensors, layout: Layout = "diffusers"):
    """A copy of `model` whose leaves are read from `tensors` (a mapping key -> array), for small models held in memory.

    Raises KeyError or ValueError naming the key when a tensor is missing, left over or misshapen.
    """
    leaves = dict(named_leaves(model))
    unread = set(tensors)
    values = {}
    for row in rows:
        shape = leaves.pop(row.ours).shape
        blocks = range(shape[0]) if row.stacked(layout) else [None]
        per_block = []
        for block in blocks:
            key = row.key(layout, block)
            if key not in tensors:
                raise KeyError(f"{key} is missing; expected shape {row.outside_shape(_own(shape, block), layout)}")
            tensor = np.asarray(tensors[key])
            expected = row.outside_shape(_own(shape, block), layout)
            if tensor.shape != expected:
                raise ValueError(f"{key}: expected shape {expected}, found {tensor.shape}")
            unread.discard(key)
            per_block.append(row.to_ours(tensor, _own(shape, block), layout))
        values[row.ours] = np.stack(per_block) if row.stacked(layout) else per_block[0]
    if leaves:
        raise KeyError(f"no table row fills {sorted(leaves)[:10]}")
    if unread:
        raise KeyError(f"unexpected tensors {sorted(unread)[:10]}")
    return with_leaves(model, {name: jnp.asarray(value) for name, value in values.items()})


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order, itself where it is."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy_into(out, array)
    return out


def copy_into(target: np.ndarray, array: np.ndarray) -> None:
    """Fill `target`, of the same shape and dtype, by slabs along the array's widest stride, which stay in the cache."""
    # As plain integers: numpy copies other people's dtypes (bfloat16) slowly and holds the interpreter's lock.
    bits, filled = (each.view(f"u{each.dtype.itemsize}") for each in (array, target))
    if array.flags.c_contiguous:
        filled[...] = bits
        return
    axis = int(np.argmax(np.abs(bits.strides)))
    for start in range(0, bits.shape[axis], SLAB):
        slab = (slice(None),) * axis + (slice(start, start + SLAB),)
        filled[slab] = bits[slab]


def _own(shape: Sequence[int], block: int | None) -> tuple[int, ...]:
    return tuple(shape) if block is None else tuple(shape[1:])
