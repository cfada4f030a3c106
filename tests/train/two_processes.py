"""Run by test_hosts.py as each of two processes with a device: trains a small Wan until it ends or is stopped, then
waits for the first one, which is two seconds late. After the folder and the number of steps there may be one more
number: once the checkpoint of that step is there, and before the next step, the second process gets SIGTERM."""

import json
import os
import signal
import sys
import time

import jax
import numpy as np

from train.hosts import join, wait_for_all

join()
print("joined", flush=True)

import optax  # noqa: E402
from eight_devices import batch_at, loss_of, new_model  # noqa: E402

from train.checkpoints import newest_step  # noqa: E402
from train.loop import RunConfig, train  # noqa: E402
from train.placement import training_mesh  # noqa: E402
from train.step import TrainStep, alone  # noqa: E402

out, steps = sys.argv[1], int(sys.argv[2])
stopped_behind = int(sys.argv[3]) if len(sys.argv) > 3 else None


def own_rows(position):
    """The rows of this process."""
    share = 8 // jax.process_count()
    first = share * jax.process_index()
    print("step", position, flush=True)
    if position == stopped_behind and jax.process_index() == 1:
        stop_behind(position)
    return {name: rows[first : first + share] for name, rows in batch_at(position).items()}


def stop_behind(step):
    """SIGTERM once this step's checkpoint is there, and the time that the processes need to agree."""
    while newest_step(out) != step:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


model = new_model()
step = TrainStep(model, alone(loss_of(), optax.sgd(0.1, momentum=0.9)), training_mesh(f"fsdp={jax.device_count()}"))
outcome = train(RunConfig(out=out, steps=steps, save_every=2, log_every=1), step.init(model), step, own_rows)
sums = {name: float(np.abs(leaf).sum()) for name, leaf in outcome.state.params.items() if leaf.is_fully_replicated}
kernel = outcome.state.params["blocks.mlp.up.kernel"]
shard = np.asarray(kernel.addressable_shards[0].data)
told = {"steps": outcome.steps, "stopped": outcome.stopped, "replicated": sums, "shard": shard[0, 0, :5].tolist()}
if jax.process_index() == 0:
    time.sleep(2)
came = time.monotonic()
wait_for_all("the end")
print(json.dumps({**told, "came": came, "left": time.monotonic()}))
