"""LoRA files as adapters of our leaves: whichever program wrote them, whatever it called the layers."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np

from convert.checkpoint import resolve
from convert.components import Component
from convert.hub import HubPlace, fetched_file, file_names, hub_place
from convert.leaves import Leaf
from convert.lora_alphas import CONFIG as ALPHAS_BESIDE
from convert.lora_alphas import Alphas, alphas_in
from convert.lora_keys import Address, Module, Role, Target, address_of
from convert.safetensors_files import Tensor, has_nan_or_infinity, read_safetensors
from convert.tables import Row
from convert.torch_files import read_torch
from convert.transfer import LORA_WEIGHTS
from dit_jax.config import UserError
from dit_jax.lora import Adapter, Lora, delta

_FOLDER_FILES = (LORA_WEIGHTS, "adapter_model.safetensors")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_NAMED = 10  # keys that a message lists


class UnmatchedKeys(UserWarning):
    """Keys of a LoRA that match no layer, or layers of other shapes, were left out."""


@dataclass(kw_only=True)
class Layer:
    """What a file says of one outside module.

    name   the module's name in the file
    alpha  None stands for the rank
    """

    component: str
    name: str
    style: str
    module: Module
    block: int | None
    tensors: dict[Role, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def file(self) -> Path:
        """Where it stands."""
        return next(iter(self.tensors.values())).file

    @property
    def rank(self) -> int:
        """Rank of its low-rank pair; 0 without one."""
        return self.tensors["down"].shape[0] if "down" in self.tensors else 0

    @property
    def scale(self) -> float:
        """What the product of the pair is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def array(self, role: Role) -> np.ndarray:
        """One of its tensors. Raises UserError for NaN and infinities."""
        tensor = self.tensors[role]
        array = tensor.read()
        if has_nan_or_infinity(array):
            raise UserError(
                f"{tensor.file}: {tensor.key} holds NaN or infinite values; expected finite numbers; use another LoRA."
            )
        return array


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file, its keys understood.

    unmatched  keys that no module answers to
    misfits    what of each layer that is not among `layers` has another shape than the model
    """

    file: Path
    hash: str
    layers: list[Layer]
    unmatched: list[str]
    misfits: list[str]

    @property
    def styles(self) -> list[str]:
        """The styles of its keys, the commonest first."""
        return [style for style, _ in Counter(layer.style for layer in self.layers).most_common()]


def find_lora(path: str | Path) -> Path:
    """The file of a LoRA: a file, here or on the hub (`org/name/path/file.safetensors[@revision]`), or the one in a
    folder or hub repository that has diffusers' or PEFT's name.

    Raises UserError when there is none.
    """
    file = Path(path).expanduser()
    place = None if file.exists() else hub_place(path)
    if place is not None:
        return _lora_on_hub(place)
    if not file.exists() and file.suffix in (".safetensors", *_TORCH_SUFFIXES):
        raise UserError(f"there is no {file}; expected the file of a LoRA, or a folder with {LORA_WEIGHTS}.")
    file = resolve(path)
    if not file.is_dir():
        return file
    return file / _only_lora([found.name for found in file.iterdir() if found.is_file()], str(file))


def _lora_on_hub(place: HubPlace) -> Path:
    names = file_names(place)
    name = place.file or _only_lora([name for name in names if "/" not in name], str(place))
    beside = PurePosixPath(name).with_name(ALPHAS_BESIDE).as_posix()
    if beside in names:
        fetched_file(place, beside)
    return fetched_file(place, name)


def _only_lora(names: list[str], folder: str) -> str:
    """Which of the files at the top of a folder is its LoRA. Raises UserError unless it is one."""
    found = [name for name in _FOLDER_FILES if name in names] or [
        name for name in names if name.endswith(".safetensors")
    ]
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {len(found)} files that may be a LoRA; expected {LORA_WEIGHTS}; name the file itself."
        )
    return found[0]


def lora_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a LoRA file. Raises UserError for a damaged file or one of another kind."""
    if file.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        raise UserError(f"{file} ends in {file.suffix or 'nothing'}; expected a LoRA as .safetensors; save it so.")
    return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)


