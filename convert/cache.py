"""Converted weights that are kept: a component is converted the first time that it is loaded, and read as native then.

    DIR/weights/KEY/         config.json, params/, and manifest.json with size and time of every file
    DIR/hashes/NAME.json     the SHA-256 of a source file, by its path, size, time of change and inode
    DIR/locks/               KEY.use is shared by whoever reads an entry, KEY.build held by who writes it

KEY is the SHA-256 of the contents of a component's weight files, of its config and of the table that converts it. An
entry takes its place by renaming, so it is whole or absent; the least recently used are removed for room.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.checkpoint import CONFIG, Checkpoint
from convert.leaves import Leaf
from convert.locks import FileLock
from convert.native import PARAMS, write_native
from convert.safetensors_files import write_durably
from convert.transfer import staged
from dit_jax.config import UserError

FORMAT = 1  # of an entry; another one makes all entries of before unknown
LIMIT = 100 * 10**9
MANIFEST = "manifest.json"
_KEY_LENGTH = hashlib.sha256().digest_size * 2
_PIECE = 1 << 22
_SETTLED = 2  # seconds after a change in which a file may change again without a new time


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A folder of converted weights, its limit in bytes, and a bar that is told of the bytes hashed and converted."""

    folder: Path
    limit: int = LIMIT
    progress: tqdm | None = None

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    @property
    def hashes(self) -> Path:
        return self.folder / "hashes"

    def lock(self, name: str, *, shared: bool = False, wait: bool = True) -> FileLock:
        """A lock of this cache; as `FileLock`."""
        return FileLock(self.folder / "locks" / name, shared=shared, wait=wait)

    def make(self) -> None:
        """Makes the folders. Raises UserError where that cannot be done."""
        try:
            for folder in (self.weights, self.hashes, self.folder / "locks"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be a cache ({error.strerror}); expected a folder to write in; choose another."
            ) from error

    def tell(self, stage: str, size: int) -> None:
        """Shows on the bar that this many more bytes are to be hashed or converted."""
        if self.progress is not None:
            self.progress.set_description(stage, refresh=False)
            self.progress.total = (self.progress.total or 0) + size

    def advance(self, count: int) -> None:
        """Moves the bar."""
        if self.progress is not None:
            self.progress.update(count)


def with_cached_weights(checkpoint: Checkpoint, cache: Cache) -> Checkpoint:
    """The same checkpoint, its weights read from their native form in the cache, where they are put first if need be.

    Bit for bit the source's weights, in its dtypes; a native checkpoint is returned as it is. The entries cannot be
    removed by other processes for as long as the checkpoint that is returned lives. What cannot be kept (no room within
    the limit, a full disk) is read from the source, with a warning; so is an entry that was damaged, once converted
    again. Raises UserError as `Checkpoint.leaves` does, and when the folder cannot be made.
    """
    if checkpoint.layout == "native":
        return checkpoint
    cache.make()
    found = {name: _entry(cache, checkpoint, name) for name in checkpoint.settings}
    kept = {name: entry for name, entry in found.items() if entry is not None}
    return replace(
        checkpoint,
        converted={name: folder / PARAMS for name, (folder, _) in kept.items()},
        held=tuple(lock for _, lock in kept.values()),
    )


def _entry(cache: Cache, checkpoint: Checkpoint, name: str) -> tuple[Path, FileLock] | None:
    """(folder, the lock that keeps it) of a component; None when it cannot be kept."""
    key = _key(cache, checkpoint, name)
    folder, held = cache.weights / key, cache.lock(f"{key}.use", shared=True)
    if not _is_sound(folder):
        with cache.lock(f"{key}.build"):
            if not _is_sound(folder) and not _build(cache, checkpoint, name, folder):
                return None
    os.utime(folder / MANIFEST)
    return folder, held


def _key(cache: Cache, checkpoint: Checkpoint, name: str) -> str:
    component = checkpoint.component(name)
    contents = [(file.name, _file_hash(cache, file)) for file in checkpoint.weight_files(name)]
    told = (FORMAT, checkpoint.layout, sorted(contents), list(component.rows), sorted(component.axes.items()))
    settings = json.dumps(checkpoint.settings[name], sort_keys=True)
    return hashlib.sha256(repr((*told, settings)).encode()).hexdigest()


def _signature(file: Path) -> list[int]:
    state = file.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ino]


