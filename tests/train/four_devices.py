"""Run by test_mesh.py on four devices: trains a small Wan on data=2 × fsdp=2, whole and resumed, and on one device."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.models.network import NetworkCall
from dit_jax.models.wan import Wan, WanConfig
from train.loop import RunConfig, train
from train.losses import FlowSettings, flow_matching
from train.step import build_step, init_state, muon, training_mesh

CONFIG = WanConfig(blocks=4, width=96, heads=4, head_width=24, mlp_width=128, text_width=32)


def batch_at(position):
    rng = np.random.default_rng(position)
    latents = rng.standard_normal((4, 3, 4, 6, 16), np.float32)
    return {"latents": latents, "text": rng.standard_normal((4, 5, 32), np.float32)}


def run(out, steps, data, fsdp):
    model = jax.jit(lambda: Wan(CONFIG, nnx.Rngs(0)))()
    mesh, optimizer = training_mesh(data, fsdp), muon(1e-3, 1e-3)
    loss = partial(flow_matching, settings=FlowSettings(call=NetworkCall(remat=True)))
    config = RunConfig(out=out, steps=steps, save_every=2, log_every=1, data=data, fsdp=fsdp)
    step = build_step(model, loss, optimizer, mesh)
    return train(config, init_state(model, optimizer, mesh), step, batch_at).state


def difference(left, right):
    """Largest change of a weight, relative to how far the three steps moved it."""
    start = dict(init_state(jax.jit(lambda: Wan(CONFIG, nnx.Rngs(0)))(), muon(0.0, 0.0), training_mesh()).params)
    gaps = {
        name: float(jnp.linalg.norm(np.asarray(left[name]) - np.asarray(right[name])))
        / max(1e-12, float(jnp.linalg.norm(np.asarray(right[name]) - np.asarray(start[name]))))
        for name in right
    }
    return max(gaps.values())


folder = sys.argv[1]
one = run(f"{folder}/one", 3, 1, 1)
mesh = run(f"{folder}/mesh", 3, 2, 2)
run(f"{folder}/resumed", 2, 2, 2)
resumed = run(f"{folder}/resumed", 3, 2, 2)
kernel = mesh.params["blocks.mlp.up.kernel"]
momentum = [leaf for leaf in jax.tree.leaves(resumed.opt_state) if leaf.shape == kernel.shape]
print(
    json.dumps(
        {
            "from_one_device": difference(mesh.params, one.params),
            "ema_from_one_device": difference(mesh.ema, one.ema),
            "resumed_is_equal": all(
                np.array_equal(left, right)
                for left, right in zip(jax.tree.leaves(mesh), jax.tree.leaves(resumed), strict=True)
            ),
            "held": [leaf.addressable_shards[0].data.size / leaf.size for leaf in (kernel, *momentum)],
        }
    )
)
