"""One optimiser step as one compiled program: gradient, clipping, update and running mean of the weights, on any mesh.

The mesh has the axes `data` and `fsdp`; a batch is split over both, the weights and the optimiser's state over `fsdp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.config import UserError
from dit_jax.parameters import named_leaves, with_leaves

Params = dict[str, jax.Array]
LossFunction = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

SMALL_LEAF = 1 << 14  # values; smaller leaves are replicated, where gathering them would cost more than it saves
ADAM_BETAS = (0.9, 0.99)
MUON_STEPS = 5


class TrainState(NamedTuple):
    """What a step reads and writes: steps taken, weights by dotted path, optimiser's state, weights' running mean."""

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params


def params_of(model) -> Params:
    """The weights of a model by dotted path (`blocks.attn1.q.kernel`)."""
    return dict(named_leaves(model))


def training_mesh(data: int = 1, fsdp: int = 1) -> Mesh:
    """A mesh of data × fsdp devices; raises UserError when there are fewer."""
    devices = jax.devices()
    if data * fsdp > len(devices):
        needed = f"data={data} × fsdp={fsdp} needs {data * fsdp} devices"
        raise UserError(f"{needed}, found {len(devices)}; choose smaller axes.")
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=devices[: data * fsdp])


def leaf_sharding(mesh: Mesh, leaf) -> NamedSharding:
    """Splits a large leaf over `fsdp` along its longest axis that divides; replicates any other."""
    shards = mesh.shape["fsdp"]
    spec: list[str | None] = [None] * len(leaf.shape)
    if shards > 1 and math.prod(leaf.shape) >= SMALL_LEAF:
        for axis in np.argsort([-size for size in leaf.shape], kind="stable"):
            if leaf.shape[axis] % shards == 0:
                spec[axis] = "fsdp"
                break
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over `data` and `fsdp` together."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def spread(mesh: Mesh, leaf) -> NamedSharding:
    """Splits a stack over all devices by its leading axis where that divides, so that each updates some of the blocks.

    Without it every data-parallel device would orthogonalise every matrix itself.
    """
    devices = mesh.size
    stacked = leaf.ndim > 2 and leaf.shape[0] % devices == 0
    return batch_sharding(mesh) if devices > 1 and stacked else leaf_sharding(mesh, leaf)


def init_state(model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, born with its shardings."""

    def start(params: Params) -> TrainState:
        # The mean is a copy: donated buffers must not alias.
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.tree.map(jnp.copy, params))

    params = params_of(model)
    shardings = jax.tree.map(lambda leaf: leaf_sharding(mesh, leaf), jax.eval_shape(start, params))
    return jax.jit(start, out_shardings=shardings)(params)


def build_step(
    model, loss: LossFunction, optimizer: optax.GradientTransformation, mesh: Mesh, ema_decay: float = 0.999
):
    """The jitted `(state, batch, key) -> (state, metrics)`; the state is donated.

    `loss(model, batch, key)` returns a scalar, the mean over the batch, and a dict of scalars to report. The key of a
    step is `fold_in(key, state.step)`. The running mean starts with a short memory: it forgets the initial weights.
    The step raises UserError for a batch that the mesh does not divide.
    """
    abstract = jax.eval_shape(lambda: model)

    def step(state: TrainState, batch, key: jax.Array):
        key = jax.random.fold_in(key, state.step)

        def objective(params: Params):
            return loss(with_leaves(abstract, params), batch, key)

        (value, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
        gradients = jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, spread(mesh, leaf)), gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda mean, new: mean + (1 - decay) * (new - mean), state.ema, params)
        state = TrainState(state.step + 1, params, opt_state, ema)
        pinned = jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, leaf_sharding(mesh, leaf)), state)
        return pinned, {"loss": value, "gradient_norm": optax.global_norm(gradients), **metrics}

    jitted = jax.jit(step, donate_argnums=0)

    def run(state: TrainState, batch, key: jax.Array):
        rows, devices = jax.tree.leaves(batch)[0].shape[0], mesh.size
        if rows % devices:
            raise UserError(f"a batch of {rows} does not divide over {devices} devices: choose a multiple of {devices}")
        with jax.set_mesh(mesh):
            return jitted(state, jax.device_put(batch, batch_sharding(mesh)), key)

    return run


def schedule(peak: float, steps: int, warmup: int, decay: int) -> optax.Schedule:
    """Linear warm-up, a plateau at `peak`, then a linear decay to a fiftieth over the last `decay` of `steps` steps."""
    plateau = max(0, steps - warmup - decay)
    parts = [
        optax.linear_schedule(peak / max(1, warmup), peak, warmup),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, peak / 50, decay),
    ]
    return optax.join_schedules(parts, [warmup, warmup + plateau])


def muon(learning_rate: optax.ScalarOrSchedule, adam_learning_rate: optax.ScalarOrSchedule, clip: float = 1.0):
    """Muon (Jordan et al., 2024) for the matrices inside the blocks, Adam for all else, after clipping by global norm.

    With the update scale of Liu et al. (arXiv 2502.16982, section 2.2): both take learning rates of Adam's size.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.contrib.muon(
            learning_rate,
            ns_steps=MUON_STEPS,
            adam_b1=ADAM_BETAS[0],
            adam_b2=ADAM_BETAS[1],
            adam_learning_rate=adam_learning_rate,
            muon_weight_dimension_numbers=matrix_axes,
            consistent_rms=0.2,
        ),
    )


def adam(learning_rate: optax.ScalarOrSchedule, clip: float = 1.0):
    """Adam after clipping to a global norm."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(learning_rate, *ADAM_BETAS))


def matrix_axes(params: Params):
    """Which axes of a leaf are a matrix's inputs and outputs, for Muon; None for what is no matrix inside a block.

    Stacked kernels [G, in, out], to heads [G, D, H, K] and from heads [G, H, K, D];
    convolutions [y, x, in, out] or [t, y, x, in, out].
    """
    numbers = optax.contrib.MuonDimensionNumbers

    def axes(name: str, leaf):
        # optax also calls this with masked leaves, which have no axes.
        if not name.endswith("kernel") or getattr(leaf, "ndim", 0) < 3:
            return None
        if "conv" in name or "shortcut" in name:
            return numbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
        if leaf.ndim == 4:
            return numbers((1, 2), 3) if name.endswith("o.kernel") else numbers(1, (2, 3))
        return numbers(1, 2)

    return {name: axes(name, leaf) for name, leaf in params.items()}
