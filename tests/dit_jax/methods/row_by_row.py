"""A run in which every row of every step either runs the trunk or adds the residual of its last run, one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.network import Place, layout, unlayout
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import Euler


def row_by_row(denoiser, latents, steps: int, runs, projected: bool = False):
    """(final latents, which rows ran the trunk at each step [S, R], norms of the trunk's residuals [S, R]).

    `runs(index, row, signal)` says whether a row runs the trunk, in the order of steps.
    """
    schedule = Euler().schedule(steps, Shift(constant=3.0), 40)
    model, rows = denoiser.model, len(latents) * denoiser.branches
    residual, ran, norms = [None] * rows, np.zeros((steps, rows), bool), np.zeros((steps, rows))
    for index in range(steps):
        x, out, signal, seen = _ends(denoiser, latents, schedule.timesteps[index], projected)
        norms[index] = np.sqrt(np.square(np.asarray(out - x, np.float64)).sum((1, 2)))
        after = []
        for row in range(rows):
            ran[index, row] = runs(index, row, np.asarray(seen[row], np.float64))
            if ran[index, row]:
                residual[row] = out[row] - x[row]
            after.append(out[row] if ran[index, row] else x[row] + residual[row])
        velocity = _head(model, jnp.stack(after), signal)
        if denoiser.branches == 2:
            velocity = velocity[1::2] + denoiser.guidance_scale * (velocity[0::2] - velocity[1::2])
        ahead = schedule.sigmas[index + 1] - schedule.sigmas[index]
        latents = latents + unlayout(velocity, latents.shape, model.config.patch) * ahead
    return latents, ran, norms


@partial(jax.jit, static_argnames="projected")
def _ends(denoiser, latents, t, projected: bool):
    """Tokens before and after the whole trunk, and what it and TeaCache are told."""
    model, branches = denoiser.model, denoiser.branches
    tokens = jax.tree.map(lambda leaf: jnp.repeat(leaf, branches, 0), layout(latents, model.config.patch))
    signal = model.signal(jnp.full(len(latents) * branches, t), denoiser.conditioning)
    x, place = model.embed(tokens.rows), Place(tokens.positions, model.rope(tokens.positions), tokens.valid)
    out, _ = model.trunk(x, signal, place, denoiser.call)
    return x, out, signal, model.cache_signal(x, signal, projected=projected)


_head = jax.jit(lambda model, x, signal: model.head(x, signal))
