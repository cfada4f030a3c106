"""Run by test_hosts.py as each of two processes with two devices, and alone with four: a step on meshes that split a
batch, the work on a row, or both, over the processes."""

import json
import sys

import jax
import numpy as np

from train.hosts import join

join()

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from train.placement import training_mesh  # noqa: E402
from train.step import Plan, TrainStep, Update  # noqa: E402


class Line(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 1)))


def noisy_squares(line, frozen, batch, key):
    noise = jax.random.normal(key, batch["x"].shape)
    return jnp.mean(jnp.square((batch["x"] + noise) @ line.kernel[...])), {}


told = {}
for words in sys.argv[1:]:
    mesh, rows = words.split(":")
    batch = {"x": np.random.default_rng(0).standard_normal((int(rows), 3), np.float32)}
    plan = Plan(updates=(Update(loss=noisy_squares, optimizer=optax.sgd(0.1), microbatches=2),))
    step = TrainStep(Line(), plan, training_mesh(mesh), rows=int(rows))
    own = step.own_rows(int(rows))
    given = {name: array[own] for name, array in batch.items()}
    for name, placed in step.place(given).items():
        whole = batch[name].reshape(2, int(rows) // 2, *batch[name].shape[1:])
        for shard in placed.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    state, metrics = step(step.init(Line()), given, jax.random.key(1))
    told[words] = [own.tolist(), float(metrics["loss"]), float(metrics["gradient_norm"])]
print(json.dumps(told))
