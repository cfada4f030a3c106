"""Training data on disk: a manifest, and shards of examples as ArrayRecord files, each of one bucket.

Shapes: T Y X latent grid, C latent channels, L text tokens, E text width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load as arrays_of
from safetensors.numpy import save as bytes_of

from convert.progress import progress_bar
from dit_jax.config import UserError
from train.buckets import Bucket
from train.data_libraries import ArrayRecordDataSource, ArrayRecordReader, ArrayRecordWriter

FORMAT = 1
MANIFEST = "manifest.json"
EMPTY = "empty_caption.safetensors"
SUFFIX = ".array_record"
PARTIAL = ".partial"
HOUR = 3600.0
_ABOUT = "example"  # one entry: safetensors writes several in no fixed order, and checksums would differ
_ONE_A_CHUNK = "group_size:1"  # so that a record is had without reading its neighbours


class Example(NamedTuple):
    """What a transformer is trained on, fp16, and what it was made from.

    arrays  latents [T, Y, X, C], text [L, E] up to its last row that is not 0, and what else the model is told
            (`Encoders.encode`)
    """

    arrays: dict[str, np.ndarray]
    caption: str
    file: str


def to_record(example: Example) -> bytes:
    """An example as a safetensors file, with caption and file name in its header."""
    with np.errstate(over="ignore"):  # told of below, by name
        arrays = {name: np.asarray(array, np.float16) for name, array in example.arrays.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"the {name} of {example.file} hold values that are no numbers of fp16: expected finite ones; look for "
                "damaged weights in the model"
            )
    arrays["text"] = _without_padding(arrays["text"])
    about = json.dumps({"file": example.file, "caption": example.caption})
    return bytes_of({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {_ABOUT: about})


def of_record(record: bytes) -> Example:
    """The example of a record."""
    header = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])
    about = json.loads(header["__metadata__"][_ABOUT])
    return Example(arrays_of(record), about["caption"], about["file"])


def _without_padding(text_LE: np.ndarray) -> np.ndarray:
    """Up to the last row that is not 0: what Wan's pipelines put behind a caption. FLUX's padding has states."""
    used = np.flatnonzero(text_LE.any(axis=-1))
    return text_LE[: used[-1] + 1 if len(used) else 0]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of examples of one bucket."""

    file: str
    bucket: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of training data holds.

    model      whose VAE and encoders made it, and `transformer`, the class of its transformer
    encoders   component -> hash (`encoders.encoder_hashes`)
    fps        frames a second of videos; 0 for pictures
    text       [L, E] of a caption's embeddings with the padding
    latents    bucket -> [T, Y, X, C]
    empty      the file of the empty caption's embeddings
    skipped    media that no example was made of, and why
    """

    model: str
    transformer: str
    encoders: dict[str, str]
    fps: float
    text: tuple[int, int]
    buckets: tuple[Bucket, ...]
    latents: dict[str, tuple[int, ...]]
    shards: tuple[Shard, ...]
    empty: Shard
    skipped: tuple[dict[str, str], ...] = ()

    @property
    def examples(self) -> int:
        """Of all buckets."""
        return sum(shard.records for shard in self.shards)

    def to_json(self) -> str:
        """As it stands in the file."""
        told = {"format": FORMAT, **asdict(self), "examples": self.examples}
        return json.dumps(told, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """The inverse; ValueError, KeyError or TypeError for what is none."""
        told = json.loads(text)
        if told.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        examples = told.pop("examples")
        told["shards"] = tuple(Shard(**shard) for shard in told["shards"])
        told["buckets"] = tuple(Bucket(**bucket) for bucket in told["buckets"])
        told["latents"] = {name: tuple(shape) for name, shape in told["latents"].items()}
        told |= {"empty": Shard(**told["empty"]), "text": tuple(told["text"]), "skipped": tuple(told["skipped"])}
        manifest = Manifest(**told)
        if manifest.examples != examples:
            raise ValueError(f"its shards hold {manifest.examples} examples and it tells of {examples}")
        return manifest


@dataclass(frozen=True)
class Shards:
    """Training data that can be read: example `i` of a bucket, in the order of the manifest."""

    folder: Path
    manifest: Manifest
    _sources: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Those that hold examples."""
        return tuple(bucket for bucket in self.manifest.buckets if self.count(bucket))

    def count(self, bucket: Bucket) -> int:
        """Examples of a bucket."""
        return sum(shard.records for shard in self._of(bucket))

    def read(self, bucket: Bucket, indices: Sequence[int]) -> list[Example]:
        """These examples of a bucket; UserError naming the shard that is damaged."""
        try:
            if bucket.name not in self._sources:
                files = [str(self.folder / shard.file) for shard in self._of(bucket)]
                self._sources[bucket.name] = ArrayRecordDataSource(files)
            records = self._sources[bucket.name].__getitems__([int(index) for index in indices])
        except RuntimeError as error:
            raise self._damage(bucket, indices, error) from error
        return [of_record(record) for record in records]

    @cached_property
    def empty(self) -> dict[str, np.ndarray]:
        """What is told of the empty caption: `text` without its padding, and `pooled` where the model has it."""
        return of_record((self.folder / self.manifest.empty.file).read_bytes()).arrays

    def check_matches(self, encoders: Mapping[str, str], model: str) -> None:
        """Raises UserError naming the first component that made these data and is another in the model to be trained.

        encoders  of that model: `encoder_hashes(open_checkpoint(model))`
        """
        made = self.manifest.encoders
        for name in [*made, *(name for name in encoders if name not in made)]:
            ours, theirs = encoders.get(name, "none"), made.get(name, "none")
            if ours != theirs:
                raise UserError(
                    f"{self.folder / MANIFEST} is for the {name} {theirs} (of {self.manifest.model}), {model} has the "
                    f"{name} {ours}: expected one for both; train a model that has it, or encode the media again with "
                    f"dit-encode --model {model}"
                )

    def _of(self, bucket: Bucket) -> list[Shard]:
        return [shard for shard in self.manifest.shards if shard.bucket == bucket.name]

    def _damage(self, bucket: Bucket, indices: Sequence[int], error: Exception) -> UserError:
        """Which of the shards that were read from it is."""
        shards = self._of(bucket)
        ends = list(accumulate(shard.records for shard in shards))
        touched = [shards[place] for place in sorted({int(np.searchsorted(ends, i, "right")) for i in indices})]
        found = next((damage for shard in touched if (damage := _damage_of(self.folder, shard))), None)
        names = ", ".join(str(self.folder / shard.file) for shard in touched)
        return found or UserError(f"cannot read {names} ({_line(error)}): {_REMEDY}")


