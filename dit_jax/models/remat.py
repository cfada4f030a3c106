"""What of a block is kept for its gradient; the rest is computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

from dit_jax.config import UserError
from dit_jax.ops.attention import ATTENDED

Remat = Literal["none", "blocks", "attention", "matmuls", "offload"]
POLICIES: tuple[Remat, ...] = get_args(Remat)
_INPUT = "block_input"


def parse_remat(text: str) -> Remat:
    """The policy of this name; UserError for none."""
    for policy in POLICIES:
        if text == policy:
            return policy
    raise UserError(f"remat is {text!r}, expected one of {', '.join(POLICIES)}")


def rematerialised(step: Callable, remat: Remat) -> Callable:
    """A step of the block loop, `step((x, cache), block, index)`, by one of these policies:

    none       all that the gradient needs is kept
    blocks     what goes into a block alone
    attention  that, and what attention found (on a TPU with the sums that its kernel's gradient needs)
    matmuls    that, and the result of every product of activations and weights
    offload    what goes into a block, in the host's memory
    """
    if remat == "none":
        return step
    policies = jax.checkpoint_policies
    if remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )

        def named(carry, block, index):
            x, cache = carry
            return step((jax.tree.map(lambda leaf: checkpoint_name(leaf, _INPUT), x), cache), block, index)

        return jax.checkpoint(named, policy=policy)
    kept = {
        "blocks": None,
        "attention": policies.save_only_these_names(ATTENDED),
        "matmuls": policies.dots_with_no_batch_dims_saveable,
    }
    return jax.checkpoint(step, policy=kept[remat])
