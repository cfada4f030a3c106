"""Where the program at hand runs: its platform, and which mesh axes split a batch of token rows.

Everything follows from the mesh under `jax.set_mesh`, statically, so that compiling for a TPU topology on a CPU host
takes the TPU paths. Mesh axes: `data`, `fsdp`, `tensor`, `context`; any of them may be absent.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec

Axes = tuple[str, ...]


def current_mesh():
    """The abstract mesh in force; None outside any, on one device, and inside a `shard_map` over the whole of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or math.prod(mesh.axis_sizes) == 1 or mesh.are_all_axes_manual else mesh


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the mesh in force, else of the default backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def activation_axes(mesh, batch: int) -> tuple[Axes, Axes]:
    """(axes that split the batch, axes that split the tokens).

    `fsdp` splits the batch where the batch is large enough (training), else the tokens (sampling one or two rows), so
    that no chip repeats another's work.
    """
    present = [axis for axis in ("data", "fsdp", "context") if axis in mesh.axis_names]
    batch_axes: Axes = ()
    for axis in ("data", "fsdp"):
        if axis in present and batch % (axis_size(mesh, batch_axes) * mesh.shape[axis]) == 0:
            batch_axes += (axis,)
    return batch_axes, tuple(axis for axis in present if axis not in batch_axes and axis != "data")


def axis_size(mesh, axes: Axes) -> int:
    """Number of shards along the axes together."""
    return math.prod(mesh.shape[axis] for axis in axes)


def token_multiple(mesh) -> int:
    """What the number of tokens must be a multiple of on this mesh, so that it splits evenly whatever the batch."""
    if mesh is None:
        return 1
    return axis_size(mesh, tuple(axis for axis in ("fsdp", "context") if axis in mesh.axis_names))


def constrain_rows(x_BND: jax.Array) -> jax.Array:
    """Pins [B, ...] activations to the batch axes of the mesh in force, whole along everything else."""
    mesh = current_mesh()
    if mesh is None:
        return x_BND
    return jax.lax.with_sharding_constraint(x_BND, PartitionSpec(activation_axes(mesh, x_BND.shape[0])[0] or None))


def constrain_tokens(x_BND: jax.Array) -> jax.Array:
    """Pins [B, N, ...] activations to the batch and token axes of the mesh in force; tokens that do not divide stay
    whole."""
    mesh = current_mesh()
    if mesh is None:
        return x_BND
    batch_axes, token_axes = activation_axes(mesh, x_BND.shape[0])
    if x_BND.shape[1] % axis_size(mesh, token_axes):
        token_axes = ()
    return jax.lax.with_sharding_constraint(x_BND, PartitionSpec(batch_axes or None, token_axes or None))
