"""What `test_lora.py` runs in a process of its own: a LoRA merged on one device and on meshes of eight fake ones."""

import json
import sys

import jax
import numpy as np
from test_lora import BIAS, OUT, QUERY, leaves, lora, model

from dit_jax.lora import merged
from dit_jax.models.wan import AXES
from dit_jax.parameters import named_leaves
from dit_jax.sharding import make_mesh, parse_mesh, shardings

TOUCHED = (QUERY, OUT, BIAS)


def check(text, expected):
    mesh = make_mesh(parse_mesh(text))
    with jax.set_mesh(mesh):
        placed = jax.device_put(model(), shardings(model(), AXES, mesh))
        found = merged(placed, [(lora(), 0.7)])
    before, after = dict(named_leaves(placed)), dict(named_leaves(found))
    gaps = [np.abs(leaves(found)[name] - expected[name]).max() for name in TOUCHED]
    split = [name for name in TOUCHED if not after[name].sharding.is_fully_replicated]
    return {
        "error": float(max(gaps)),
        "shardings kept": all(after[name].sharding == before[name].sharding for name in TOUCHED),
        "sharded leaves": len(split),
    }


if __name__ == "__main__":
    expected = leaves(merged(model(), [(lora(), 0.7)]))
    print(json.dumps({text: check(text, expected) for text in sys.argv[1:]}))
