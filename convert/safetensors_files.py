"""Tensors in safetensors files, mapped to read and streamed to write."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import ml_dtypes
import numpy as np

from convert.tables import contiguous
from dit_jax.config import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The exponent bits: all set means infinity or not-a-number.
_EXPONENTS = {np.dtype(np.float32): 0x7F800000, np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
FLOATS = frozenset(dtype for name, dtype in DTYPES.items() if name.startswith(("F", "BF")))
INDEX_SUFFIX = ".safetensors.index.json"
_MAX_HEADER = 100_000_000  # what the safetensors library itself allows
_MAX_AXES = 64  # what numpy allows
_PIECE = 1 << 22  # bytes that are looked at or written at once
TENSORS_AHEAD = 2  # computed while one is written


@dataclass(frozen=True)
class Tensor:
    """One tensor in a file: `read()` gives a view of the mapped file, which costs no memory of the process's own.

    stored  dtype in the file, where `read()` gives another
    scale   key of the tensor that it is multiplied by
    """

    key: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    stored: np.dtype | None = None
    scale: str | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, after checking that its header is sound and every byte it promises is there."""
    header, start = _read_header(file)
    header.pop("__metadata__", None)
    available = file.stat().st_size - start
    mapped = np.asarray(np.memmap(file, np.uint8, "r"))
    used = 0
    tensors: dict[str, Tensor] = {}
    entries = [(key, *_checked_entry(file, key, entry)) for key, entry in header.items()]
    for key, dtype, shape, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        if end > available:
            raise UserError(
                f"{file} is truncated: {key} of shape {shape} should end at byte {start + end}, "
                f"the file has {start + available}; download it again."
            )
        if begin != used:
            raise UserError(f"{file} is damaged: {key} begins at byte {begin}, expected {used}; download it again.")
        used = end
        tensors[key] = Tensor(key, file, dtype, shape, _viewer(mapped[start + begin : start + end], dtype, shape))
    if used != available:
        raise UserError(f"{file} is damaged: {available} bytes of data, expected {used}; download it again.")
    return tensors


def _viewer(raw: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: raw.view(dtype).reshape(shape)


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(entries, offset of the first data byte)."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(
                f"{file} is truncated or no safetensors file: its header should have {length} bytes, "
                f"the file has {size}; download it again."
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _without_duplicates(file, pairs))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: its header is not JSON ({error}); download it again.") from error
    if not isinstance(header, dict):
        raise UserError(f"{file} is damaged: its header should be a JSON object; download it again.")
    return header, 8 + length


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that a safetensors file carries beside its tensors. Raises UserError for a damaged file."""
    metadata = _read_header(file)[0].get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UserError(f"{file} is damaged: its metadata should be an object of texts; download it again.")
    return metadata


def _without_duplicates(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{file} holds {twice} twice; expected every key once; save the file again.")
    return entries


def _checked_entry(file: Path, key: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if not _is_entry(entry):
        raise UserError(
            f"{file} is damaged: the header entry of {key} is not a dtype, a shape and two offsets; download it again."
        )
    name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if name not in DTYPES:
        raise UserError(
            f"{file}: {key} has dtype {name}, expected one of {', '.join(DTYPES)}; save it in another dtype."
        )
    dtype = DTYPES[name]
    expected = math.prod(shape) * dtype.itemsize
    if begin < 0 or min(shape, default=0) < 0 or end - begin != expected:
        raise UserError(
            f"{file} is damaged: {key} of shape {shape} and dtype {name} needs {expected} bytes, "
            f"its header gives it {end - begin}; download it again."
        )
    return dtype, shape, begin, end


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    return _are_integers(shape) and _are_integers(offsets) and len(shape) <= _MAX_AXES and len(offsets) == 2


def _are_integers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and abs(value) < 1 << 63 for value in values)


def has_nan_or_infinity(array: np.ndarray) -> bool:
    """Whether a float array holds a NaN or an infinity; integers never do."""
    if array.dtype not in FLOATS:
        return False
    # The order of the values is all one: that of the memory takes no copy of a reordered view.
    flat = array.transpose(np.argsort(array.strides)[::-1]).reshape(-1)
    # In pieces, so that the mask of a large tensor never exists as a whole.
    return any(_any_not_finite(flat[i : i + _PIECE]) for i in range(0, flat.size, _PIECE))


def _any_not_finite(values: np.ndarray) -> bool:
    exponent = _EXPONENTS.get(values.dtype)
    if exponent is None:
        return not bool(np.isfinite(values).all())
    # Several times as fast as isfinite, which converts bfloat16 value by value.
    bits = values.view(np.dtype(f"u{values.dtype.itemsize}"))
    return bool(((bits & exponent) == exponent).any())


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(bool((a == b).all()) for a, b in zip(_pieces(one.read()), _pieces(other.read()), strict=True))


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written: `read()` is called once, when its turn comes."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_tensors(folder: Path, stem: str, tensors: Sequence[Outgoing], max_shard_bytes: int) -> None:
    """Write tensors as `stem.safetensors`, or as numbered shards with an index when they exceed a shard's size."""
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map.update({tensor.key: name for tensor in shard})
    total = sum(tensor.bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_durably(folder / f"{stem}{INDEX_SUFFIX}", (json.dumps(index, indent=2) + "\n").encode())


def _shards(tensors: Sequence[Outgoing], limit: int) -> list[list[Outgoing]]:
    shards: list[list[Outgoing]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    return shards


def write_safetensors(file: Path, tensors: Sequence[Outgoing], metadata: Mapping[str, str] | None = None) -> None:
    """Stream tensors, and texts beside them, into one file, flushed to disk before returning."""
    # Widest dtype first keeps every tensor aligned without gaps, which the format forbids.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in ordered:
        span = [offset, offset + tensor.bytes]
        header[tensor.key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor, array in zip(ordered, _read_ahead(ordered), strict=True):
            assert array.shape == tensor.shape and array.dtype == tensor.dtype, tensor.key
            write_pieces(stream, array)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that, when the block is left by an error or a signal, finish what they are at and start nothing more."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _read_ahead(tensors: Sequence[Outgoing]) -> Iterator[np.ndarray]:
    """The tensors' values in order, the next ones being computed while one is used."""
    with workers(TENSORS_AHEAD) as pool:
        waiting: deque[Future[np.ndarray]] = deque()
        for tensor in tensors:
            waiting.append(pool.submit(_values, tensor))
            if len(waiting) > TENSORS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _values(tensor: Outgoing) -> np.ndarray:
    return contiguous(tensor.read())


def write_pieces(stream: BinaryIO, array: np.ndarray) -> None:
    """The array's bytes in C order, a few at a time."""
    for piece in _pieces(array):
        stream.write(piece.data)


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    raw = contiguous(array).reshape(-1).view(np.uint8)
    return (raw[i : i + _PIECE] for i in range(0, raw.size, _PIECE))


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(file: Path, content: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    with open(file, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
