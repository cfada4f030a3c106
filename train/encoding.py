"""From media and captions to a folder of training data, a portion of the captions at a time.

A portion is what is done or not done: its shards (one for each bucket that it has examples of) take their names when
they are whole, and the portion's own file, which says what they are, takes its name last. A run that was killed leaves
nothing half-written that has a name, and the next one makes the portions that are missing. Whoever finds that all are
there writes the manifest, so that several hosts may each make a part of them.

Shapes: T frames, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.progress import progress_bar
from dit_jax.config import UserError
from train.buckets import Bucket
from train.captions_file import Caption
from train.data_libraries import grain
from train.encoders import Encoders, encoder_hashes
from train.media_files import IMAGES, VIDEOS, Clip, UnusableError, media_in, place_of, read_picture, read_video
from train.shards import (
    EMPTY,
    MANIFEST,
    PARTIAL,
    SUFFIX,
    Example,
    Manifest,
    Shard,
    ShardWriter,
    describe,
    remove_partials,
    to_record,
    write_whole,
)

PORTIONS = "portions"
READERS = min(8, os.cpu_count() or 1)  # media read at once
Skipped = dict[str, str]  # file and reason
Group = list[tuple[Caption, np.ndarray]]  # captions and frames of one bucket that are encoded together


class Portion(NamedTuple):
    """Some of the captions, next to each other in their file."""

    number: int
    captions: tuple[Caption, ...]

    @property
    def hash(self) -> str:
        """Of the captions."""
        return hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()[:16]


class Read(NamedTuple):
    """A caption with its medium (bucket and frames uint8 [T, H, W, 3]), or with the reason why that is unusable."""

    caption: Caption
    medium: Clip | str


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is made of what.

    captions  all of them, of which a portion has `portion`
    batch     examples that the VAE and the encoders take at a time
    fps       frames a second of videos; 0 where the media are pictures
    """

    out: Path
    media: Path
    captions: Sequence[Caption]
    buckets: tuple[Bucket, ...]
    batch: int
    portion: int
    fps: float

    @cached_property
    def portions(self) -> list[Portion]:
        """All portions; they follow from the captions alone, so that every host has the same."""
        starts = range(0, len(self.captions), self.portion)
        return [
            Portion(number, tuple(self.captions[start : start + self.portion])) for number, start in enumerate(starts)
        ]

    def of_part(self, part: int, parts: int) -> list[Portion]:
        """Those that host `part` (from 0) of `parts` makes."""
        return self.portions[part::parts]


