"""A component's weights as Orbax: one Zarr array a leaf, written and read one block at a time.

A chunk is a block, or, where a mesh may split a large block along anything but its first axis, a part of one: a slice
along the first axis lies together in a file, any other is a whole chunk, so that nobody reads another's shard.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

from convert.leaves import Index, Leaf, finite
from convert.safetensors_files import flush, workers, write_pieces
from dit_jax.config import UserError
from dit_jax.sharding import AxesTable, logical_axes

PARAMS = "params"
_METADATA = "_METADATA"
_OCDBT_MANIFEST = "manifest.ocdbt"
BLOCKS_AT_ONCE = 3  # read, reordered and written side by side
PARTS = (8, 4, 2)  # how many a block may be cut into, the first that leaves them even and large
SMALLEST_PART = 1 << 20  # bytes


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Teaches Orbax to save a `Leaf` the way it saves a numpy array, without ever holding the array."""

    def __init__(self, axes: AxesTable):
        super().__init__()
        self._axes = axes

    async def serialize(self, values, infos, args=None):
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            folder = Path(str(info.path))
            _write_leaf(leaf, folder, _chunk_shape(leaf, folder.name, self._axes))
        return []

    def memory_size(self, values):
        return [(leaf.size * leaf.dtype.itemsize, 0) for leaf in values]


def write_native(folder: Path, leaves: Mapping[str, Leaf], axes: AxesTable) -> None:
    """Save leaves (dotted path -> leaf) as an Orbax checkpoint, which StandardCheckpointer restores as nested dicts.

    axes  the model's table of logical axes, by which large blocks are cut into chunks; empty where nothing is sharded
    Raises OSError naming the leaf's folder when the disk is full or fails.
    """
    with _only_errors_logged():
        alone = in_this_process_alone()
        handler = ocp.PyTreeCheckpointHandler(
            multiprocessing_options=alone,
            use_ocdbt=False,  # one folder a leaf: blocks go to disk as they come and nothing waits for a commit
            type_handler_registry=ocp.type_handlers.create_type_handler_registry((Leaf, _StreamHandler(axes))),
        )
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(_nested(leaves)))
    with ThreadPoolExecutor() as pool:
        list(pool.map(flush, (file for file in folder.rglob("*") if file.is_file())))


def in_this_process_alone() -> ocp.options.MultiprocessingOptions:
    """For an Orbax checkpointer that waits for no other process of a run."""
    number = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=number, active_processes={number}, barrier_sync_key_prefix=f"alone{number}"
    )


def read_native(folder: Path) -> dict[str, Leaf]:
    """The leaves of an Orbax checkpoint (dotted path -> leaf); values are read on demand.

    Raises UserError when the folder is no Orbax checkpoint or an array in it is damaged.
    """
    if not (folder / _METADATA).is_file():
        raise UserError(f"{folder} is not a complete Orbax checkpoint: {_METADATA} is missing; convert it again.")
    try:
        metadata = json.loads((folder / _METADATA).read_text())
        entries = metadata["tree_metadata"].values()
        names = [".".join(str(part["key"]) for part in entry["key_metadata"]) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / _METADATA} is damaged; expected Orbax's list of arrays; convert again.") from error
    return {name: _open_leaf(folder, name, "zarr3" if metadata.get("use_zarr3") else "zarr") for name in names}


def is_native(folder: Path) -> bool:
    """Whether this component folder holds weights of ours."""
    return (folder / PARAMS).is_dir()


def _chunk_shape(leaf: Leaf, name: str, axes: AxesTable) -> tuple[int, ...]:
    """One block, cut along the last axis that a mesh may split unless that is the block's first."""
    first = 1 if leaf.stacked else 0
    chunk = [1, *leaf.shape[1:]] if leaf.stacked else list(leaf.shape)
    named = [axis for axis, logical in enumerate(logical_axes(name, axes) if axes else ()) if logical]
    if named and named[-1] > first:
        size = chunk[named[-1]]
        smallest = SMALLEST_PART * np.prod(leaf.shape[:first], dtype=np.int64)
        fitting = [n for n in PARTS if size % n == 0 and leaf.size * leaf.dtype.itemsize // n >= smallest]
        chunk[named[-1]] //= fitting[0] if fitting else 1
    return tuple(chunk)


def _write_leaf(leaf: Leaf, folder: Path, chunk: tuple[int, ...]) -> None:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder)},
        "dtype": leaf.dtype.name,
        # Trained weights hardly compress, and raw chunks cost no processor time to read.
        "metadata": {"shape": leaf.shape, "chunks": chunk, "compressor": None, "order": "C"},
    }
    with _as_oserror(folder):
        ts.open(spec, create=True).result()
    files = _Files(folder, leaf.shape, chunk, leaf.dtype, leaf.stacked)

    def write(block: int | None) -> None:
        # A raw chunk is its array's bytes; through tensorstore they would be copied twice.
        array = leaf.read(block)
        for number in range(files.parts):
            with _as_oserror(folder), open(files.path(block, number), "xb") as stream:
                write_pieces(stream, array[files.index_of(number)])

    with workers(BLOCKS_AT_ONCE) as pool:
        for written in [pool.submit(write, block) for block in leaf.blocks]:
            written.result()


