"""Groups of tokens with budgets of steps: who is in which, and which groups a step refreshes (HSA, arXiv 2605.06892).

Shapes: B samples, N tokens with padding, P channels of a patch row, S sampler steps, A groups.
"""

from __future__ import annotations

from typing import Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np

Ranking = Literal["dynamic", "uniform", "random", "first-frame"]
RANKINGS = ("dynamic", "uniform", "random", "first-frame")
SPREAD = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703)  # powers of 1/1.2207…, the root of x⁴ = x + 1


def relative_change(velocity_BNP: jax.Array, before_BNP: jax.Array) -> jax.Array:
    """‖v_i − v_{i−1}‖₁ / ‖v_i‖₁ of every token [B, N]; 0 where v_i is 0."""
    norm = jnp.sum(jnp.abs(velocity_BNP), axis=-1)
    return jnp.sum(jnp.abs(velocity_BNP - before_BNP), axis=-1) / jnp.where(norm == 0, 1, norm)


def dealt(ranked_BN: jax.Array, shards: int) -> jax.Array:
    """Tokens by rank [B, N] in the order of the cache: they go to the shards in turn, so that the first places of all
    shards hold the first ranks."""
    return einops.rearrange(ranked_BN, "b (n z) -> b (z n)", z=shards)


def ranks_of_places(places: int, shards: int) -> np.ndarray:
    """Rank of the token at each of the first places of every shard [places]."""
    return einops.rearrange(np.arange(places), "(n z) -> (z n)", z=shards)


def active_groups(divisors: tuple[int, ...], first: int, stop: int, steps: int) -> np.ndarray:
    """Which groups are refreshed, bool [S, A]: all of them outside steps [first, stop), and group a there when its
    divisor (S over its budget) divides the step's index."""
    index = np.arange(steps)[:, None]
    outside = (index < first) | (index >= stop)
    return outside | (index % np.asarray(divisors) == 0)


def group_ends(shares: tuple[float, ...], tokens: int, padded: int, held: int = 0) -> tuple[int, ...]:
    """Tokens of the first group, of the first two, …, of all with padding.

    held  tokens that are always refreshed: the first group is at least that large
    """
    ends = [round(share * tokens) for share in np.cumsum(shares)[:-1]]
    return *(max(end, held, 1) for end in ends), padded


def fixed_ranking(
    ranking: Ranking, positions_N3: np.ndarray, valid_N: np.ndarray, held_N: np.ndarray, seed: int
) -> np.ndarray:
    """Tokens from the largest to the smallest budget [N], for the rankings that do not look at the velocity.

    uniform      tokens of a group are spread evenly over the lattice (by a Kronecker sequence)
    random       by `seed`, the same for every sample
    first-frame  tokens of the first latent frame, then the others, both at random
    dynamic      raster order: what is in force until the ranking is known
    """
    if ranking == "dynamic":
        return np.arange(len(positions_N3))
    keys = np.random.default_rng(seed).random(len(positions_N3))
    if ranking == "uniform":
        keys = (positions_N3 @ np.asarray(SPREAD)) % 1
    if ranking == "first-frame":
        keys = np.where(positions_N3[:, 0] == 0, keys - 1, keys)
    keys = np.where(held_N, -2, keys)
    return np.argsort(np.where(valid_N, keys, 2), kind="stable")
