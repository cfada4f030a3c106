"""Where the arrays of training live on a mesh, and in what dtype the models compute.

What is trained is one module or a dict of modules by name; its weights are known by dotted path, the name first
(`student.blocks.attn1.q.kernel`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import UserError
from dit_jax.models import flux, wan
from dit_jax.ops.mesh import activation_axes, axis_size
from dit_jax.parameters import Precision, cast, named_leaves
from dit_jax.sharding import AxesTable, leaf_sharding, make_mesh, parse_mesh, replicated

SMALL_LEAF = 1 << 14  # values; smaller leaves are replicated, where gathering them would cost more than it saves
BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class Kind:
    """What is known of a class of modules: logical axes of its weights, and which stay in fp32 (dotted prefixes)."""

    axes: AxesTable
    exact: tuple[str, ...] = ()


KINDS: dict[type, Kind] = {wan.Wan: Kind(wan.AXES, wan.FP32_LEAVES), flux.Flux: Kind(flux.AXES)}


def training_mesh(axes: str = "") -> Mesh:
    """The mesh `data=2,fsdp=4`, or all devices on `fsdp` for an empty text; UserError as `make_mesh`."""
    return make_mesh(parse_mesh(axes) if axes else {"fsdp": len(jax.devices())})


def modules(tree: Any) -> Iterator[tuple[str, Any]]:
    """(prefix of its weights' paths, module) of one module or of a dict of them."""
    if isinstance(tree, Mapping):
        for name, module in tree.items():
            yield f"{name}.", module
    else:
        yield "", tree


def weight_shardings(tree: Any, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of every weight by dotted path: from its model's table, else over `fsdp` along its longest axis."""
    shardings = {}
    for prefix, module in modules(tree):
        for name, leaf in named_leaves(module):
            shardings[(prefix + name).rstrip(".")] = sharding_of(type(module), name, leaf.shape, mesh)
    return shardings


def sharding_of(kind: Any, name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of one weight of a module of this class."""
    known = KINDS.get(kind)
    return longest_axis(shape, mesh) if known is None else leaf_sharding(name, shape, known.axes, mesh)


def longest_axis(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """A large leaf over `fsdp` along its longest axis that divides; any other whole."""
    shards = mesh.shape.get("fsdp", 1)
    spec: list[str | None] = [None] * len(shape)
    if shards > 1 and math.prod(shape) >= SMALL_LEAF:
        for axis in np.argsort([-size for size in shape], kind="stable"):
            if shape[axis] % shards == 0:
                spec[axis] = "fsdp"
                break
    return NamedSharding(mesh, PartitionSpec(*spec))


def update_sharding(weight: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Where a weight's gradient and optimiser state live: with the weight; of a stack that every device holds whole,
    each of those that split the batch has some of the blocks, and updates these alone (Rajbhandari et al., arXiv
    1910.02054, stage 1)."""
    mesh = weight.mesh
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1)
    whole = not any(weight.spec)
    if whole and axes and len(shape) > 2 and shape[0] % axis_size(mesh, axes) == 0:
        return NamedSharding(mesh, PartitionSpec(axes))
    return weight


def state_sharding(path: tuple[Any, ...], leaf: Any, weights: Mapping[str, NamedSharding], mesh: Mesh) -> NamedSharding:
    """Where a leaf of an optimiser's state lives: with the updates of the weight whose name ends its path."""
    weight = weights.get(getattr(path[-1], "key", "")) if path else None
    if weight is None or len(weight.spec) != len(leaf.shape):
        return replicated(mesh)
    return update_sharding(weight, leaf.shape)


def rows_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Arrays [K, B, ...] by rows of each of K microbatches, over `data` and, where it divides them too, `fsdp` (which
    splits the tokens where it does not); UserError where `data` does not divide B."""
    data = mesh.shape.get("data", 1)
    if batch % data:
        raise UserError(f"a batch of {batch} does not divide over data={data}: choose a multiple of {data}")
    return NamedSharding(mesh, PartitionSpec(None, activation_axes(mesh, batch)[0] or None))


def own_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """Which of B rows this process's devices hold, in their order; several processes hold the same ones where the mesh
    splits what is done for a row over them."""
    held: Any = rows_sharding(mesh, batch).addressable_devices_indices_map((1, batch))
    return np.unique([row for _, rows in held.values() for row in range(*rows.indices(batch))]).astype(int)


def in_dtype(tree: Any, dtype: Any) -> Any:
    """The backbones of a module or a dict of modules in the dtype that they compute in; everything else as it is."""

    def converted(module: Any) -> Any:
        kind = KINDS.get(type(module))
        return module if kind is None else cast(module, Precision(weights=dtype, exact=kind.exact))

    if isinstance(tree, Mapping):
        return {name: converted(module) for name, module in tree.items()}
    return converted(tree)
