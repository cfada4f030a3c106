"""Components that another checkpoint holds: an index that names them, in place of copies of what is the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from convert.checkpoint import SHIPPED, Checkpoint, CheckpointLayout, open_checkpoint
from convert.components import read_json, referring
from convert.leaves import Leaf
from convert.original import INDEX
from dit_jax.config import UserError

Files = dict[str, Path | bytes]


def with_references(source: Checkpoint, base: str, layout: CheckpointLayout) -> tuple[Files, set[str]]:
    """The source's files with an index that names `base` for what both have alike, without the files of that; and the
    folders that are named. What the base names itself is named as it does.

    base  path, hub id or shipped model
    Where the source has a LoRA of what it was edited to be (`convert_to_lora`), the index names it too.
    Raises UserError for a base that is no pipeline in the layout that is written, and where nothing is the same.
    """
    other = open_checkpoint(base)
    if not (source.is_pipeline and other.is_pipeline) or other.layout != layout or layout == "original":
        found = other.layout if other.is_pipeline else "a lone model"
        raise UserError(
            f"{base} cannot be a base ({found}): expected a pipeline in the {layout} layout, as is written."
        )
    index = read_json(source.files[INDEX])
    shared = {name for name, entry in index.items() if isinstance(entry, list) and _is_same(source, other, name)}
    if not shared:
        raise UserError(f"{base} has no component of {source.place}: expected some to be the same; leave out the base.")
    named = base if base in SHIPPED or not Path(base).exists() else str(Path(base).resolve())
    loras = {name: file.name for name, file in source.loras.items() if name in source.edited}
    theirs = read_json(other.folder / INDEX)
    index |= {
        name: theirs[name] if name in other.places else referring(index[name], named, name, loras.get(name))
        for name in shared
    }
    files: Files = {place: content for place, content in source.files.items() if place.split("/")[0] not in shared}
    return files | {INDEX: json.dumps(index, indent=2).encode() + b"\n"}, shared


def _is_same(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    if name in other.loras:
        return False  # it is what the base makes of what it names
    if name in one.settings or name in other.settings:
        if one.settings.get(name) != other.settings.get(name):
            return False
        ours, theirs = one.leaves(name), other.leaves(name)
        return all(_is_equal(leaf, theirs[key]) for key, leaf in ours.items())
    ours_files, theirs_files = (_contents(checkpoint, name) for checkpoint in (one, other))
    return bool(ours_files) and ours_files == theirs_files


def _is_equal(one: Leaf, other: Leaf) -> bool:
    return one.dtype == other.dtype and np.array_equal(one.rectangle(None), other.rectangle(None))


def _contents(checkpoint: Checkpoint, name: str) -> dict[str, bytes]:
    inside = {place: content for place, content in checkpoint.files.items() if place.startswith(f"{name}/")}
    return {place: content if isinstance(content, bytes) else content.read_bytes() for place, content in inside.items()}
