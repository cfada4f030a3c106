"""Where every array lives on a mesh: rules from logical axes to mesh axes, and shardings of parameters and batches.

Each model file has one table `AXES`, from a glob over parameter paths to the logical axes of the leaf, one a dimension.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.config import UserError
from dit_jax.ops.mesh import activation_axes
from dit_jax.parameters import leaf_name

# Outermost first: `tensor` talks most and gets the nearest neighbours.
MESH_AXES = ("data", "fsdp", "context", "tensor")

# The dimensions that a table may name, and the mesh axis that splits each. Any other dimension is None in the table.
RULES = {
    **{"blocks": None, "embed": "fsdp", "vocabulary": "tensor"},
    **dict.fromkeys(("heads", "encoder_heads", "mlp"), "tensor"),
}

# Attention runs on whole heads: a mesh that would cut one of a transformer's is refused. Other axes that do not divide
# are left whole, an encoder's heads among them: it runs once, and other models have other numbers of heads.
INDIVISIBLE = ("heads",)

AxesTable = Mapping[str, tuple[str | None, ...]]


def parse_mesh(text: str) -> dict[str, int]:
    """Mesh axes and their sizes from `data=2,context=4`; UserError for an axis or size that is none."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in MESH_AXES:
            known = ", ".join(MESH_AXES)
            raise UserError(f"mesh {text!r} names the axis {name!r}, expected some of {known}: write data=2,context=4")
        if name in axes:
            raise UserError(f"mesh {text!r} names the axis {name!r} twice, expected once: remove one")
        if not (size.isascii() and size.isdigit() and int(size)):
            expected = f"a whole number from 1: write {name}=2"
            raise UserError(f"mesh {text!r} gives {name} the size {size!r}, expected {expected}")
        axes[name] = int(size)
    return axes


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the devices (all that jax sees, if None); UserError where the axes do not use exactly all of them.

    Over several slices of a TPU `data` is what crosses the network between them.
    """
    count, needed = len(jax.devices() if devices is None else devices), math.prod(axes.values())
    if needed != count:
        raise UserError(
            f"mesh {_words(axes)} needs {needed} devices, found {count}: choose sizes whose product is {count}"
        )
    names = tuple(name for name in MESH_AXES if name in axes)
    sizes = tuple(axes[name] for name in names)
    automatic = (AxisType.Auto,) * len(names)
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # 16 chips of an axis may have to be four rows of 8x8.
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, names, axis_types=automatic)
    if axes.get("data", 1) % slices:
        raise UserError(
            f"mesh {_words(axes)} spans {slices} slices, found data={axes.get('data', 1)}: only data may cross the "
            f"network between slices; choose a multiple of {slices} for it"
        )
    inside = tuple(size // slices if name == "data" else size for name, size in zip(names, sizes, strict=True))
    across = tuple(slices if name == "data" else 1 for name in names)
    placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(placed, names, axis_types=automatic)


def _words(axes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in axes.items())


def logical_axes(name: str, table: AxesTable) -> tuple[str | None, ...]:
    """Logical axes of the leaf with this dotted path; LookupError unless exactly one row of the table matches it."""
    rows = [pattern for pattern in table if fnmatch.fnmatchcase(name, pattern)]
    if len(rows) != 1:
        raise LookupError(
            f"leaf {name} matches {len(rows)} rows of its AXES table {rows}, expected one: mend the table"
        )
    return table[rows[0]]


def partition(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh) -> PartitionSpec:
    """Spec of one leaf: each logical axis on its mesh axis where that exists, is free and divides the dimension.

    UserError for heads that do not divide; LookupError for a row of another rank than the leaf's.
    """
    if len(axes) != len(shape):
        raise LookupError(f"leaf {name} has shape {shape}, its row of AXES has {len(axes)} axes {axes}: mend the table")
    spec: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        mesh_axis = RULES[axis] if axis else None
        if mesh_axis not in mesh.axis_names or mesh_axis in spec:
            spec.append(None)
            continue
        shards = mesh.shape[mesh_axis]
        if size % shards and axis in INDIVISIBLE:
            remedy = f"choose a size of {mesh_axis} that divides {size}"
            raise UserError(f"{size} heads ({name}) do not divide over {mesh_axis}={shards}: {remedy}")
        spec.append(mesh_axis if size % shards == 0 else None)
    return PartitionSpec(*spec)


def leaf_sharding(name: str, shape: tuple[int, ...], table: AxesTable, mesh: Mesh) -> NamedSharding:
    """Sharding of the leaf with this dotted path and shape. Errors as `logical_axes` and `partition`."""
    return NamedSharding(mesh, partition(name, shape, logical_axes(name, table), mesh))


def shardings(model: Any, table: AxesTable, mesh: Mesh) -> Any:
    """The model's tree with a NamedSharding for every leaf; the model may be abstract. Errors as `leaf_sharding`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf_sharding(leaf_name(path), leaf.shape, table, mesh), model
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Arrays [B, ...] by rows over the axes that split a batch of this size, else whole on every device."""
    return NamedSharding(mesh, PartitionSpec(activation_axes(mesh, batch)[0] or None))


def batch_shardings(tree: Any, mesh: Mesh) -> Any:
    """`batch_sharding` of every leaf by its own first dimension: for a sampler's carry and conditioning."""
    return jax.tree.map(lambda leaf: batch_sharding(mesh, leaf.shape[0]) if leaf.ndim else replicated(mesh), tree)


def fetched(array: Any) -> np.ndarray:
    """All of an array on this host, whichever process of the run holds which part; all of them have to ask for it."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
