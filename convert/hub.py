"""What a hub id means, and its files in the hub's cache, fetched when they are not there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.components import read_json
from convert.original import INDEX
from dit_jax.config import UserError

_WEIGHTS = r"\.(safetensors|sft|pth|pt|bin|ckpt)"
_NAME = r"\w[\w.-]*"
_ID = re.compile(
    rf"(?P<repository>{_NAME}/(?![^/@]*{_WEIGHTS}(@|$)){_NAME})(/(?P<file>[^@]+{_WEIGHTS}))?(@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True, kw_only=True)
class HubPlace:
    """A repository of the hub, or one file in it, at a revision."""

    repository: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        file, revision = f"/{self.file}" if self.file else "", f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{file}{revision}"


def hub_place(text: str | Path) -> HubPlace | None:
    """What `org/name[/path/file.safetensors][@revision]` names; None for what has another form."""
    found = _ID.fullmatch(str(text))
    return HubPlace(**found.groupdict()) if found else None


def fetched(place: HubPlace, wanted: Callable[[dict[str, Any]], list[str]]) -> Path:
    """The file, or the folder of a repository: a pipeline's with the files that are wanted, any other's with all.

    wanted  what model_index.json holds -> patterns of files
    Raises UserError when the hub does not give them and the cache lacks them.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    if place.file is not None:
        return fetched_file(place, place.file)
    with _told(place):
        try:
            index = huggingface_hub.hf_hub_download(place.repository, INDEX, revision=place.revision)
        except EntryNotFoundError:
            return Path(huggingface_hub.snapshot_download(place.repository, revision=place.revision))
        patterns = wanted(read_json(Path(index)))
        return Path(
            huggingface_hub.snapshot_download(place.repository, revision=place.revision, allow_patterns=patterns)
        )


def fetched_file(place: HubPlace, name: str) -> Path:
    """One file of a repository. Raises UserError as `fetched` does."""
    import huggingface_hub

    with _told(place):
        return Path(huggingface_hub.hf_hub_download(place.repository, name, revision=place.revision))


def file_names(place: HubPlace) -> list[str]:
    """The paths of a repository's files, or of those in the cache where the hub cannot be asked.

    Raises UserError when there is neither.
    """
    import huggingface_hub

    with _told(place):
        try:
            return huggingface_hub.list_repo_files(place.repository, revision=place.revision)
        except Exception:  # as in `_told`
            cached = _cached(place)
            if cached is None:
                raise
            return [file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file()]


def _cached(place: HubPlace) -> Path | None:
    """The folder of whatever the cache has of a repository."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    none: list[str] = []  # which files have to be there
    try:
        return Path(
            huggingface_hub.snapshot_download(
                place.repository, revision=place.revision, local_files_only=True, allow_patterns=none
            )
        )
    except LocalEntryNotFoundError:
        return None


@contextlib.contextmanager
def _told(place: HubPlace) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"there is no folder or file {place}, and the hub did not give it: {reason}") from error
