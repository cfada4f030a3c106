"""A component's weights as Orbax: one Zarr array a leaf, one chunk a block, written and read one block at a time."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

from convert.leaves import Leaf, finite
from dit_jax.config import UserError

PARAMS = "params"
_METADATA = "_METADATA"
_OCDBT_MANIFEST = "manifest.ocdbt"


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
        # A chunk of zeros is written too, so that a missing chunk always means damage.
        "store_data_equal_to_fill_value": True,
    }
    with _as_oserror(folder):
        store = ts.open(spec, create=True).result()
    for block in leaf.blocks:
        array = np.asarray(leaf.read(block), order="C")
        with _as_oserror(folder):
            store[... if block is None else block].write(array).result()


@contextlib.contextmanager
def _as_oserror(folder: Path) -> Iterator[None]:
    """Tensorstore tells of a full disk or a folder that it may not write with a plain ValueError."""
    try:
        yield
    except ValueError as error:
        raise OSError(errno.EIO, f"cannot be written ({_first_line(error)})", str(folder)) from error


def _open_leaf(folder: Path, name: str, driver: str) -> Leaf:
    try:
        store = ts.open(_read_spec(folder, name, driver), open=True).result()
    except ValueError as error:
        raise UserError(f"{folder}: {name} cannot be opened, convert it again: {_first_line(error)}.") from error
    shape, dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)

    def place(block: int | None) -> str:
        return f"{folder}: {name}" if block is None else f"{folder}: block {block} of {name}"

    def read(block: int | None) -> np.ndarray:
        try:
            return store[... if block is None else block].read().result()
        except ValueError as error:
            raise UserError(
                f"{place(block)} cannot be read (expected {dtype}, shape {shape}); the checkpoint is damaged, "
                f"convert it again: {_first_line(error)}."
            ) from error

    chunk = store.chunk_layout.read_chunk.shape or (0,)
    return finite(Leaf(shape, dtype, bool(shape) and shape[0] > 1 and chunk[0] == 1, read), place)


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
