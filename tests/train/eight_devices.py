"""Run by test_mesh.py on eight devices: trains a small Wan on meshes of every axis, whole, resumed there and resumed on
another mesh, and on one device."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dit_jax.models.network import NetworkCall
from dit_jax.models.wan import Wan, WanConfig
from dit_jax.sharding import make_mesh, parse_mesh
from train.loop import RunConfig, train
from train.losses import FlowSettings, flow_matching
from train.optimizers import muon
from train.step import TrainStep, alone

CONFIG = WanConfig(blocks=4, width=96, heads=4, head_width=24, mlp_width=128, text_width=32)
MESHES = ("data=2,fsdp=4", "data=2,context=2,tensor=2", "fsdp=2,context=4", "data=4,tensor=2")


def batch_at(position):
    rng = np.random.default_rng(position)
    latents = rng.standard_normal((8, 3, 4, 6, 16), np.float32)
    return {"latents": latents, "text": rng.standard_normal((8, 5, 32), np.float32)}


def new_model():
    return jax.jit(lambda: Wan(CONFIG, nnx.Rngs(0)))()


def loss_of():
    return partial(flow_matching, settings=FlowSettings(call=NetworkCall(remat="blocks")))


def run(out, steps, mesh, optimizer=None):
    model, axes, loss = new_model(), parse_mesh(mesh), loss_of()
    config = RunConfig(out=out, steps=steps, save_every=2, log_every=1)
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    step = TrainStep(model, alone(loss, optimizer or optax.sgd(0.1, momentum=0.9)), make_mesh(axes, devices))
    return train(config, step.init(model), step, batch_at).state


def difference(left, right):
    """Largest change of a weight, relative to how far the three steps moved it."""
    start = {name: np.asarray(leaf) for name, leaf in START.items()}
    gaps = {
        name: float(jnp.linalg.norm(np.asarray(left[name]) - np.asarray(right[name])))
        / max(1e-12, float(jnp.linalg.norm(np.asarray(right[name]) - start[name])))
        for name in right
    }
    return max(gaps.values())


def equal(left, right):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def held(state, name):
    """Share of a weight and of its optimiser's state that a device holds."""
    leaf = state.params[name]
    states = [each for each in jax.tree.leaves(state.opt_state) if each.shape == leaf.shape]
    return [each.addressable_shards[0].data.size / each.size for each in (leaf, *states)]


if __name__ == "__main__":
    folder, muons = sys.argv[1], muon(1e-3, 1e-3)
    jax.config.update("jax_compilation_cache_dir", f"{folder}/programs")  # a run that goes on has those of the first
    START = TrainStep(new_model(), alone(None, muons), make_mesh({"data": 8})).init(new_model()).params
    one = run(f"{folder}/one", 3, "fsdp=1")
    whole = {mesh: run(f"{folder}/{mesh}", 3, mesh) for mesh in MESHES}
    run(f"{folder}/moved", 2, MESHES[0])
    moved = run(f"{folder}/moved", 3, MESHES[1])
    one_by_muon = run(f"{folder}/one-muon", 3, "fsdp=1", muons)
    whole_by_muon = run(f"{folder}/muon", 3, MESHES[0], muons)
    run(f"{folder}/resumed", 2, MESHES[0], muons)
    resumed = run(f"{folder}/resumed", 3, MESHES[0], muons)
    print(
        json.dumps(
            {
                "from_one_device": {mesh: difference(state.params, one.params) for mesh, state in whole.items()},
                "ema_from_one_device": {mesh: difference(state.ema, one.ema) for mesh, state in whole.items()},
                "moved_from_one_device": difference(moved.params, one.params),
                "muon_from_one_device": difference(whole_by_muon.params, one_by_muon.params),
                "resumed_is_equal": equal(whole_by_muon, resumed),
                "held": {mesh: held(state, "blocks.mlp.up.kernel") for mesh, state in whole.items()},
            }
        )
    )