def open_lora(path: str | Path, targets: Mapping[str, Target]) -> LoraFile:
    """A LoRA file whose keys are matched with the modules of these components; tensors are read later.

    Raises UserError for a damaged file, another kind of adapter, and a pair with one half or of two ranks.
    """
    file = find_lora(path)
    alphas, layers, unmatched = alphas_in(file), dict[tuple[str, str], Layer](), []
    for key, tensor in lora_tensors(file).items():
        address = address_of(key, file)
        layer = _layer(layers, address, targets) if address else None
        if address is None or layer is None or not _has_place(layer.module, address.role):
            unmatched.append(key)
            continue
        if address.role in layer.tensors:
            raise UserError(
                f"{file}: {key} and {layer.tensors[address.role].key} are one thing; expected one; drop the other."
            )
        layer.tensors[address.role] = tensor
    fitting, misfits = list[Layer](), list[str]()
    for layer in (layer for layer in layers.values() if layer.tensors):
        _check_whole(layer, file)
        misfit = _misfit(layer, targets[layer.component])
        if misfit:
            misfits.append(misfit)
            continue
        layer.alpha = _alpha(layer, alphas)
        fitting.append(layer)
    return LoraFile(file=file, hash=_content_hash(file), layers=fitting, unmatched=unmatched, misfits=misfits)


def read_lora(
    path: str | Path, targets: Mapping[str, Target], allow_unmatched: bool = False
) -> tuple[LoraFile, dict[str, Lora]]:
    """(the file, component -> LoRA of that model) of a file in any style.

    targets  of a checkpoint's components, with shapes
    Raises UserError as `open_lora` and `check_matched` do.
    """
    shapes = {component: target.shapes or {} for component, target in targets.items()}
    opened = open_lora(path, targets)
    check_matched(opened, allow_unmatched)
    pieces: dict[str, dict[str, dict[int | None, _Piece]]] = defaultdict(lambda: defaultdict(dict))
    for layer in opened.layers:
        for row, piece in _pieces(layer, shapes[layer.component]):
            own = pieces[layer.component][row.ours]
            if layer.block in own:
                raise UserError(f"{opened.file}: {layer.name} is there under two names; expected one; drop the other.")
            own[layer.block] = piece
    return opened, {
        component: {name: _adapter(found, shapes[component][name]) for name, found in leaves.items()}
        for component, leaves in pieces.items()
    }


def with_lora(leaves: Mapping[str, Leaf], file: Path, component: Component, name: str) -> dict[str, Leaf]:
    """A component's leaves with a LoRA of them added when they are read, in fp32, rounded once.

    Raises UserError as `read_lora`.
    """
    lora = read_lora(file, {name: Target.of(component)})[1].get(name, {})

    def added(leaf: Leaf, adapter: Adapter) -> Leaf:
        def read(block: int | None) -> np.ndarray:
            if block is not None:
                more = delta(jax.tree.map(lambda array: array[block], adapter))
            else:
                more = jax.vmap(delta)(adapter) if adapter.stacked else delta(adapter)
            return (leaf.read(block).astype(np.float32) + np.asarray(more)).astype(leaf.dtype)

        return Leaf(leaf.shape, leaf.dtype, leaf.stacked, read)

    return {key: added(leaf, lora[key]) if key in lora else leaf for key, leaf in leaves.items()}