@dataclass(frozen=True)
class _Files:
    """The files of a leaf's chunks in Zarr 2: a block each, or several parts of one along `axis`."""

    folder: Path
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    separator: str = "."

    @property
    def own(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def own_chunk(self) -> tuple[int, ...]:
        return self.chunk[1:] if self.stacked else self.chunk

    @property
    def axis(self) -> int:
        """The axis of a block that is cut; 0 where none is."""
        cut = [axis for axis, (size, part) in enumerate(zip(self.own, self.own_chunk, strict=True)) if part != size]
        return cut[0] if cut else 0

    @property
    def parts(self) -> int:
        return self.own[self.axis] // self.own_chunk[self.axis] if self.own else 1

    def path(self, block: int | None, number: int) -> Path:
        place = [0] * len(self.own)
        place[self.axis : self.axis + 1] = [number] if self.own else []
        return self.folder / (self.separator.join(str(n) for n in ([block] * self.stacked + place)) or "0")

    def index_of(self, number: int) -> Index:
        """Where a part lies in its block."""
        index = [slice(None)] * len(self.own)
        if self.own:
            size = self.own_chunk[self.axis]
            index[self.axis] = slice(number * size, (number + 1) * size)
        return tuple(index)

    def read(self, block: int | None, index: Index) -> np.ndarray | None:
        """A rectangle of a block, mapped where one file holds it; None if a file is missing or of another size."""
        if not self.own:
            return self._mapped(block, 0)
        start, stop, _ = index[self.axis].indices(self.own[self.axis])
        size, pieces = self.own_chunk[self.axis], []
        for number in range(start // size, -(-stop // size)):
            mapped = self._mapped(block, number)
            if mapped is None:
                return None
            local = slice(max(start - number * size, 0), min(stop - number * size, size))
            pieces.append(mapped[(*index[: self.axis], local, *index[self.axis + 1 :])])
        if len(pieces) == 1:
            return pieces[0]
        # As plain integers, for the reasons of `tables.copy_into`.
        bits = np.concatenate([piece.view(f"u{self.dtype.itemsize}") for piece in pieces], self.axis)
        return bits.view(self.dtype)

    def _mapped(self, block: int | None, number: int) -> np.ndarray | None:
        file, size = self.path(block, number), self.dtype.itemsize * int(np.prod(self.own_chunk, dtype=np.int64))
        if not file.is_file() or file.stat().st_size != size:
            return None
        return np.memmap(file, self.dtype, mode="r", shape=self.own_chunk)


@contextlib.contextmanager
def _as_oserror(folder: Path) -> Iterator[None]:
    """A write's error names no file, and tensorstore's of a full or forbidden disk is a plain ValueError."""
    try:
        yield
    except ValueError as error:
        raise OSError(errno.EIO, f"cannot be written ({_first_line(error)})", str(folder)) from error
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(folder)) from error


def _open_leaf(folder: Path, name: str, driver: str) -> Leaf:
    try:
        store = ts.open(_read_spec(folder, name, driver), open=True).result()
    except ValueError as error:
        raise UserError(f"{folder}: {name} cannot be opened, convert it again: {_first_line(error)}.") from error
    shape, dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)

    def place(block: int | None) -> str:
        return f"{folder}: {name}" if block is None else f"{folder}: block {block} of {name}"

    chunk = tuple(store.chunk_layout.read_chunk.shape or (0,))
    stacked = bool(shape) and shape[0] > 1 and chunk[0] == 1
    files = _raw_files(store, folder / name, driver, stacked)

    def read_part(block: int | None, index: Index) -> np.ndarray:
        array = files.read(block, index) if files is not None else None
        if array is not None:
            return array
        try:
            return (store if block is None else store[block])[index].read().result()
        except ValueError as error:
            raise UserError(
                f"{place(block)} cannot be read (expected {dtype}, shape {shape}); the checkpoint is damaged, "
                f"convert it again: {_first_line(error)}."
            ) from error

    whole = (slice(None),) * (len(shape) - stacked)
    return finite(Leaf(shape, dtype, stacked, lambda block: read_part(block, whole), read_part), place)


def _raw_files(store: ts.TensorStore, folder: Path, driver: str, stacked: bool) -> _Files | None:
    """The files of raw chunks such as `_write_leaf` makes; None for any others."""
    metadata = store.spec().to_json().get("metadata", {})
    if driver != "zarr" or metadata.get("compressor") or metadata.get("filters") or metadata.get("order") != "C":
        return None
    separator = metadata.get("dimension_separator", ".")
    dtype, shape, chunk = np.dtype(store.dtype.numpy_dtype), tuple(store.shape), tuple(metadata.get("chunks", ()))
    files = _Files(folder, shape, chunk, dtype, stacked, separator)
    sizes = list(zip(files.own, files.own_chunk, strict=True))
    even = all(part and size % part == 0 for size, part in sizes)
    return files if even and sum(size != part for size, part in sizes) <= 1 else None


def _read_spec(folder: Path, name: str, driver: str) -> dict[str, Any]:
    """A trainer may save with Orbax's defaults, which put all arrays in one OCDBT database: read that too."""
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{folder.resolve()}/{name}/"}
    if (folder / _OCDBT_MANIFEST).is_file():
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}


def _nested(leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def _only_errors_logged() -> Iterator[None]:
    """Orbax warns of things that hold for every checkpoint of ours (no jax.Array among the types, nothing to merge)."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
