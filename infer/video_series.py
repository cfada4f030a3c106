"""Many videos in one folder, made one after another; a later run goes on where one was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convert.progress import progress_bar
from dit_jax.config import UserError
from dit_jax.methods.plan import Plan
from infer import media
from infer.request import Job

BY_THE_WAY = {"model"}  # may differ within a series: a checkpoint is known by its hash


class Video(NamedTuple):
    """A video of a series: where it goes, the job that makes it, and what its metadata says of that."""

    path: Path
    job: Job
    told: dict[str, Any]


def make_series(pipe: Any, paths: Sequence[Path], jobs: Sequence[Job]) -> tuple[int, int]:
    """Makes the videos that are not there yet; (how many were made, how many were there).

    Before the first is made, every file that is there is looked at: UserError if one of another setting, seed or
    checkpoint has a name that is needed.
    """
    settings = _settings(jobs[0].plan)
    videos = [Video(path, job, pipe.metadata(job)[0] | settings) for path, job in zip(paths, jobs, strict=True)]
    looked_at = progress_bar(videos, desc="looking at what is there", unit="file", delay=3, leave=False)
    missing = [video for video in looked_at if not is_there(video)]
    there = len(videos) - len(missing)
    with progress_bar(total=len(videos), initial=there, desc="videos", unit="video") as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.set_postfix_str(f"{stage} {done}/{total}")

        for video in missing:
            result = pipe.decode(video.job, pipe.denoise(video.job, show), show)
            media.save(video.path, result.frames[0], result.fps, video.told)
            bar.update()
    return len(missing), there


def is_there(video: Video) -> bool:
    """Whether the file is there, whole, and made by this very job; UserError where it is of another."""
    if not video.path.exists() or not _is_whole(video.path):
        return False
    try:
        found = media.read_metadata(video.path)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{video.path} is there and was not made by dit-generate: expected a folder of its own; name another --out"
        ) from error
    expected = json.loads(json.dumps(video.told))
    for name in sorted((expected.keys() | found.keys()) - BY_THE_WAY):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{video.path} is there with {name} {found.get(name)!r}, this run has {expected.get(name)!r}: expected "
                "one setting for all videos of a folder; name another --out, or remove what is there"
            )
    return True


def _is_whole(path: Path) -> bool:
    """Whether the boxes of an MP4 (ISO/IEC 14496-12) end where the file does."""
    size, place = path.stat().st_size, 0
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            head = file.read(16)
            length = int.from_bytes(head[:4])
            if length == 1:
                length = int.from_bytes(head[8:])
            if length < 8:
                return False
            place += length
    return place == size > 0


def _settings(plan: Plan) -> dict[str, str]:
    """What a plan's words leave open: they may name files."""
    if not plan.methods:
        return {}
    return {"plan_settings": hashlib.sha256(repr(plan.methods).encode()).hexdigest()[:16]}
