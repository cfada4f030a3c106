"""A LoRA as diffusers' own file, `pytorch_lora_weights.safetensors`, which `load_lora_weights` opens: from a file in
any style, or from adapters of our leaves.

Factors are cut and joined where one side fuses what the other keeps apart: their values stay bit for bit, and alpha
travels in diffusers' metadata.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.lora import Layer, check_matched
from convert.lora_alphas import METADATA
from convert.lora_backbones import recognise
from convert.lora_keys import Module, Role, Target, module_name
from convert.safetensors_files import Outgoing, write_safetensors
from convert.tables import Part, Row
from convert.transfer import LORA_WEIGHTS, staged
from dit_jax.config import UserError
from dit_jax.lora import Adapter, Lora


@dataclass(frozen=True, kw_only=True)
class _Exported:
    """A module of diffusers with its low-rank pair; `bias` is None where the LoRA leaves the bias alone."""

    component: str
    name: str
    alpha: float
    down: Outgoing
    up: Outgoing
    bias: Outgoing | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def convert_lora(source: str | Path, destination: Path, overwrite: bool = False, allow_unmatched: bool = False) -> Path:
    """Write a LoRA file in diffusers' style into a new folder; returns the file.

    Raises UserError for whatever is wrong with the source, for what diffusers has no place for, and when the
    destination exists and `overwrite` is not set; the destination is then as it was.
    """
    _, opened = recognise(source)
    check_matched(opened, allow_unmatched)
    return _write([module for layer in opened.layers for module in _modules(layer)], destination, overwrite)


def write_lora(
    loras: Mapping[str, Lora], targets: Mapping[str, Target], destination: Path, overwrite: bool = False
) -> Path:
    """Write LoRAs of our leaves in diffusers' style into a new folder; returns the file: the inverse of `read_lora`.

    loras    component -> LoRA of that model
    targets  of these components, with shapes
    Leaves that diffusers has in one module (`proj_out` of FLUX's single blocks) share a pair there, whose rank is the
    sum of theirs; blocks whose alpha is 0 have none. Raises UserError for an adapter that is no low-rank pair of a
    matrix, and when the destination exists and `overwrite` is not set; the destination is then as it was.
    """
    exported = [module for name, lora in loras.items() for module in _modules_of_leaves(name, lora, targets[name])]
    return _write(exported, destination, overwrite)


def _write(exported: Sequence[_Exported], destination: Path, overwrite: bool) -> Path:
    with staged(destination, overwrite) as folder:
        write_safetensors(folder / LORA_WEIGHTS, _tensors(exported), {METADATA: json.dumps(_configs(exported))})
    return destination / LORA_WEIGHTS


def _tensors(exported: Sequence[_Exported]) -> list[Outgoing]:
    with_bias = {module.component for module in exported if module.bias is not None}
    tensors = []
    for module in exported:
        tensors += [module.down, module.up]
        if module.bias is not None:
            tensors.append(module.bias)
        elif module.component in with_bias:  # PEFT adds a bias to all modules of a model or to none
            key, shape = module.up.key.removesuffix(".weight") + ".bias", module.up.shape[:1]
            tensors.append(_held(key, np.zeros(shape, module.up.dtype)))
    return tensors


def _configs(exported: Sequence[_Exported]) -> dict[str, Any]:
    """The metadata that diffusers reads: PEFT's LoraConfig of every component, as `component.setting`."""
    configs: dict[str, Any] = {}
    for component in dict.fromkeys(module.component for module in exported):
        modules = {_peft_name(module): module for module in exported if module.component == component}
        rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
        alpha = Counter(module.alpha for module in modules.values()).most_common(1)[0][0]
        settings = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: module.rank for name, module in modules.items() if module.rank != rank},
            "alpha_pattern": {name: module.alpha for name, module in modules.items() if module.alpha != alpha},
            "target_modules": [name.removeprefix("^") for name in modules],
            "lora_bias": any(module.bias is not None for module in modules.values()),
        }
        configs |= {f"{component}.{name}": value for name, value in settings.items()}
    return configs


