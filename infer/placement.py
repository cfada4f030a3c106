"""How a mesh splits pictures, for the VAE: its weights are whole on every device, so any axis may share the work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.ops.mesh import Axes, activation_axes, axis_size


def picture_sharding(mesh: Mesh, batch: int, rows: int, columns: int) -> NamedSharding:
    """Sharding of [B, T, Y, X, C]: B as everywhere, every axis left over on Y or X.

    As many devices take part as divide the latents (`rows` x `columns`); their video is split likewise, so that no
    latent is torn. Y is split rather than X, and one of them rather than both.
    """
    batch_axes, _ = activation_axes(mesh, batch)

    def preference(split: tuple[Axes, Axes]) -> tuple[int, bool, int]:
        over_y, over_x = (axis_size(mesh, axes) for axes in split)
        return over_y * over_x, 1 in (over_y, over_x), over_y

    idle = tuple(axis for axis in mesh.axis_names if axis not in batch_axes)
    over_y, over_x = max(_splits(mesh, idle, rows, columns), key=preference)
    return NamedSharding(mesh, PartitionSpec(batch_axes or None, None, over_y or None, over_x or None))


def _splits(mesh: Mesh, idle: Axes, rows: int, columns: int) -> Iterator[tuple[Axes, Axes]]:
    """Every (axes over Y, axes over X) that divides the latents."""
    for sides in itertools.product("YX-", repeat=len(idle)):
        placed = list(zip(idle, sides, strict=True))
        over_y, over_x = (tuple(axis for axis, side in placed if side == wanted) for wanted in "YX")
        if rows % axis_size(mesh, over_y) == 0 and columns % axis_size(mesh, over_x) == 0:
            yield over_y, over_x