class Encoding:
    """A job, and what encodes for it."""

    def __init__(self, job: Job, encoders: Encoders):
        self.job, self.encoders = job, encoders
        self.hashes = encoder_hashes(encoders.checkpoint)
        self.settings = {
            "encoders": self.hashes,
            "buckets": [bucket.name for bucket in job.buckets],
            "fps": job.fps,
            "portion": job.portion,
        }

    def run(self, portions: Sequence[Portion]) -> Manifest | None:
        """Makes those of the portions that are not there yet; the manifest where then none is missing any more.

        Raises UserError where the folder holds data of other settings, and where no medium can be used.
        """
        (self.job.out / PORTIONS).mkdir(parents=True, exist_ok=True)
        missing = [portion for portion in portions if self._made(portion) is None]
        if missing:
            # It tells of shards that are about to be replaced.
            (self.job.out / MANIFEST).unlink(missing_ok=True)
        total, todo = (sum(len(portion.captions) for portion in some) for some in (portions, missing))
        with progress_bar(total=total, initial=total - todo, desc="encoding", unit="example") as bar:
            for portion in missing:
                self._make(portion, bar)
        return self._finish()

    def _made(self, portion: Portion) -> dict[str, Any] | None:
        """What a portion's file says, if it is made and whole, of these captions; UserError for other settings."""
        try:
            told = json.loads(_file_of(self.job.out, portion.number).read_bytes())
            shards = [Shard(**shard) for shard in told["shards"]]
            settings, captions = told["settings"], told["captions"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise UserError(
                    f"{self.job.out} holds data of {name} {json.dumps(settings.get(name))}, this run has "
                    f"{json.dumps(value)}: expected one setting for all of a folder; name another --out, or remove it"
                )
        whole = all(_has_size(self.job.out / shard.file, shard.bytes) for shard in shards)
        return told | {"shards": shards} if whole and captions == portion.hash else None

    def _make(self, portion: Portion, bar) -> None:
        writers: dict[Bucket, ShardWriter] = {}
        waiting: dict[Bucket, Group] = {}
        skipped: list[Skipped] = []
        try:
            for read in _media(self.job, portion.captions):
                bar.update()
                if isinstance(read.medium, str):
                    skipped.append(_skip(read.caption.file, read.medium))
                    continue
                bucket, frames = read.medium
                group = waiting.setdefault(bucket, [])
                group.append((read.caption, frames))
                if len(group) == self.job.batch:
                    self._write(portion, bucket, waiting.pop(bucket), writers)
            for bucket, group in waiting.items():
                self._write(portion, bucket, group, writers)
            shards = [asdict(writers[bucket].close()) for bucket in sorted(writers)]
        except BaseException:
            for writer in writers.values():
                writer.abandon()
            raise
        told = {"settings": self.settings, "captions": portion.hash, "shards": shards, "skipped": skipped}
        write_whole(_file_of(self.job.out, portion.number), _json(told))

    def _write(self, portion: Portion, bucket: Bucket, group: Group, writers: dict[Bucket, ShardWriter]) -> None:
        # The last group is filled up with its last example: another size would be another program to compile.
        filled = group + group[-1:] * (self.job.batch - len(group))
        texts = [caption.text for caption, _ in filled]
        arrays = self.encoders.encode(texts, bucket, np.stack([frames for _, frames in filled]))
        if bucket not in writers:
            file = self.job.out / f"{portion.number:06d}-{bucket.name}{SUFFIX}"
            writers[bucket] = ShardWriter(file, bucket.name)
        for row, (caption, _) in enumerate(group):
            of_row = {name: array[row] for name, array in arrays.items()}
            writers[bucket].write(Example(of_row, caption.text, caption.file))

    def _finish(self) -> Manifest | None:
        """Writes the manifest and removes what it does not tell of, where every portion is made."""
        made = []
        for portion in self.job.portions:
            if (told := self._made(portion)) is None:
                return None
            made.append(told)
        skipped = [one for told in made for one in told["skipped"]] + _without_caption(self.job)
        shards = tuple(shard for told in made for shard in told["shards"])
        if not shards:
            raise UserError(
                f"none of the {len(skipped)} media under {self.job.media} can be used ({skipped[0]['file']}: "
                f"{skipped[0]['reason']}): expected some; mend or replace them, and remove {self.job.out}"
            )
        empty, text = self._empty_caption()
        buckets = self.job.buckets
        manifest = Manifest(
            model=self.encoders.name,
            transformer=self.encoders.checkpoint.component("transformer").class_name,
            encoders=self.hashes,
            fps=self.job.fps,
            text=text,
            buckets=buckets,
            latents={bucket.name: self.encoders.latents_shape(bucket.size, bucket.frames) for bucket in buckets},
            shards=shards,
            empty=empty,
            skipped=tuple(skipped),
        )
        self._tidy({shard.file for shard in shards}, len(made))
        write_whole(self.job.out / MANIFEST, manifest.to_json().encode())
        return manifest

    def _empty_caption(self) -> tuple[Shard, tuple[int, int]]:
        """The file of the empty caption, and the shape of a caption's embeddings with the padding."""
        bucket = min(self.job.buckets, key=lambda bucket: bucket.width * bucket.height * bucket.frames)
        grey = np.full((1, bucket.frames, bucket.height, bucket.width, 3), 127, np.uint8)
        told = {name: values[0] for name, values in self.encoders.told([""], bucket, grey).items()}
        file = self.job.out / EMPTY
        of_text = {name: values for name, values in told.items() if name in ("text", "pooled")}
        write_whole(file, to_record(Example(of_text, "", "")))
        return describe(file, EMPTY, "", 1), told["text"].shape

    def _tidy(self, shards: set[str], portions: int) -> None:
        """Removes what killed runs, and portions that were made anew, have left."""
        for file in self.job.out.glob(f"*{SUFFIX}"):
            if file.name not in shards:
                file.unlink(missing_ok=True)
        remove_partials(self.job.out)
        kept = {_file_of(self.job.out, number) for number in range(portions)}
        for file in (self.job.out / PORTIONS).iterdir():
            if file not in kept and file.suffix != PARTIAL:
                file.unlink(missing_ok=True)


def _media(job: Job, captions: Sequence[Caption]) -> Iterator[Read]:
    """The media of these captions in order, some of them read ahead."""
    options = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=2 * READERS)
    reads = grain.MapDataset.source(captions).map(partial(_read, job)).to_iter_dataset(options)
    yield from iter(reads)


def _read(job: Job, caption: Caption) -> Read:
    try:
        if not caption.text.strip():
            raise UnusableError("its caption is empty")
        file = place_of(job.media, caption.file)
        clip = read_video(file, job.buckets, job.fps) if job.fps else read_picture(file, job.buckets)
    except UnusableError as error:
        return Read(caption, str(error))
    return Read(caption, clip)


def _without_caption(job: Job) -> list[Skipped]:
    told = {caption.file for caption in job.captions}
    missing = [file for file in media_in(job.media, VIDEOS if job.fps else IMAGES) if file not in told]
    return [_skip(file, "it has no caption") for file in missing]


def _skip(file: str, reason: str) -> Skipped:
    warnings.warn(f"{file} is left out: {reason}", stacklevel=2)
    return {"file": file, "reason": reason}


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _file_of(out: Path, number: int) -> Path:
    return out / PORTIONS / f"{number:06d}.json"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
