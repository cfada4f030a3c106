"""Checkpoints of every layout behind one face: find one, say what is in it, read a component's weights from it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from convert import original
from convert.components import (
    COMPONENTS,
    Component,
    Settings,
    class_in_index,
    class_name,
    component_of,
    lora_in_index,
    read_json,
    reference_in_index,
    with_class,
)
from convert.fp8 import widened
from convert.hub import fetched, hub_place
from convert.leaves import Leaf, check_leaves, leaves_from_tensors
from convert.locks import FileLock
from convert.native import PARAMS, is_native, read_native
from convert.original import CONFIG, INDEX, Found
from convert.safetensors_files import Tensor
from convert.tables import Layout
from convert.weight_files import WEIGHT_SUFFIXES, read_tensors, weight_files
from dit_jax.config import UserError
from dit_jax.parameters import with_leaves

CheckpointLayout = Literal["diffusers", "native", "original"]
_DEMOS = Path(__file__).parents[1] / "dit_jax" / "demo"
_STUDENTS = ("demo-flux-four-steps", "demo-flux-pare", "demo-flux-pare-four-steps", "demo-flux-ddit")
SHIPPED = {name: _DEMOS / name for name in ("demo-wan", "demo-flux", *_STUDENTS)}
_OTHER_WEIGHTS = (".bin", ".bin.index.json", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
METHODS = "methods"  # folder of what a pipeline holds for methods
_DOCUMENTS = ("README.md", "LICENSE", "LICENSE.txt", "NOTICE")
_TOP_FILES = (INDEX, "generation_defaults.json", *_DOCUMENTS)
_PAGE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, in whatever layout, seen as a diffusers folder.

    settings   component -> config.json, of the components that have weights; a lone model is the component ""
    files      place in a diffusers folder -> file or contents, of everything but the components' weights
    file       the one file that it is, in the folder; None when it is all of the folder
    weights    component -> what holds its weights, in the original layout
    converted  component -> native weights to read in place of the folder's own (`convert/cache.py`)
    held       locks on these, for as long as this lives
    edited     component -> leaves in place of those that its files hold
    places     component -> its folder in another checkpoint, which the index names
    loras      component -> the file of a LoRA that is merged into what is read from there
    """

    folder: Path
    layout: CheckpointLayout
    settings: dict[str, Settings]
    files: dict[str, Path | bytes]
    file: Path | None = None
    weights: dict[str, Found] = field(default_factory=dict, repr=False)
    converted: dict[str, Path] = field(default_factory=dict)
    held: tuple[FileLock, ...] = ()
    edited: dict[str, dict[str, Leaf]] = field(default_factory=dict, repr=False)
    places: dict[str, Path] = field(default_factory=dict)
    loras: dict[str, Path] = field(default_factory=dict)
    _components: dict[str, Component] = field(default_factory=dict, repr=False)

    @property
    def place(self) -> Path:
        """The folder, or the single file, that this checkpoint is."""
        return self.file or self.folder

    @property
    def is_pipeline(self) -> bool:
        return "" not in self.settings

    def component(self, name: str) -> Component:
        """The model and table of a component. Raises UserError when there is none of this name."""
        if name not in self.settings:
            known = ", ".join(self.settings) or "none"
            raise UserError(f"{self.folder} has no component {name!r} with weights; it has: {known}.")
        if name not in self._components:
            self._components[name] = component_of(self.settings[name], self._source(name))
        return self._components[name]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The outside tensors of a component, under the table's spelling of their keys, fp8 widened to bfloat16."""
        model = self.component(name)
        original = self.layout == "original"
        found = self.weights[name].tensors if original else read_tensors(self._source(name), model.stem)
        return model.canonical_tensors(widened(found))

    def weight_files(self, name: str) -> list[Path]:
        """The files on disk that hold a component's weights. Raises UserError when they are missing."""
        added = [self.loras[name]] if name in self.loras else []
        if self.layout == "native":
            return added + [file for file in (self._source(name) / PARAMS).rglob("*") if file.is_file()]
        if self.layout == "original":
            return self.weights[name].files
        return added + weight_files(self._source(name), self.component(name).stem)

    def leaves(self, name: str) -> dict[str, Leaf]:
        """Our leaves of a component, read when their turn comes.

        Raises UserError naming file, key, expected and found for whatever is missing, unexpected, misshapen or damaged.
        """
        if name in self.edited:
            return self.edited[name]
        if name in self.converted:
            return self._native(name, self.converted[name])
        own = self._own_leaves(name)
        if name not in self.loras:
            return own
        from convert.lora import with_lora

        return with_lora(own, self.loras[name], self.component(name), name)

    def _native(self, name: str, params: Path) -> dict[str, Leaf]:
        leaves = read_native(params)
        check_leaves(leaves, self.component(name).shapes, params)
        return leaves

    def _own_leaves(self, name: str) -> dict[str, Leaf]:
        """As the component's files hold them."""
        model, source = self.component(name), self._source(name)
        if self.layout == "native":
            return self._native(name, source / PARAMS)
        layout: Layout = self.weights[name].kind.layout if self.layout == "original" else "diffusers"
        return leaves_from_tensors(self.tensors(name), model.rows, model.shapes, layout, source)

    def _source(self, name: str) -> Path:
        """Where a component's weights lie: what an error about it names."""
        return self.weights[name].file if name in self.weights else self.places.get(name, self.folder / name)


