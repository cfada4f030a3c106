"""Tensors in files of the outside world: safetensors, mapped to read and streamed to write, and torch's `.pth`."""

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
_FLOATS = frozenset(dtype for name, dtype in DTYPES.items() if name.startswith(("F", "BF")))
INDEX_SUFFIX = ".safetensors.index.json"
WEIGHT_SUFFIXES = (INDEX_SUFFIX, ".safetensors", ".pth")  # in the order in which they are looked for
_MAX_HEADER = 100_000_000  # what the safetensors library itself allows
_MAX_AXES = 64  # what numpy allows
_PIECE = 1 << 22  # bytes that are looked at or written at once
TENSORS_AHEAD = 2  # computed while one is written


@dataclass(frozen=True)
class Tensor:
    """One tensor in a file: `read()` gives a view of the mapped file, which costs no memory of the process's own."""

    key: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of the weights `stem` in a folder: one `.safetensors`, its shards with an index, or a `.pth`.

    Raises UserError for files that are missing, damaged, at odds with their index, or outside the folder.
    """
    file = _first_file(folder, stem)
    if file.name.endswith(INDEX_SUFFIX):
        return _read_sharded(folder, file)
    return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that `read_tensors` reads. Raises UserError as it does for files that are missing or outside."""
    file = _first_file(folder, stem)
    if not file.name.endswith(INDEX_SUFFIX):
        return [file]
    return [file, *(_shard(folder, file, name) for name in sorted(set(_read_weight_map(file).values())))]


def _first_file(folder: Path, stem: str) -> Path:
    for suffix in WEIGHT_SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise UserError(
        f"{folder} has no weights: expected {stem}.safetensors, or its shards with {stem}{INDEX_SUFFIX}; "
        "download the checkpoint again."
    )


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, after checking that its header is sound and every byte it promises is there."""
    header, start = _read_header(file)
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
    """(entries without metadata, offset of the first data byte)."""
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
    header.pop("__metadata__", None)
    return header, 8 + length


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


def _read_sharded(folder: Path, index: Path) -> dict[str, Tensor]:
    weight_map = _read_weight_map(index)
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        for key, tensor in read_safetensors(_shard(folder, index, name)).items():
            if key in tensors:
                raise UserError(f"{key} is both in {tensors[key].file} and in {tensor.file}; expected it once.")
            if weight_map.get(key) != name:
                raise UserError(f"{key} is in {tensor.file}, but {index} puts it in {weight_map.get(key, 'no file')}.")
            tensors[key] = tensor
    lost = [key for key in weight_map if key not in tensors]
    if lost:
        raise UserError(
            f"{folder / weight_map[lost[0]]} lacks {lost[0]}, which {index.name} promises; download it again."
        )
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    """Key of every tensor -> name of its file, beside the index."""
    try:
        content = json.loads(index.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{index} is not JSON ({error}); download it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} is damaged: it has no weight_map from keys to files; download it again.")
    for name in weight_map.values():
        # A name and nothing else: an index may come from a stranger, and must not make us read files elsewhere.
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise UserError(
                f"{index} points to {name!r}, outside its own folder; expected the name of a file beside it."
            )
    return weight_map


def _shard(folder: Path, index: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise UserError(f"{index} points to {name}, which is missing from {folder}; download it again.")
    return folder / name


def read_torch(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, mapped and without running any code in it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f'{file} can only be read with torch; run: pip install "dit-jax[torch]".') from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a different kind for every sort of damage
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{file} cannot be read as a file of weights ({reason}); download it again.") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} should hold a dict of tensors and nothing else; save model.state_dict() again.")
    return {key: _from_torch(key, file, value, torch) for key, value in state.items()}


def _from_torch(key: str, file: Path, value: Any, torch: Any) -> Tensor:
    name = str(value.dtype).removeprefix("torch.")
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)

    def read() -> np.ndarray:
        # numpy has no bfloat16 of its own: torch hands the bytes over as integers.
        same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        return value.detach().contiguous().view(same_size).numpy().view(dtype)

    return Tensor(key, file, dtype, tuple(value.shape), read)


def has_nan_or_infinity(array: np.ndarray) -> bool:
    """Whether a float array holds a NaN or an infinity; integers never do."""
    if array.dtype not in _FLOATS:
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


def write_safetensors(file: Path, tensors: Sequence[Outgoing]) -> None:
    """Stream tensors into one file, flushed to disk before returning."""
    # Widest dtype first keeps every tensor aligned without gaps, which the format forbids.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