def _peft_name(module: _Exported) -> str:
    """A pattern of PEFT's for this module alone: `proj_out` would also match every block's."""
    if module.component.startswith("text_encoder"):
        # transformers 5 has dropped this prefix from the module's name, though not diffusers from the tensor's.
        return module.name.removeprefix("text_model.")
    return f"^{module.name}"


def _modules(layer: Layer) -> Iterator[_Exported]:
    """The modules of diffusers that a layer covers."""
    pair = _pair(layer)
    if pair is None:
        return
    down, up = pair
    biases = _by_diffusers_module(layer, layer.module.bias)
    for name, rows in _by_diffusers_module(layer, layer.module.weight).items():
        key = f"{layer.component}.{name}.lora_"
        bias = None
        if layer.tensors.keys() & {"bias", "up_bias"}:
            bias = _cut(f"{key}B.bias", _bias(layer), biases[name], layer, axis=0)
        yield _Exported(
            component=layer.component,
            name=name,
            alpha=layer.scale * layer.rank if layer.rank else float(down.shape[0]),
            down=_cut(f"{key}A.weight", down, rows, layer, axis=1),
            up=_cut(f"{key}B.weight", up, rows, layer, axis=0),
            bias=bias,
        )


def _modules_of_leaves(component: str, lora: Lora, target: Target) -> Iterator[_Exported]:
    """The modules of diffusers that the leaves of a LoRA make up."""
    shapes = target.shapes or {}
    modules = [module for module in target.modules.values() if module.layout == "diffusers" and module.is_matrix]
    for leaf, adapter in lora.items():
        if leaf not in target.matrices or adapter.up is None or adapter.full is not None:
            raise UserError(
                f"diffusers' LoRAs have no place for what is added to {leaf}; expected low-rank pairs of matrices of "
                "this model; merge it instead."
            )
    for module in modules:
        rows = [row for row in module.weight if row.ours in lora]
        for block in _blocks(module, shapes) if rows else ():
            own = shapes[rows[0].ours][0 if block is None else 1 :]
            shares = [_share(row, lora[row.ours], block) for row in rows]
            shares = [share for share in shares if share.scale]
            if shares:
                name = module.name.replace("{i}", str(block))
                yield _joined(component, name, shares, rows[0].outside_shape(own, "diffusers"))


