"""Run by test_checkpoints.py: trains a large line; after the checkpoint of step 3 no file may grow over 64 KiB, as on a
full disk."""

import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.config import UserError
from train.checkpoints import newest_step
from train.loop import RunConfig, train
from train.optimizers import adam
from train.placement import training_mesh
from train.step import TrainStep, alone


class Line(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (512, 512)))


def loss(model, batch, key):
    return jnp.mean(jnp.square(batch["x"] @ model.kernel[...])), {}


def batch_at(position):
    if position == 5:
        while newest_step(sys.argv[1]) is None:
            time.sleep(0.05)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    return {"x": np.random.default_rng(position).normal(size=(2, 512)).astype(np.float32)}


step = TrainStep(Line(), alone(loss, adam(0.01)), training_mesh())
try:
    train(RunConfig(out=sys.argv[1], steps=9, save_every=3, log_every=100), step.init(Line()), step, batch_at)
except UserError as error:
    print(error)
    sys.exit(2)