def resolve(path_or_id: str | Path) -> Path:
    """The folder or file of a path, of a hub id `org/name[/path/file.safetensors][@revision]` (downloaded when not
    cached; of a pipeline what is read of it), or that of a shipped model.

    Raises UserError when it is none of these or cannot be had.
    """
    text = str(path_or_id)
    if text in SHIPPED and not Path(text).exists():
        return SHIPPED[text]
    path = Path(text).expanduser()
    if path.exists():
        return path
    place = hub_place(text)
    if place is None:
        raise UserError(
            f"there is no {text}; expected a folder or file, a hub id org/name[/file][@revision], or "
            f"{', '.join(SHIPPED)}."
        )
    return fetched(place, _files_of_pipeline)


def open_checkpoint(path_or_id: str | Path) -> Checkpoint:
    """The checkpoint at a path, hub id or name of a shipped model.

    Raises UserError when it is not a checkpoint in one of the three layouts, nor a single file of weights.
    """
    path = resolve(path_or_id)
    if not path.is_dir():
        return _original(path.parent, original.describe_file(_weights_file(path)), path)
    if (path / INDEX).is_file():
        return _open_pipeline(path)
    settings = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if class_name(settings) not in COMPONENTS or (path / original.SIDECAR).is_file():
        described = original.describe_folder(path)
        if described is not None:
            return _original(path, described)
    if settings:
        layout: CheckpointLayout = "native" if is_native(path) else "diffusers"
        return Checkpoint(folder=path, layout=layout, settings={"": settings}, files=_other_files(path, ""))
    raise UserError(
        f"{path} is no checkpoint: expected {INDEX}, {CONFIG} with weights, or the original files of Wan or FLUX in it."
    )


def _original(folder: Path, described: original.Described, file: Path | None = None) -> Checkpoint:
    return Checkpoint(
        folder=folder,
        layout="original",
        settings=described.settings,
        files=described.files,
        weights=described.weights,
        file=file,
    )


def _weights_file(path: Path) -> Path:
    if not path.is_file() or not path.name.endswith(WEIGHT_SUFFIXES):
        raise UserError(
            f"{path} is neither the folder of a checkpoint nor a file of weights; expected one of these, a file ending "
            f"in {', '.join(WEIGHT_SUFFIXES)}."
        )
    return path


def _open_pipeline(folder: Path) -> Checkpoint:
    settings: dict[str, Settings] = {}
    files: dict[str, Path | bytes] = {name: folder / name for name in _top_files(folder)}
    files |= {file.relative_to(folder).as_posix(): file for file in (folder / METHODS).rglob("*") if file.is_file()}
    native, places, loras = set(), {}, {}
    index = read_json(folder / INDEX)
    for name, entry in index.items():
        named = class_in_index(entry)
        if name.startswith("_") or named is None:
            continue
        place = folder / name
        if (elsewhere := reference_in_index(entry)) is not None:
            checkpoint, inside = elsewhere
            place = places[name] = resolve(checkpoint) / inside
            index[name] = entry[:-1]
            if (lora := lora_in_index(entry)) is not None:
                loras[name] = folder / lora
                if Path(lora).name != lora or not loras[name].is_file():
                    raise UserError(f"{folder} lacks the file {lora}, which {INDEX} names; download it again.")
        if Path(name).name != name or not place.is_dir():
            raise UserError(f"{folder} lacks the folder {name}, which {INDEX} names; download the checkpoint again.")
        files |= _other_files(place, name)
        if not _has_weights(place) and named not in COMPONENTS:
            continue
        if not (place / CONFIG).is_file():
            raise UserError(f"{place} lacks {CONFIG}; download the checkpoint again.")
        settings[name] = with_class(read_json(place / CONFIG), named)
        native.add(is_native(place))
    if len(native) > 1:
        raise UserError(f"{folder} mixes components with {PARAMS} and with safetensors; expected one or the other.")
    layout: CheckpointLayout = "native" if True in native else "diffusers"
    if places:
        files[INDEX] = json.dumps(index, indent=2).encode() + b"\n"
    return Checkpoint(folder=folder, layout=layout, settings=settings, files=files, places=places, loras=loras)


def _is_weights(file: Path) -> bool:
    return file.name.endswith((*WEIGHT_SUFFIXES, *_OTHER_WEIGHTS))


def _has_weights(folder: Path) -> bool:
    return is_native(folder) or any(_is_weights(file) for file in folder.iterdir())


def _top_files(folder: Path) -> list[str]:
    return [name for name in _TOP_FILES if (folder / name).is_file()]