def _blocks(module: Module, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[int | None]:
    return range(shapes[module.weight[0].ours][0]) if "{i}" in module.name else [None]


class _Share(NamedTuple):
    """What a leaf has of the pair of diffusers' module: down [R, *inputs], up [outputs, R], and alpha / R."""

    part: Part | None
    down: np.ndarray
    up: np.ndarray
    scale: float


def _share(row: Row, adapter: Adapter, block: int | None) -> _Share:
    assert adapter.down is not None and adapter.up is not None
    assert adapter.alpha is not None and adapter.rank is not None
    index = () if block is None else block
    rank = int(adapter.rank[index])
    down, up = np.asarray(adapter.down[index]), np.asarray(adapter.up[index])
    pair = row.factors_to_outside(down[..., :rank], up[:rank])
    return _Share(row.parts.get("diffusers"), *pair, float(adapter.alpha[index]) / rank)


def _joined(component: str, name: str, shares: Sequence[_Share], shape: tuple[int, ...]) -> _Exported:
    """The module's pair: each leaf has ranks of its own, in which the others' inputs or outputs are zero."""
    rank, scale = sum(len(share.down) for share in shares), shares[0].scale
    down = np.zeros((rank, *shape[1:]), np.result_type(*(share.down for share in shares)))
    up = np.zeros((shape[0], rank), np.result_type(*(share.up for share in shares)))
    start = 0
    for share in shares:
        ranks, part = slice(start, start + len(share.down)), share.part
        place = slice(part.start, part.stop) if part else slice(None)
        inputs, outputs = (place, slice(None)) if part and part.axis else (slice(None), place)
        down[ranks, inputs] = share.down
        up[outputs, ranks] = share.up if share.scale == scale else share.up * np.float32(share.scale / scale)
        start = ranks.stop
    key = f"{component}.{name}.lora_"
    return _Exported(
        component=component,
        name=name,
        alpha=scale * rank,
        down=_held(f"{key}A.weight", down),
        up=_held(f"{key}B.weight", up.reshape(*up.shape, *[1] * (down.ndim - 2))),  # a convolution's of one pixel
        bias=None,
    )


def _by_diffusers_module(layer: Layer, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Diffusers' name of a module -> its rows, in the order in which it joins them."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[module_name(row.key("diffusers", layer.block))].append(row)
    return {name: sorted(parts, key=_place) for name, parts in found.items()}


def _place(row: Row) -> int:
    return row.parts["diffusers"].start if "diffusers" in row.parts else 0


def _pair(layer: Layer) -> tuple[Outgoing, Outgoing] | None:
    """A layer's down and up; None for one that changes nothing."""
    has = layer.tensors
    if "weight" not in has and layer.rank:
        return _as_stored(layer, "down"), _as_stored(layer, "up")
    zero = not any(layer.array(role).any() for role in has)
    if zero:
        return None
    if "weight" in has and not layer.rank and layer.module.is_matrix and len(has["weight"].shape) == 2:
        # A full matrix is a pair with the identity: exact, and diffusers has nothing else for it.
        whole, identity = _as_stored(layer, "weight"), np.eye(min(has["weight"].shape), dtype=has["weight"].dtype)
        one = _held("", identity)
        return (whole, one) if whole.shape[0] == len(identity) else (one, whole)
    keys = ", ".join(tensor.key for tensor in has.values())
    raise UserError(
        f"{layer.file}: diffusers' LoRAs have no place for {keys}; expected low-rank pairs with "
        "or without a bias; use the file as it is."
    )


def _bias(layer: Layer) -> Outgoing:
    if "bias" not in layer.tensors:
        return _as_stored(layer, "up_bias")
    if layer.scale == 1 and "up_bias" not in layer.tensors:
        return _as_stored(layer, "bias")
    # Diffusers multiplies a bias by alpha / rank, like the pair.
    total = layer.array("bias").astype(np.float32) / np.float32(layer.scale)
    if "up_bias" in layer.tensors:
        total = total + layer.array("up_bias").astype(np.float32)
    return _held("", total)


def _as_stored(layer: Layer, role: Role) -> Outgoing:
    tensor = layer.tensors[role]
    return _outgoing(tensor.key, tensor.dtype, tensor.shape, lambda: layer.array(role))


def _cut(key: str, whole: Outgoing, rows: Sequence[Row], layer: Layer, axis: int) -> Outgoing:
    """The parts of a factor that belong to these rows, joined in their order."""
    layout = layer.module.layout
    parts = [row.parts[layout] for row in rows if layout in row.parts and row.parts[layout].axis == axis]
    if layout == "diffusers" or not parts:
        return _outgoing(key, whole.dtype, whole.shape, whole.read)
    size = whole.shape[axis]
    # The table is that of the published sizes: a part is a fraction of whatever size is here.
    if any(size * edge % part.total for part in parts for edge in (part.start, part.stop)):
        raise UserError(
            f"{layer.file}: {whole.key} has shape {whole.shape}; expected axis {axis} to divide "
            f"into the parts that {layer.module.name} joins; use another LoRA."
        )
    spans = [slice(size * part.start // part.total, size * part.stop // part.total) for part in parts]
    length = sum(span.stop - span.start for span in spans)

    def read() -> np.ndarray:
        array = whole.read()
        return np.concatenate([array[(slice(None),) * axis + (span,)] for span in spans], axis)

    return _outgoing(key, whole.dtype, (*whole.shape[:axis], length, *whole.shape[axis + 1 :]), read)


def _outgoing(key: str, dtype: np.dtype, shape: Sequence[int], read: Callable[[], np.ndarray]) -> Outgoing:
    return Outgoing(key, dtype, tuple(shape), read)


def _held(key: str, array: np.ndarray) -> Outgoing:
    return _outgoing(key, array.dtype, array.shape, lambda: array)
