"""Leaves of ours that stay on disk until they are read, and the outside tensors that they come from or become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convert.safetensors_files import FLOATS, Outgoing, Tensor, has_nan_or_infinity
from convert.tables import Layout, Row, copy_into
from dit_jax.config import UserError

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Leaf:
    """A parameter of ours on disk: `read(i)` gives block i of a stacked leaf, `read(None)` the whole of another.

    read_part  a rectangle of what `read` gives, where that is had without touching the rest
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read: Callable[[int | None], np.ndarray]
    read_part: Callable[[int | None, Index], np.ndarray] | None = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def blocks(self) -> Sequence[int | None]:
        return range(self.shape[0]) if self.stacked else [None]

    def block(self, block: int | None) -> np.ndarray:
        """One block, or with None the whole, however the leaf is cut on disk."""
        if self.stacked and block is None:
            return self.rectangle(None)
        return self.read(None)[block] if block is not None and not self.stacked else self.read(block)

    def part(self, block: int | None, index: Index) -> np.ndarray:
        """A rectangle of a block, or with None of a leaf that is not stacked."""
        own = self.shape[1:] if self.stacked else self.shape
        if all(part.indices(size) == (0, size, 1) for part, size in zip(index, own, strict=True)):
            return self.read(block)
        return self.read(block)[index] if self.read_part is None else self.read_part(block, index)

    def rectangle(self, index: Index | None) -> np.ndarray:
        """A copy of any rectangle of the leaf (None for the whole); what lies outside it is not read."""
        index = tuple(slice(None) for _ in self.shape) if index is None else index
        lengths = [len(range(*part.indices(size))) for part, size in zip(index, self.shape, strict=True)]
        # Filled in place: stacking a list of blocks would hold everything twice.
        out = np.empty(lengths, self.dtype)
        if not self.stacked:
            copy_into(out, self.part(None, index))
            return out
        for row, block in enumerate(range(*index[0].indices(self.shape[0]))):
            copy_into(out[row : row + 1], self.part(block, index[1:])[None])
        return out

    def cast(self, dtype: np.dtype) -> Leaf:
        """The same leaf, read in another dtype."""
        if dtype == self.dtype:
            return self
        return replace(
            self,
            dtype=dtype,
            read=lambda block: self.read(block).astype(dtype),
            read_part=lambda block, index: self.part(block, index).astype(dtype),
        )


def finite(leaf: Leaf, place: Callable[[int | None], str]) -> Leaf:
    """The same leaf, which is searched for NaN and infinities where it is read: a block only the first time."""
    searched: set[int | None] = set()

    def checked(array: np.ndarray, block: int | None) -> np.ndarray:
        if block not in searched and has_nan_or_infinity(array):
            raise UserError(
                f"{place(block)} holds NaN or infinite values; expected finite weights; use another checkpoint."
            )
        return array

    def read(block: int | None) -> np.ndarray:
        array = checked(leaf.read(block), block)
        searched.add(block)
        return array

    def read_part(block: int | None, index: Index) -> np.ndarray:
        return checked(leaf.part(block, index), block)

    return replace(leaf, read=read, read_part=read_part)


def leaves_from_tensors(
    tensors: Mapping[str, Tensor],
    rows: Sequence[Row],
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout,
    source: Path,
) -> dict[str, Leaf]:
    """Our leaves, read from the outside tensors of one component when their turn comes.

    shapes  dotted path of every leaf of the model -> shape
    Raises UserError naming the file and key of a tensor that is missing, unexpected, misshapen, or of another dtype
    than the rest of its stack.
    """
    _check_table(rows, shapes)
    leaves, unread = {}, set(tensors)
    for row in rows:
        shape = shapes[row.ours]
        stacked = row.stacked(layout)
        blocks = range(shape[0]) if stacked else [None]
        own = shape[1:] if stacked else shape
        found = [_expected_tensor(tensors, row, own, layout, block, source) for block in blocks]
        unread -= {row.key(layout, block) for block in blocks}
        for tensor in found:
            if tensor.dtype not in FLOATS:
                raise UserError(
                    f"{tensor.file}: {tensor.key} is {tensor.dtype}, expected floating-point weights; "
                    "download the weights again."
                )
            if tensor.dtype != found[0].dtype:
                raise UserError(
                    f"{tensor.file}: {tensor.key} is {tensor.dtype} but {found[0].key} is {found[0].dtype}; "
                    "expected one dtype in all blocks; cast the checkpoint to one dtype."
                )
        leaves[row.ours] = _leaf(row, shape, layout, found)
    if unread:
        key = min(unread)
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        raise UserError(
            f"{tensors[key].file}: unexpected tensor {key} of shape {tensors[key].shape}{more}; expected only those of "
            "the model that config.json describes; check that weights and config belong together."
        )
    return leaves


