"""A component's weights as Orbax: one Zarr array a leaf, one chunk a block, written and read one block at a time."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

from convert.leaves import Leaf, finite
from convert.safetensors_files import flush, workers, write_pieces
from dit_jax.config import UserError

PARAMS = "params"
_METADATA = "_METADATA"
_OCDBT_MANIFEST = "manifest.ocdbt"
BLOCKS_AT_ONCE = 3  # read, reordered and written side by side


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Teaches Orbax to save a `Leaf` the way it saves a numpy array, without ever holding the array."""

    async def serialize(self, values, infos, args=None):
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            _write_leaf(leaf, Path(str(info.path)))
        return []

    def memory_size(self, values):
        return [(leaf.size * leaf.dtype.itemsize, 0) for leaf in values]


def write_native(folder: Path, leaves: Mapping[str, Leaf]) -> None:
    """Save leaves (dotted path -> leaf) as an Orbax checkpoint, which StandardCheckpointer restores as nested dicts.

    Raises OSError naming the leaf's folder when the disk is full or fails.
    """
    with _only_errors_logged():
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,  # one folder a leaf: blocks go to disk as they come and nothing waits for a commit
            type_handler_registry=ocp.type_handlers.create_type_handler_registry((Leaf, _StreamHandler())),
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(_nested(leaves)))
    with ThreadPoolExecutor() as pool:
        list(pool.map(flush, (file for file in folder.rglob("*") if file.is_file())))


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


def _write_leaf(leaf: Leaf, folder: Path) -> None:
    chunk = (1, *leaf.shape[1:]) if leaf.stacked else leaf.shape
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder)},
        "dtype": leaf.dtype.name,
        # Trained weights hardly compress, and raw chunks cost no processor time to read.
        "metadata": {"shape": leaf.shape, "chunks": chunk, "compressor": None, "order": "C"},
    }
    with _as_oserror(folder):
        ts.open(spec, create=True).result()

    def write(block: int | None) -> None:
        # A raw chunk is its array's bytes; through tensorstore they would be copied twice.
        array = leaf.read(block)
        with _as_oserror(folder), open(_chunk_file(folder, block, len(leaf.shape)), "xb") as stream:
            write_pieces(stream, array)

    with workers(BLOCKS_AT_ONCE) as pool:
        for written in [pool.submit(write, block) for block in leaf.blocks]:
            written.result()


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

    mapped = _mapped_reader(store, folder / name, driver, dtype)

    def read(block: int | None) -> np.ndarray:
        array = mapped(block)
        if array is not None:
            return array
        try:
            return store[... if block is None else block].read().result()
        except ValueError as error:
            raise UserError(
                f"{place(block)} cannot be read (expected {dtype}, shape {shape}); the checkpoint is damaged, "
                f"convert it again: {_first_line(error)}."
            ) from error

    chunk = store.chunk_layout.read_chunk.shape or (0,)
    return finite(Leaf(shape, dtype, bool(shape) and shape[0] > 1 and chunk[0] == 1, read), place)


def _chunk_file(folder: Path, block: int | None, axes: int, separator: str = ".") -> Path:
    """Where Zarr 2 keeps the chunk of a block, or the only chunk (None)."""
    return folder / separator.join([str(block or 0), *["0"] * (axes - 1)])


def _mapped_reader(store: ts.TensorStore, folder: Path, driver: str, dtype: np.dtype):
    """Reads raw chunks as `_write_leaf` makes them without copying them; None for whatever is not such a chunk."""
    metadata = store.spec().to_json().get("metadata", {})
    shape, chunk = tuple(store.shape), tuple(metadata.get("chunks", ()))
    raw = driver == "zarr" and metadata.get("compressor") is None and not metadata.get("filters")
    whole_blocks = bool(shape) and metadata.get("order") == "C" and chunk in ((1, *shape[1:]), shape)
    separator = metadata.get("dimension_separator", ".")

    def read(block: int | None) -> np.ndarray | None:
        if not (raw and whole_blocks) or (block is None) != (chunk == shape):
            return None
        file = _chunk_file(folder, block, len(shape), separator)
        own = shape if block is None else shape[1:]
        if not file.is_file() or file.stat().st_size != dtype.itemsize * int(np.prod(own, dtype=np.int64)):
            return None
        return np.memmap(file, dtype, mode="r", shape=own)

    return read


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