def _files_of_pipeline(index: Settings) -> list[str]:
    """Patterns of what is read of a pipeline: its authors may have put single files beside its folders."""
    wanted = [*_TOP_FILES, f"{METHODS}/*"]
    for name, entry in index.items():
        if reference_in_index(entry) is None and class_in_index(entry) is not None:
            wanted.append(f"{name}/*")
        if (lora := lora_in_index(entry)) is not None:
            wanted.append(lora)
    return wanted


def _other_files(place: Path, name: str) -> dict[str, Path | bytes]:
    found = sorted(file for file in place.iterdir() if file.is_file() and not _is_weights(file))
    return {f"{name}/{file.name}" if name else file.name: file for file in found}


Shardings = Mapping[str, Sharding] | Callable[[str, tuple[int, ...]], Sharding]


def load_model(
    folder: str | Path | Checkpoint,
    component: str = "",
    *,
    mesh: Mesh | None = None,
    shardings: Shardings | None = None,
    dtype: Any = None,
) -> nnx.Module:
    """A component of a checkpoint as a model of ours, every leaf read straight to its place.

    folder     path, hub id, shipped model, or a Checkpoint that is already open
    component  folder of the component in a pipeline; "" for a lone model
    shardings  dotted path of a leaf -> sharding, as a mapping or a function of path and shape; by default every leaf is
               replicated over `mesh`, or put on the default device without one
    dtype      floating leaves are cast to it, except those that the model keeps in fp32; None keeps the stored dtypes
    Raises UserError as `Checkpoint.leaves` does.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder)
    read = leaf_reader(checkpoint, component, mesh=mesh, shardings=shardings, dtype=dtype)
    model = checkpoint.component(component)
    return with_leaves(model.abstract, {name: read(name) for name in model.shapes})


def leaf_reader(
    checkpoint: Checkpoint,
    component: str,
    *,
    mesh: Mesh | None = None,
    shardings: Shardings | None = None,
    dtype: Any = None,
) -> Callable[[str], jax.Array]:
    """Reads one leaf of a component by its dotted path, straight to its place; arguments as of `load_model`."""
    leaves, precision = (
        checkpoint.leaves(component),
        checkpoint.component(component).precision(dtype),
    )

    def read(name: str) -> jax.Array:
        leaf = leaves[name]
        if dtype is not None and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            leaf = leaf.cast(np.dtype(precision.dtype(name)))
        return _placed(leaf, _sharding(name, leaf, mesh, shardings))

    return read


def _sharding(name: str, leaf: Leaf, mesh: Mesh | None, shardings: Shardings | None) -> Sharding | None:
    if callable(shardings):
        return shardings(name, leaf.shape)
    if shardings is not None:
        return shardings[name]
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def _placed(leaf: Leaf, sharding: Sharding | None) -> jax.Array:
    # On a CPU an array may share memory with what it is made from: copies, never a file that someone could write to.
    if sharding is None:
        return jax.device_put(leaf.rectangle(None))
    return jax.make_array_from_callback(leaf.shape, sharding, leaf.rectangle)


def checkpoint_hash(checkpoint: str | Path | Checkpoint) -> str:
    """Twelve hex digits that change when a checkpoint's weights or configs do, whatever else lies in its folder.

    checkpoint  path, hub id, shipped model, or a Checkpoint that is already open
    SHA-256 over the place and size of every file of the checkpoint and samples of its contents: the first 64 KB, which
    hold a safetensors header, and sixteen more pieces of 64 KB spread evenly; files of up to 17 pieces are hashed
    whole. An edit that keeps a file's size and misses all samples goes unseen: this tells checkpoints apart and proves
    no integrity. The same weights in two layouts have two hashes. Raises UserError for what is no checkpoint.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    contents = dict(checkpoint.files)
    for name in checkpoint.settings:
        for file in checkpoint.weight_files(name):
            root = checkpoint.folder if file.is_relative_to(checkpoint.folder) else checkpoint.places[name].parent
            contents[file.relative_to(root).as_posix()] = file
    digest = hashlib.sha256()
    for place in sorted(contents, key=Path):
        if not _is_incidental(Path(place)):
            for piece in _samples(place, contents[place]):
                digest.update(piece)
    return digest.hexdigest()[:12]


def _samples(place: str, content: Path | bytes) -> Iterator[bytes]:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    yield f"{place}\0{size}\0".encode()
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as stream:
        if size <= 17 * _PAGE:
            yield stream.read()
            return
        for start in [0, *(i * (size - _PAGE) // 16 for i in range(1, 17))]:
            stream.seek(start)
            yield stream.read(_PAGE)


def _is_incidental(place: Path) -> bool:
    """Files that say nothing of the model: hidden ones, documents, and Orbax's time stamps."""
    hidden = any(part.startswith(".") and part != ".zarray" for part in place.parts)
    return hidden or place.suffix == ".md" or place.name in (*_DOCUMENTS, "_CHECKPOINT_METADATA", "commit_success.txt")