_REMEDY = "remove that file and run the same dit-encode again, which makes what is missing"


def open_shards(
    folder: str | Path, *, checksums: bool = True, process_index: int = 0, process_count: int = 1
) -> Shards:
    """The training data in a folder, looked through before anything is trained on them.

    checksums  read all shards and compare their SHA-256; otherwise their sizes and numbers of records alone. Damage
               that only a checksum would show is still found when the record is read.
    process_index, process_count  of several hosts: each checks its share of the shards
    Raises UserError where the manifest is missing or damaged, and for a shard that is not what it says, by name.
    """
    folder = Path(folder).expanduser()
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"there is no {file}: expected a folder made by dit-encode; where that was stopped, run it again"
        )
    try:
        manifest = Manifest.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"cannot read {file} ({_line(error)}): expected a manifest of dit-encode, format {FORMAT}; run the same "
            "dit-encode again, which makes it anew"
        ) from error
    _check([manifest.empty, *manifest.shards[process_index::process_count]], folder, checksums)
    return Shards(folder, manifest)


def _check(shards: Sequence[Shard], folder: Path, checksums: bool) -> None:
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda shard: _damage_of(folder, shard, checksums), shards)
        for damage in progress_bar(
            found, total=len(shards), desc="checking shards", unit="shard", delay=3, leave=False
        ):
            if damage:
                pool.shutdown(wait=False, cancel_futures=True)
                raise damage


def _damage_of(folder: Path, shard: Shard, checksum: bool = True) -> UserError | None:
    file = folder / shard.file
    if not file.is_file():
        return UserError(f"{file} is missing: expected {shard.records} examples; run the same dit-encode again")
    if (size := file.stat().st_size) != shard.bytes:
        return UserError(f"{file} has {size} bytes: expected {shard.bytes}; {_REMEDY}")
    if checksum and (digest := sha256(file)) != shard.sha256:
        return UserError(f"{file} is damaged: expected the SHA-256 {shard.sha256}, found {digest}; {_REMEDY}")
    if file.suffix != SUFFIX:
        return None
    try:
        records = _records(file)
    except RuntimeError as error:
        return UserError(f"{file} is damaged ({_line(error)}): expected ArrayRecord; {_REMEDY}")
    if records != shard.records:
        return UserError(f"{file} holds {records} examples: expected {shard.records}; {_REMEDY}")
    return None


def _records(file: Path) -> int:
    reader = ArrayRecordReader(str(file))
    try:
        return reader.num_records()
    finally:
        reader.close()


class ShardWriter:
    """Writes a shard under another name; `close` gives it its own, so that a killed run leaves no half shard."""

    def __init__(self, file: Path, bucket: str):
        self._file, self._bucket, self._records = file, bucket, 0
        self._partial = partial_name(file)
        self._writer = ArrayRecordWriter(str(self._partial), _ONE_A_CHUNK)

    def write(self, example: Example) -> None:
        """Adds an example; UserError for one with values that are no numbers."""
        self._writer.write(to_record(example))
        self._records += 1

    def close(self) -> Shard:
        """Ends the shard and says what it is."""
        self._writer.close()
        shard = describe(self._partial, self._file.name, self._bucket, self._records)
        self._partial.replace(self._file)
        return shard

    def abandon(self) -> None:
        """Leaves nothing."""
        with contextlib.suppress(RuntimeError):
            self._writer.close()
        self._partial.unlink(missing_ok=True)


def describe(place: Path, name: str, bucket: str, records: int) -> Shard:
    """What the manifest says of a file that lies at `place`."""
    return Shard(file=name, bucket=bucket, records=records, bytes=place.stat().st_size, sha256=sha256(place))


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file under another name and renames it."""
    partial = partial_name(file)
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def partial_name(file: Path) -> Path:
    """Of a file that is being written; two encoders do not disturb each other, also on hosts that share the folder."""
    return file.with_name(f".{file.name}{_own_end()}")


def remove_partials(folder: Path) -> None:
    """Removes what was left half-written in a folder and those in it, by this process or for an hour."""
    for file in folder.rglob(f".*{PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):
            if file.name.endswith(_own_end()) or time.time() - file.stat().st_mtime > HOUR:
                file.unlink()


def _own_end() -> str:
    return f".{socket.gethostname()}.{os.getpid()}{PARTIAL}"


def sha256(file: Path) -> str:
    """Of a file's contents, in hex digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