def _expected_tensor(
    tensors: Mapping[str, Tensor], row: Row, own: tuple[int, ...], layout: Layout, block: int | None, source: Path
) -> Tensor:
    key, expected = row.key(layout, block), row.outside_shape(own, layout)
    if not key:
        raise UserError(f"{source}: the {layout} layout has no place for {row.ours}; use another layout.")
    if key not in tensors:
        raise UserError(f"{source} lacks {key}; expected shape {expected}, found nothing; download the weights again.")
    tensor = tensors[key]
    if tensor.shape != expected:
        raise UserError(
            f"{tensor.file}: {key} has shape {tensor.shape}, expected {expected}; "
            "check that weights and config.json belong together."
        )
    return tensor


def _leaf(row: Row, shape: tuple[int, ...], layout: Layout, found: Sequence[Tensor]) -> Leaf:
    stacked = row.stacked(layout)
    own = shape[1:] if stacked else shape

    def read(block: int | None) -> np.ndarray:
        return row.to_ours(found[block or 0].read(), own, layout)

    def place(block: int | None) -> str:
        return f"{found[block or 0].file}: {found[block or 0].key}"

    return finite(Leaf(shape, found[0].dtype, stacked, read), place)


def tensors_from_leaves(leaves: Mapping[str, Leaf], rows: Sequence[Row], layout: Layout) -> list[Outgoing]:
    """The outside tensors of one component, computed from our leaves when their turn comes.

    Raises UserError when the layout has no key for a leaf, or a fused tensor would need two dtypes.
    """
    parts: dict[str, list[tuple[Row, int | None]]] = {}
    for row in rows:
        if not row.key(layout):
            raise UserError(f"the {layout} layout has no place for {row.ours}; use another layout.")
        blocks = range(leaves[row.ours].shape[0]) if row.stacked(layout) else [None]
        for block in blocks:
            parts.setdefault(row.key(layout, block), []).append((row, block))
    return [_outgoing(key, pieces, leaves, layout) for key, pieces in parts.items()]


def _outgoing(key: str, pieces: list[tuple[Row, int | None]], leaves: Mapping[str, Leaf], layout: Layout) -> Outgoing:
    pieces = sorted(pieces, key=lambda piece: piece[0].parts[layout].start if layout in piece[0].parts else 0)
    row, block = pieces[0]
    shape = leaves[row.ours].shape
    dtypes = {leaves[row.ours].dtype for row, _ in pieces}
    if len(dtypes) > 1:
        names = ", ".join(f"{row.ours} {leaves[row.ours].dtype}" for row, _ in pieces)
        raise UserError(
            f"{key} would need one dtype for all its parts, found {names}; cast the checkpoint to one dtype."
        )

    def read() -> np.ndarray:
        arrays = [row.to_outside(leaves[row.ours].block(block), layout) for row, block in pieces]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, row.parts[layout].axis)

    return Outgoing(key, dtypes.pop(), row.outside_shape(shape if block is None else shape[1:], layout), read)


def check_leaves(leaves: Mapping[str, Leaf], shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Raises UserError when leaves are not those, in name and shape, of the model that their config describes."""
    remedy = "check that the weights and config.json belong together."
    for name, shape in shapes.items():
        if name not in leaves:
            raise UserError(f"{source} lacks {name}; expected shape {shape}, found nothing; {remedy}")
        if leaves[name].shape != shape:
            raise UserError(f"{source}: {name} has shape {leaves[name].shape}, expected {shape}; {remedy}")
    for name in leaves:
        if name not in shapes:
            raise UserError(f"{source}: unexpected leaf {name} of shape {leaves[name].shape}; {remedy}")


def _check_table(rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A table that does not fit its model is our own mistake, not the user's."""
    names = [row.ours for row in rows]
    if sorted(names) != sorted(shapes):
        odd = sorted(set(names) ^ set(shapes)) or sorted({name for name in names if names.count(name) > 1})
        raise AssertionError(f"table and model differ in {odd[:10]}")
