"""One step of training as one compiled program: gradients, clipping, updates and running means of weights, on any mesh.

Shapes: K microbatches of a step, B rows of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from dit_jax.config import UserError
from dit_jax.parameters import named_leaves, with_leaves
from dit_jax.sharding import replicated
from train.losses import Metrics, PartMean, Terms
from train.placement import in_dtype, own_rows, rows_sharding, state_sharding, update_sharding, weight_shardings

Params = dict[str, jax.Array]
LossFunction = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Terms]]


class TrainState(NamedTuple):
    """What a step reads and writes.

    step       steps taken []
    params     the trained modules' weights in fp32, by dotted path
    opt_state  the optimisers' state, one of each update
    ema        running mean of the weights, of all or of some modules
    sound      whether every loss and gradient so far was finite []; once one is not, nothing changes any more
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params
    sound: jax.Array


StepFunction = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]  # of (state, batch, key)


@dataclass(frozen=True, kw_only=True)
class Update:
    """One way in which a step changes weights.

    loss          (trained, frozen, batch, key) -> (mean over the batch, scalars to report, or a value a block)
    optimizer     of the weights that it trains
    trains        names of the modules that it trains, the others being frozen to it; empty: all that are trained
    turns         how often a step does it, each time on other rows
    microbatches  over which it averages each gradient, one after the other
    """

    loss: LossFunction
    optimizer: optax.GradientTransformation
    trains: tuple[str, ...] = ()
    turns: int = 1
    microbatches: int = 1

    def of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the weights (or whatever goes by their names) that it trains."""
        if not self.trains:
            return dict(params)
        return {name: leaf for name, leaf in params.items() if name.partition(".")[0] in self.trains}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step is made of, besides arrays.

    updates    what it does, in this order
    dtype      that the backbones compute in, trained and frozen
    ema_decay  of the running means, which start with a short memory: they forget the initial weights
    averaged   modules that have a running mean; empty: all
    whole      arrays of a batch that are the step's own, not a row's
    """

    updates: tuple[Update, ...]
    dtype: Any = jnp.float32
    ema_decay: float = 0.999
    averaged: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    def microbatches(self, turn: int | None = None) -> int:
        """Of a step in all, or of one that does only the update of this number."""
        done = self.updates if turn is None else (self.updates[turn],)
        return sum(update.turns * update.microbatches for update in done)

    def of_mean(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the weights that have a running mean."""
        return {name: p for name, p in params.items() if not self.averaged or name.partition(".")[0] in self.averaged}


def params_of(tree) -> Params:
    """The weights of a module, or of a dict of modules, by dotted path (`student.blocks.attn1.q.kernel`)."""
    return dict(named_leaves(tree))


def of_modules(weights: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Weights by the name of their module, and by their paths inside it."""
    found: dict[str, dict[str, Any]] = {}
    for name, array in weights.items():
        module, _, path = name.partition(".")
        found.setdefault(module, {})[path] = array
    return found


def alone(
    loss: Callable[[Any, Any, jax.Array], tuple[jax.Array, Terms]],
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.999,
) -> Plan:
    """The plan of a lone model that minimises `loss(model, batch, key)`."""
    update = Update(loss=lambda trained, frozen, batch, key: loss(trained, batch, key), optimizer=optimizer)
    return Plan(updates=(update,), ema_decay=ema_decay)


def on_mesh(leaf: Any, dtype: Any, sharding: NamedSharding) -> Any:
    """A leaf in this dtype at its place, whichever process holds which part of it; an abstract one stays abstract."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf.astype(dtype)
    whole = np.asarray(leaf).astype(dtype)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


class TrainStep:
    """The compiled `(state, batch, key) -> (state, metrics)`; the state is donated.

    `trained` is the module or dict of modules whose weights the state holds, `frozen` a dict of modules that the losses
    read (arrays, or abstract to compile ahead of time). A batch is a dict of host arrays [K·B, ...], with several
    processes the rows of this one (`own_rows`) out of `rows`; without a number no two processes hold the same. The key
    of a step is `fold_in(key, state.step)`.
    """

    def __init__(
        self, trained: Any, plan: Plan, mesh: Mesh, frozen: Mapping[str, Any] | None = None, rows: int | None = None
    ):
        self.plan, self.mesh, self.rows = plan, mesh, rows
        self.trained = jax.eval_shape(lambda tree: tree, trained)
        self.weights = weight_shardings(self.trained, mesh)
        self.frozen = self._placed(frozen or {})
        self.jitted = jax.jit(self._step, static_argnames="turn", donate_argnums=0)

    def init(self, trained: Any) -> TrainState:
        """The state before the first step, born with its shardings."""
        params = {name: on_mesh(leaf, jnp.float32, self.weights[name]) for name, leaf in params_of(trained).items()}
        return jax.jit(self._start, out_shardings=self.shardings(self.abstract_state()))(params)

    def rebuilt(self, params: Params) -> Any:
        """The trained modules with these weights."""
        return with_leaves(self.trained, params)

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of a state."""
        params = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for name, leaf in params_of(self.trained).items()}
        return jax.eval_shape(self._start, params)

    def _start(self, params: Params) -> TrainState:
        states = tuple(update.optimizer.init(update.of(params)) for update in self.plan.updates)
        # The mean is a copy: donated buffers must not alias.
        mean = jax.tree.map(jnp.copy, self.plan.of_mean(params))
        return TrainState(jnp.zeros((), jnp.int32), params, states, mean, jnp.ones((), bool))

    def trace(self, batch: Mapping[str, jax.ShapeDtypeStruct], turn: int | None = None) -> Any:
        """The step for abstract arrays of a batch [K·B, ...], to be compiled ahead of time."""

        def placed(leaf, sharding):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        state = self.abstract_state()
        arrays = {}
        for name, leaf in batch.items():
            shape, sharding = (
                (leaf.shape, replicated(self.mesh)) if name in self.plan.whole else self._rows(leaf.shape, turn)
            )
            arrays[name] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
        key = placed(jax.eval_shape(lambda: jax.random.key(0)), replicated(self.mesh))
        with jax.set_mesh(self.mesh):
            placed_state = jax.tree.map(placed, state, self.shardings(state))
            return self.jitted.trace(placed_state, self.frozen, arrays, key, turn=turn)

    def shardings(self, state: TrainState) -> Any:
        """The sharding of every leaf of a state."""
        whole = replicated(self.mesh)
        optimisers = jax.tree_util.tree_map_with_path(
            lambda path, leaf: state_sharding(path, leaf, self.weights, self.mesh), state.opt_state
        )
        mean: Any = {name: self.weights[name] for name in state.ema}
        params: Any = {name: self.weights[name] for name in state.params}
        return TrainState(whole, params, optimisers, mean, whole)  # type: ignore[arg-type]

    def __call__(
        self, state: TrainState, batch: Mapping[str, Any], key: jax.Array, turn: int | None = None
    ) -> tuple[TrainState, Metrics]:
        """One step, of one of the plan's updates if its number is given (a program each); UserError for rows that do
        not divide into microbatches or over the mesh."""
        with jax.set_mesh(self.mesh):
            return self.jitted(state, self.frozen, self.place(batch, turn), key, turn=turn)

    def own_rows(self, rows: int, turn: int | None = None) -> np.ndarray:
        """Which rows of a batch [K·B, ...] of all processes this one is to give, in their order; UserError as for a
        step."""
        (count, of_one), _ = self._rows((rows,), turn)
        return (np.arange(count)[:, None] * of_one + own_rows(self.mesh, of_one)).ravel()

    def place(self, batch: Mapping[str, Any], turn: int | None = None) -> dict[str, jax.Array]:
        """The host's rows as global arrays [K, B, ...]; what is the step's own as it is, on every device."""

        def placed(name: str, array: np.ndarray) -> jax.Array:
            if name in self.plan.whole:
                return jax.make_array_from_process_local_data(replicated(self.mesh), array, array.shape)
            rows = self.rows or len(array) * jax.process_count()
            shape, sharding = self._rows((rows, *array.shape[1:]), turn)
            own, numbers = own_rows(self.mesh, shape[1]), np.arange(shape[1])
            of_own = array.reshape(shape[0], len(own), *shape[2:])

            def part(index: Any) -> np.ndarray:
                return of_own[:, np.searchsorted(own, numbers[index[1]])]

            return jax.make_array_from_callback(shape, sharding, part)

        return {name: placed(name, np.asarray(array)) for name, array in batch.items()}

    def first(self, placed: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The first microbatch of a batch that is placed, with what is the step's own."""
        return {name: array if name in self.plan.whole else array[0] for name, array in placed.items()}

    def _rows(self, shape: tuple[int, ...], turn: int | None) -> tuple[tuple[int, ...], NamedSharding]:
        """Global shape [K, B, ...] and sharding of rows [K·B, ...]; UserError where they do not divide."""
        rows, count = shape[0], self.plan.microbatches(turn)
        if rows % count:
            raise UserError(
                f"a batch of {rows} does not divide into the {count} microbatches of a step: choose a multiple of "
                f"{count}"
            )
        return (count, rows // count, *shape[1:]), rows_sharding(self.mesh, rows // count)

    def _placed(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """Frozen modules in the dtype that they compute in, on the mesh; abstract ones stay abstract."""
        if not frozen:
            return {}
        abstract = jax.eval_shape(lambda tree: tree, dict(frozen))
        shardings = weight_shardings(abstract, self.mesh)
        wanted = params_of(jax.eval_shape(lambda tree: in_dtype(tree, self.plan.dtype), abstract))
        leaves = params_of(dict(frozen))
        placed = {name: on_mesh(leaf, wanted[name].dtype, shardings[name]) for name, leaf in leaves.items()}
        return with_leaves(abstract, placed)

    def _step(
        self, state: TrainState, frozen: Any, batch: Any, key: jax.Array, turn: int | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        params, sound = state.params, state.sound
        metrics: Metrics = {}
        states, first = [], 0
        for number, (update, opt_state) in enumerate(zip(self.plan.updates, state.opt_state, strict=True)):
            if turn not in (None, number):
                states.append(opt_state)
                continue
            of_turns = []
            for time in range(update.turns):
                rows = slice(first, first + update.microbatches)
                first = rows.stop
                own_key = jax.random.fold_in(key, place_of(number, time))
                gradients, told = self._gradients(update, params, frozen, _rows(batch, rows, self.plan.whole), own_key)
                sound = sound & jnp.isfinite(told["loss"]) & jnp.isfinite(told["gradient_norm"])
                mine = update.of(params)
                updates, after = update.optimizer.update(gradients, opt_state, mine)
                params = params | _if(sound, optax.apply_updates(mine, updates), mine)
                opt_state = _if(sound, after, opt_state)
                of_turns.append(told)
            # Of all turns: what is not a number in one of them is none in the mean, which a run stops on.
            told = jax.tree.map(lambda *values: sum(values) / len(values), *of_turns)
            prefix = f"{update.trains[0]}_" if len(self.plan.updates) > 1 else ""
            metrics |= {
                prefix + name: term.value() if isinstance(term, PartMean) else term for name, term in told.items()
            }
            states.append(opt_state)
        decay = jnp.minimum(self.plan.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        mean = {name: before + (1 - decay) * (params[name] - before) for name, before in state.ema.items()}
        after = TrainState(state.step + sound, params, tuple(states), _if(sound, mean, state.ema), sound)
        return jax.lax.with_sharding_constraint(after, self.shardings(after)), metrics

    def _gradients(self, update: Update, params: Params, frozen: Any, batch: Any, key: jax.Array):
        """Gradients of an update's weights, averaged over its microbatches, and the scalars to report."""
        mine, others = update.of(params), {name: p for name, p in params.items() if name not in update.of(params)}

        def objective(mine: Params, batch: Any, key: jax.Array):
            trained = in_dtype(self.rebuilt(others | mine), self.plan.dtype)
            if update.trains:
                still = {name: module for name, module in trained.items() if name not in update.trains}
                trained = {name: trained[name] for name in update.trains}
                return update.loss(trained, {**frozen, **still}, batch, key)
            return update.loss(trained, frozen, batch, key)

        def gradients(batch: Any, key: jax.Array):
            (value, told), of_weights = jax.value_and_grad(objective, has_aux=True)(mine, batch, key)
            placed = {
                name: jax.lax.with_sharding_constraint(leaf, update_sharding(self.weights[name], leaf.shape))
                for name, leaf in of_weights.items()
            }
            return placed, {"loss": value, **told}

        if update.microbatches == 1:
            found, told = gradients(_first(batch, self.plan.whole), key)
        else:
            found, told = self._accumulated(gradients, batch, key, update.microbatches)
        return found, told | {"gradient_norm": optax.global_norm(found)}

    def _accumulated(self, gradients, batch: Any, key: jax.Array, count: int):
        """Means of gradients and scalars over microbatches."""
        rows = {name: array for name, array in batch.items() if name not in self.plan.whole}
        whole = {name: array for name, array in batch.items() if name in self.plan.whole}

        def one(total, each):
            index, of_rows = each
            found = gradients({**of_rows, **whole}, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, found), None

        shapes = jax.eval_shape(gradients, _first(batch, self.plan.whole), key)
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(one, start, (jnp.arange(count), rows))
        return jax.tree.map(lambda leaf: leaf / count, total)


def place_of(update: int, turn: int) -> int:
    """A number of its own for every turn of every update of a step."""
    return update * 1000 + turn


def _rows(batch: Mapping[str, jax.Array], which: slice, whole: tuple[str, ...]) -> dict[str, jax.Array]:
    return {name: array if name in whole else array[which] for name, array in batch.items()}


def _first(batch: Mapping[str, jax.Array], whole: tuple[str, ...]) -> dict[str, jax.Array]:
    return {name: array if name in whole else array[0] for name, array in batch.items()}


def _if(sound: jax.Array, after: Any, before: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(sound, new, old), after, before)
