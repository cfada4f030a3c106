"""Spatial coherence of tokens: how like its neighbours each is, which may be skipped for it, and what takes the place
of a skipped one (CoReDiT, arXiv 2605.14191).

Everything is per latent frame of a lattice in raster order, and per row: what a row's tokens are decides alone.

Shapes: B batch rows, N tokens, M kept tokens, T Y X token lattice, L tokens of a frame, D width, C coherence cells of a
frame, W reconstruction cells, J tokens of a reconstruction cell.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.ops.linear import precision_in

CELLS, CELLS_SIDE = (16, 9), 64  # the paper's cell sizes, and the side of the lattice that they are for
HIGHEST = jax.lax.Precision.HIGHEST


class Kept(NamedTuple):
    """Tokens that stay.

    rows   their indexes in raster order [B, M], filled up with 0
    valid  which of `rows` are real [B, M] (None: all)
    mask   which tokens they are [B, N]
    """

    rows: jax.Array
    valid: jax.Array | None
    mask: jax.Array


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """Tokens of a picture or video and the cells that it is cut into.

    grid          (T, Y, X) in tokens
    cells         sides of the cells of coherence, in even and in odd blocks
    stride        one token a stride is never skipped: where (row + column - block) is a multiple of it
    sub_cell      side of the cells that skipped tokens are reconstructed in
    least_weight  of a kept token in a reconstruction: lower coherence counts as this
    """

    grid: tuple[int, int, int]
    cells: tuple[int, int]
    stride: int = 3
    sub_cell: int = 3
    least_weight: float = 1e-3

    @property
    def tokens(self) -> int:
        """Tokens of all frames."""
        return math.prod(self.grid)

    @property
    def most_skipped(self) -> int:
        """Tokens that are protected in no block: the most that can be skipped."""
        return int((~protected(self)).sum(axis=1).min())

    def coherence(self, x_BND: jax.Array, block: jax.Array) -> jax.Array:
        """Coherence of every token [B, N] in fp32, in the cells of this block."""
        even, odd = (functools.partial(coherence, grid=self.grid, cell=cell) for cell in self.cells)
        return jax.lax.cond(block % 2 == 0, even, odd, x_BND)

    def skipping_order(self, coherence_BN: jax.Array, block: jax.Array) -> jax.Array:
        """Tokens by falling coherence, protected ones last [B, N]; ties in raster order."""
        protects = jnp.asarray(protected(self))[block % self.stride]
        return jnp.argsort(jnp.where(protects, jnp.inf, -coherence_BN), axis=1, stable=True)

    def reconstructed(
        self, y_BMD: jax.Array, slots_BN: jax.Array, kept_BN: jax.Array, coherence_BN: jax.Array
    ) -> jax.Array:
        """Outputs of all tokens [B, N, D]: their own for kept ones, for skipped ones the mean of the kept of their
        sub-cell, weighted by coherence.

        slots  the row of `y` that is a kept token's
        """
        members, where = sub_cells(self)
        weights = jnp.where(kept_BN, jnp.maximum(coherence_BN, self.least_weight), 0)
        weights_BWJ = jnp.pad(weights, ((0, 0), (0, 1)))[:, members]
        weights_BWJ = (weights_BWJ / weights_BWJ.sum(axis=-1, keepdims=True)).astype(y_BMD.dtype)
        slots_BWJ = jnp.pad(slots_BN, ((0, 0), (0, 1)))[:, members]
        precision = precision_in(y_BMD.dtype)
        means = jnp.einsum("bwj,bwjd->bwd", weights_BWJ, taken(y_BMD, slots_BWJ), precision=precision)
        # One gather for both kinds of token.
        return taken(
            jnp.concatenate([y_BMD, means], axis=1), jnp.where(kept_BN, slots_BN, y_BMD.shape[1] + where[None])
        )


def cell_sizes(grid: tuple[int, int, int], cells: tuple[int, int] = CELLS, side: int = CELLS_SIDE) -> tuple[int, int]:
    """`cells`, which are for a square lattice of `side`, on this one: at least 3 and 2, and never the same."""
    scale = math.sqrt(grid[1] * grid[2]) / side
    small = max(round(min(cells) * scale), 2)
    return max(round(max(cells) * scale), small + 1), small


def coherence(x_BND: jax.Array, grid: tuple[int, int, int], cell: int) -> jax.Array:
    """SC_i = <x_i/|x_i|, mean of x/|x| over i's cell> [B, N] in fp32.

    Cells are `cell` tokens wide and high, smaller at the border. As products with the cells' membership, of which a
    frame has few: no copy of x is made, whatever the border.
    """
    frames, rows, columns = grid
    of_token = _cells_of_frame(rows, columns, cell)
    member = np.eye(of_token.max() + 1, dtype=np.float32)[of_token]
    x_BTLD = x_BND.reshape(x_BND.shape[0], frames, rows * columns, -1)
    inverse_BTL = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_BTLD.astype(jnp.float32)), axis=-1), 1e-30))
    weights_BTLC = (inverse_BTL[..., None] * (member / member.sum(axis=0))).astype(x_BND.dtype)
    product = functools.partial(jnp.einsum, precision=HIGHEST, preferred_element_type=jnp.float32)
    means_BTCD = product("btlc,btld->btcd", weights_BTLC, x_BTLD).astype(x_BND.dtype)
    alike_BTLC = product("btld,btcd->btlc", x_BTLD, means_BTCD)
    return (inverse_BTL * jnp.sum(alike_BTLC * member, axis=-1)).reshape(x_BND.shape[0], -1)


def kept(order_BN: jax.Array, skipped: int, count: int) -> Kept:
    """All but the first `skipped` of this order, filled up to `count` rows."""
    batch, tokens = order_BN.shape
    left = tokens - skipped
    rows = jnp.sort(order_BN[:, skipped:], axis=1)
    mask = jax.vmap(lambda row: jnp.zeros(tokens, bool).at[row].set(True, unique_indices=True))(rows)
    valid = None if left == count else jnp.broadcast_to(np.arange(count) < left, (batch, count))
    return Kept(jnp.pad(rows, ((0, 0), (0, count - left))), valid, mask)


def taken(of_all_BND: jax.Array, rows: jax.Array) -> jax.Array:
    """These rows of every sample: [B, M, D] for rows [B, M]."""
    return jax.vmap(lambda of_all, index: of_all.at[index].get(mode="promise_in_bounds"))(of_all_BND, rows)


def with_zeros(y_BMD: jax.Array, slots_BN: jax.Array, kept_BN: jax.Array) -> jax.Array:
    """Outputs of all tokens [B, N, D]: their own for kept ones, at these rows of `y`, zero for skipped ones."""
    return jnp.where(kept_BN[..., None], taken(y_BMD, slots_BN), 0)


def _cells_of_frame(rows: int, columns: int, cell: int) -> np.ndarray:
    """The cell that each token of a frame is in [L], in raster order."""
    across = -(-columns // cell)
    return (np.arange(rows)[:, None] // cell * across + np.arange(columns) // cell).reshape(-1)


@functools.cache
def protected(lattice: Lattice) -> np.ndarray:
    """Tokens that are never skipped, by the block's index modulo the stride: bool [stride, N].

    Those of the stride, and the first token of a sub-cell (a ragged one at the border) that these miss.
    """
    frames, rows, columns = lattice.grid
    position = np.add.outer(np.arange(rows), np.arange(columns)).reshape(-1)
    phases = (position - np.arange(lattice.stride)[:, None]) % lattice.stride == 0
    cells = _cells_of_frame(rows, columns, lattice.sub_cell)
    for phase in phases:
        missed = np.setdiff1d(cells, cells[phase])
        phase[[np.flatnonzero(cells == cell)[0] for cell in missed]] = True
    return np.tile(phases, frames)


@functools.cache
def sub_cells(lattice: Lattice) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of every reconstruction cell [W, J], N where a ragged one has fewer, and the cell of every token [N]."""
    frames, rows, columns = lattice.grid
    cells = _cells_of_frame(rows, columns, lattice.sub_cell)
    where = (np.arange(frames)[:, None] * (cells.max() + 1) + cells).reshape(-1)
    members = np.full((where.max() + 1, lattice.sub_cell**2), lattice.tokens)
    by_cell = np.argsort(where, kind="stable")
    place = np.arange(len(where)) - np.searchsorted(where[by_cell], where[by_cell])
    members[where[by_cell], place] = by_cell
    return members.astype(np.int32), where.astype(np.int32)