def check_matched(opened: LoraFile, allow_unmatched: bool) -> None:
    """Raises UserError for keys that match no layer and layers of other shapes, up to ten of each by name.

    Warns instead where that is allowed and something is left.
    """
    if not opened.unmatched and not opened.misfits:
        return
    told = [f"{len(opened.unmatched)} keys match no layer ({_named(opened.unmatched)})"] if opened.unmatched else []
    told += [f"{len(opened.misfits)} layers do not fit ({_named(opened.misfits)})"] if opened.misfits else []
    found = f"{opened.file}: {' and '.join(told)}"
    if not (allow_unmatched and opened.layers):
        way_round = "pass --allow-unmatched (allow_unmatched=True) to leave them out"
        remedy = way_round if opened.layers else "nothing else is in it: use another LoRA"
        raise UserError(f"{found}; expected a LoRA of this model; {remedy}.")
    warnings.warn(f"{found}; they are left out.", UnmatchedKeys, stacklevel=3)


def _named(things: list[str]) -> str:
    more = len(things) - _NAMED
    return ", ".join(things[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _layer(layers: dict[tuple[str, str], Layer], address: Address, targets: Mapping[str, Target]) -> Layer | None:
    place = (address.component, address.module)
    if place not in layers and address.component in targets:
        found = targets[address.component].find(address)
        if found:
            layers[place] = Layer(
                component=address.component, name=address.module, style=address.style, module=found[0], block=found[1]
            )
    return layers.get(place)


def _has_place(module: Module, role: Role) -> bool:
    if role in ("bias", "up_bias"):
        return bool(module.bias)
    return bool(module.weight) if role == "weight" else module.is_matrix


def _check_whole(layer: Layer, file: Path) -> None:
    """Raises UserError unless a layer is whole and its shapes fit each other."""
    has = layer.tensors
    for tensor in has.values():
        if tensor.dtype.kind in "iub" and tensor is not has.get("alpha"):
            raise UserError(f"{file}: {tensor.key} has dtype {tensor.dtype}; expected floats; use another LoRA.")
    if ("down" in has) != ("up" in has) or (has.keys() & {"alpha", "up_bias"} and "down" not in has):
        there = ", ".join(tensor.key for tensor in has.values())
        raise UserError(f"{file} has of {layer.name} only {there}; expected a pair of down and up; use another LoRA.")
    if "down" in has:
        down, up = has["down"], has["up"]
        if min(len(down.shape), len(up.shape)) < 2 or up.shape[1] != down.shape[0] or 0 in down.shape + up.shape:
            raise UserError(
                f"{file}: {down.key} has shape {down.shape} and {up.key} {up.shape}; expected (rank, inputs) and "
                "(outputs, rank); use another LoRA."
            )


def _misfit(layer: Layer, target: Target) -> str | None:
    """The first of a layer's tensors whose shape is not that of the model, and which is."""
    for role, expected in _expected_shapes(layer, target).items():
        if role in layer.tensors and layer.tensors[role].shape not in expected:
            return f"{layer.tensors[role].key} has shape {layer.tensors[role].shape}, expected {expected[0]}"
    return None


def _expected_shapes(layer: Layer, target: Target) -> dict[Role, list[tuple[int, ...]]]:
    """Part of an adapter -> the shapes that it may have in this model."""
    if target.shapes is None:
        return {}
    expected: dict[Role, list[tuple[int, ...]]] = {}
    module, rank = layer.module, layer.rank
    if module.weight:
        shape = _outside_shape(layer, module.weight[0], target.shapes)
        expected["weight"] = [shape]
        if rank:
            ones = (1,) * (len(shape) - 2)
            expected["down"] = [(rank, *shape[1:]), (rank, int(np.prod(shape[1:])))]
            expected["up"] = [(shape[0], rank), (shape[0], rank, *ones)]
    if module.bias:
        expected["bias"] = expected["up_bias"] = [_outside_shape(layer, module.bias[0], target.shapes)]
    return expected


def _outside_shape(layer: Layer, row: Row, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return row.outside_shape(_own(shapes[row.ours], layer.block), layer.module.layout)


def _own(shape: tuple[int, ...], block: int | None) -> tuple[int, ...]:
    return shape if block is None else shape[1:]


def _alpha(layer: Layer, alphas: Alphas) -> float | None:
    if "alpha" not in layer.tensors:
        return alphas.of(layer.component, layer.name, layer.rank) if layer.rank else None
    tensor = layer.tensors["alpha"]
    if int(np.prod(tensor.shape)) != 1:
        raise UserError(f"{tensor.file}: {tensor.key} has shape {tensor.shape}; expected one number; use another LoRA.")
    return float(layer.array("alpha").reshape(()))


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One block's share of an adapter."""

    down: np.ndarray | None = None
    up: np.ndarray | None = None
    alpha: float = 0.0
    full: np.ndarray | None = None


def _pieces(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[Row, _Piece]]:
    """What a layer adds to each of our leaves that its module covers."""
    layout, has = layer.module.layout, layer.tensors
    for row in layer.module.weight if has.keys() & {"down", "weight"} else ():
        own = _own(shapes[row.ours], layer.block)
        down = up = full = None
        if "down" in has:
            inputs = row.outside_shape(own, layout)[1:]
            pair = layer.array("down").reshape(layer.rank, *inputs), layer.array("up").reshape(-1, layer.rank)
            down, up = row.factors_to_ours(*pair, own, layout)
        if "weight" in has:
            full = row.to_ours(layer.array("weight"), own, layout)
        yield row, _Piece(down=down, up=up, alpha=layer.scale * layer.rank, full=full)
    for row in layer.module.bias if has.keys() & {"up_bias", "bias"} else ():
        own = _own(shapes[row.ours], layer.block)
        total = np.zeros(_outside_shape(layer, row, shapes), np.float32)
        if "up_bias" in has:
            total = total + layer.scale * layer.array("up_bias").astype(np.float32)
        if "bias" in has:
            total = total + layer.array("bias").astype(np.float32)
        yield row, _Piece(full=row.to_ours(total.astype(np.float32), own, layout))


def _adapter(pieces: Mapping[int | None, _Piece], shape: tuple[int, ...]) -> Adapter:
    """The adapter of one leaf from its blocks; a block without a piece adds nothing."""
    stacked = None not in pieces
    count = shape[0] if stacked else 1
    blocks = [pieces.get(block if stacked else None, _Piece()) for block in range(count)]
    parts: dict[str, Any] = {}
    ranks = [0 if piece.up is None else piece.up.shape[0] for piece in blocks]
    if any(ranks):
        rank = max(ranks)
        parts["down"] = _padded([piece.down for piece in blocks], rank, axis=-1)
        parts["up"] = _padded([piece.up for piece in blocks], rank, axis=0)
        parts["alpha"] = np.array([piece.alpha for piece in blocks], np.float32)
        # A rank of 1 where there is no pair: 0 / 0 would be no number.
        parts["rank"] = np.maximum(np.array(ranks, np.float32), 1)
    if any(piece.full is not None for piece in blocks):
        parts["full"] = _padded([piece.full for piece in blocks], shape[-1], axis=-1)
    return Adapter(stacked=stacked, **(parts if stacked else {name: array[0] for name, array in parts.items()}))


def _padded(arrays: list[np.ndarray | None], size: int, axis: int) -> np.ndarray:
    """The arrays in a stack, each filled up with zeros to `size` along an axis; zeros for None."""
    given = [array for array in arrays if array is not None]
    dtypes = {array.dtype for array in given}
    shape = list(given[0].shape)
    shape[axis] = size
    stack = np.zeros((len(arrays), *shape), dtypes.pop() if len(dtypes) == 1 else np.float32)
    for block, array in zip(stack, arrays, strict=True):
        if array is not None:
            np.moveaxis(block, axis, 0)[: array.shape[axis]] = np.moveaxis(array, axis, 0)
    return stack


def _content_hash(file: Path) -> str:
    """Twelve hex digits of the SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
