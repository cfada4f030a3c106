"""Which files of a folder hold a model's weights: one `.safetensors`, its shards with an index, or torch's `.pth`."""

from __future__ import annotations

import json
from pathlib import Path

from convert.safetensors_files import INDEX_SUFFIX, Tensor, read_safetensors
from convert.torch_files import read_torch
from dit_jax.config import UserError

# In the order in which they are looked for; `.sft` is what FLUX's authors have called safetensors.
TORCH_SUFFIXES = (".pth", ".pt")
WEIGHT_SUFFIXES = (INDEX_SUFFIX, ".safetensors", ".sft", *TORCH_SUFFIXES)


def read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a file of weights, or of the shards that an index `….safetensors.index.json` names.

    Raises UserError for files that are missing, damaged, at odds with their index, or outside its folder.
    """
    if file.name.endswith(INDEX_SUFFIX):
        return _read_sharded(file.parent, file)
    return read_torch(file) if file.suffix in TORCH_SUFFIXES else read_safetensors(file)


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of the weights `stem` in a folder; raises UserError as `read_weights` does."""
    return read_weights(_first_file(folder, stem))


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that `read_tensors` reads. Raises UserError as it does for files that are missing or outside."""
    return files_behind(_first_file(folder, stem))


def files_behind(file: Path) -> list[Path]:
    """A file of weights, or an index and its shards. Raises UserError for shards that are missing or outside."""
    if not file.name.endswith(INDEX_SUFFIX):
        return [file]
    return [file, *(_shard(file.parent, file, name) for name in sorted(set(_read_weight_map(file).values())))]


def weights_in(folder: Path) -> list[Path]:
    """The files of weights that lie in a folder, one for each stem: an index stands for its shards.

    Raises UserError for an index that is damaged.
    """
    found: dict[str, Path] = {}
    shards: set[Path] = set()
    for suffix in WEIGHT_SUFFIXES:
        for file in sorted(folder.glob(f"*{suffix}")):
            if file in shards or not file.is_file():
                continue
            found.setdefault(file.name.removesuffix(suffix), file)
            if suffix == INDEX_SUFFIX:
                shards |= {folder / name for name in _read_weight_map(file).values()}
    return list(found.values())


def _first_file(folder: Path, stem: str) -> Path:
    for suffix in WEIGHT_SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise UserError(
        f"{folder} has no weights: expected {stem}.safetensors, or its shards with {stem}{INDEX_SUFFIX}; "
        "download the checkpoint again."
    )


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
