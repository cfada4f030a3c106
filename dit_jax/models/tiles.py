"""A large picture coded in overlapping tiles whose seams are blended.

Letters: B batch, T frames, Y X pixels or latent grid, C channels.
The facts are those of `tiled_decode` and `tiled_encode` in diffusers' `AutoencoderKLWan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from dit_jax.config import UserError


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles of `size`×`size` latents that share `overlap` with the next.

    `into` and `out` say how many pixels of what goes into the coder, and of what comes out, are a latent.
    """

    size: int
    overlap: int
    into: int
    out: int

    def __post_init__(self):
        if not 0 <= self.overlap < self.size:
            raise UserError(
                f"the overlap is {self.overlap}, expected 0 to {self.size - 1} for tiles of {self.size}; lower it"
            )

    @property
    def stride(self) -> int:
        return self.size - self.overlap


def code_in_tiles(coder: Callable[[jax.Array], jax.Array], x_BTYXC, tiling: Tiling):
    """`coder` over tiles of x, blended; a picture that fits in one tile is coded whole.

    Each shape of tile (those at the lower and right edge are smaller) is compiled once and run one tile at a time.
    """
    height, width = (size // tiling.into for size in x_BTYXC.shape[2:4])
    if height <= tiling.size and width <= tiling.size:
        return coder(x_BTYXC)
    tiles = _coded(coder, x_BTYXC, tiling, height, width)
    extent, kept = tiling.overlap * tiling.out, tiling.stride * tiling.out
    for (row, column), tile in tiles.items():
        if row:
            tile = _blend(tiles[row - 1, column], tile, extent, axis=2)
        if column:
            tile = _blend(tiles[row, column - 1], tile, extent, axis=3)
        tiles[row, column] = tile
    rows = [
        jnp.concatenate([tiles[row, column][:, :, :kept, :kept] for column in range(_count(width, tiling))], axis=3)
        for row in range(_count(height, tiling))
    ]
    return jnp.concatenate(rows, axis=2)


def _count(size: int, tiling: Tiling) -> int:
    return -(-size // tiling.stride)


def _coded(coder, x_BTYXC, tiling: Tiling, height: int, width: int) -> dict[tuple[int, int], jax.Array]:
    """Row and column of a tile -> what the coder makes of it."""
    by_shape: dict[tuple[int, ...], dict[tuple[int, int], jax.Array]] = {}
    size, stride = tiling.size * tiling.into, tiling.stride * tiling.into
    places = [(row, column) for row in range(_count(height, tiling)) for column in range(_count(width, tiling))]
    for row, column in places:
        y, x = row * stride, column * stride
        tile = x_BTYXC[:, :, y : y + size, x : x + size]
        by_shape.setdefault(tile.shape, {})[row, column] = tile
    coded: dict[tuple[int, int], jax.Array] = {}
    for group in by_shape.values():
        coded.update(zip(group, lax.map(coder, jnp.stack(list(group.values()))), strict=True))
    return {place: coded[place] for place in places}


def _blend(before, tile, extent: int, axis: int):
    """`tile` with its first `extent` pixels along `axis` faded in over the last ones of `before`."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if not extent:
        return tile
    shape = [1] * tile.ndim
    shape[axis] = extent
    fade = (jnp.arange(extent) / extent).reshape(shape).astype(tile.dtype)
    end = lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    start = lax.slice_in_dim(tile, 0, extent, axis=axis)
    rest = lax.slice_in_dim(tile, extent, tile.shape[axis], axis=axis)
    return jnp.concatenate([end * (1 - fade) + start * fade, rest], axis=axis)