def _file_hash(cache: Cache, file: Path) -> str:
    """SHA-256 of a file, remembered until its size, time of change or inode are others."""
    file = file.resolve()
    record, signature = cache.hashes / f"{hashlib.sha256(bytes(file)).hexdigest()}.json", _signature(file)
    known = _read_object(record)
    if known.get("path") == str(file) and known.get("signature") == signature and isinstance(known.get("sha256"), str):
        return known["sha256"]
    cache.tell(f"hashing {file.name}", signature[0])
    began, digest = time.time(), hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            cache.advance(len(piece))
    if _signature(file) != signature:
        raise UserError(f"{file} changed while it was read; expected a finished file; wait for it and load again.")
    if signature[1] < (began - _SETTLED) * 1e9:
        content = {"path": str(file), "signature": signature, "sha256": digest.hexdigest()}
        _replace_file(record, json.dumps(content).encode())
    return digest.hexdigest()


def _replace_file(file: Path, content: bytes) -> None:
    """Write a small file that nobody sees half-written; where it cannot be written it is not."""
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the cache's own; empty where there is none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _build(cache: Cache, checkpoint: Checkpoint, name: str, folder: Path) -> bool:
    """Convert a component into an entry; False, after a warning, when it cannot be kept."""
    if folder.exists():
        warnings.warn(f"the cached weights in {folder} are damaged: they are converted again.", stacklevel=2)
        _remove(folder)
    component, leaves = checkpoint.component(name), checkpoint.leaves(name)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
    if not _make_room(cache, size):
        warnings.warn(
            f"{name or 'the model'} needs {size / 1e9:.1f} GB, more than is free or unused in the cache {cache.folder} "
            f"with its limit of {cache.limit / 1e9:.1f} GB: it is read from {checkpoint.folder}.",
            stacklevel=2,
        )
        return False
    cache.tell(f"converting {name or 'model'}", size)
    try:
        with staged(folder) as partial:
            write_durably(partial / CONFIG, json.dumps(checkpoint.settings[name]).encode())
            write_native(partial / PARAMS, {key: _watched(leaf, cache) for key, leaf in leaves.items()}, component.axes)
            write_durably(partial / MANIFEST, json.dumps(_listing(partial)).encode())
    except OSError as error:
        warnings.warn(
            f"{name or 'the model'} cannot be kept in {cache.folder} ({error.strerror}): it is read from its source.",
            stacklevel=2,
        )
        return False
    _make_room(cache, 0)  # another process may have filled the same room
    return True


def _watched(leaf: Leaf, cache: Cache) -> Leaf:
    def read(block: int | None) -> np.ndarray:
        array = leaf.read(block)
        cache.advance(array.nbytes)
        return array

    return replace(leaf, read=read)


def _listing(folder: Path) -> dict[str, list[int]]:
    """Place of every file below a folder -> its size and time of change."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): _signature(file)[:2] for file in files if file.name != MANIFEST}


def _is_sound(folder: Path) -> bool:
    """Whether all files of an entry are there, of the size and time that they were written with."""
    manifest = _read_object(folder / MANIFEST)
    try:
        return bool(manifest) and _listing(folder) == manifest
    except OSError:  # it vanished meanwhile
        return False


def _make_room(cache: Cache, needed: int) -> bool:
    """Removes what was least recently used until `needed` bytes fit within the limit; False when they cannot."""
    with cache.lock("evict"):
        _sweep(cache)
        entries = sorted(_entries(cache))
        total = sum(size for _, size, _ in entries)
        if needed > cache.limit:
            return False
        for _, size, folder in entries:
            if total + needed <= cache.limit:
                break
            try:
                with cache.lock(f"{folder.name}.use", wait=False):
                    _remove(folder)
            except BlockingIOError:  # somebody reads it
                continue
            total -= size
        return total + needed <= cache.limit


def _entries(cache: Cache) -> Iterator[tuple[int, int, Path]]:
    """(time of last use, bytes, folder) of every entry."""
    for folder in cache.weights.iterdir():
        if len(folder.name) == _KEY_LENGTH:
            used = (folder / MANIFEST).stat().st_mtime_ns if (folder / MANIFEST).is_file() else 0
            yield used, sum(size for size, _ in _listing(folder).values()), folder


def _sweep(cache: Cache) -> None:
    """Removes what killed processes left behind, and the hashes of files that are gone."""
    for folder in cache.weights.iterdir():
        if len(folder.name) > _KEY_LENGTH:
            try:
                with cache.lock(f"{folder.name[:_KEY_LENGTH]}.build", wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:  # it is being written
                continue
    for record in cache.hashes.iterdir():
        if not Path(_read_object(record).get("path", "")).is_file():
            record.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Out of sight at once: nobody finds half an entry."""
    gone = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
