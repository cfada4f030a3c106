"""The residual of the whole trunk, kept from a step that ran it for those that do not: what TeaCache and MagCache
share.

Shapes: R batch rows (guidance branches included), M tokens, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.models.network import Trunk
from dit_jax.ops import mesh as meshes


class Residual(NamedTuple):
    """What the trunk last added to its tokens [R, M, D], and how often it has run since this was empty []."""

    added: jax.Array
    runs: jax.Array


def no_residual(x_RMD: jax.ShapeDtypeStruct) -> Residual:
    """Before the first step, for tokens of this shape and dtype."""
    return Residual(meshes.constrain_tokens(jnp.zeros(x_RMD.shape, x_RMD.dtype)), jnp.zeros((), jnp.int32))


def run_or_reuse(trunk: Trunk, x_RMD: jax.Array, block_state: Any, residual: Residual, reuses_R: jax.Array):
    """(tokens, the attention strategy's state, residual) after a step in which these rows reuse their residual.

    The trunk runs unless all do; none may before the trunk has run once. A row that reuses has the same result, and
    keeps its residual, whatever the others do.
    """

    def reuse():
        return x_RMD + residual.added, block_state, residual

    def run():
        after, state = trunk.run(x_RMD, block_state)
        rows = reuses_R[:, None, None]
        added = jnp.where(rows, residual.added, after - x_RMD)
        return jnp.where(rows, x_RMD + residual.added, after), state, Residual(added, residual.runs + 1)

    return jax.lax.cond(jnp.all(reuses_R), reuse, run)
