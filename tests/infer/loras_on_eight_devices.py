"""What `test_loras.py` runs in a process of its own: a LoRA merged and removed on eight fake devices. Writes the merged
weights; asserts that weights and shardings are those of the loaded model once it is removed."""

import sys

import numpy as np
from test_loras import differing, leaves

from dit_jax.parameters import named_leaves
from dit_jax.sharding import make_mesh, parse_mesh
from infer import load_pipeline


def shardings(pipe):
    return {name: leaf.sharding for name, leaf in named_leaves(pipe.transformer)}


def main(folder: str, lora: str, out: str) -> None:
    pipe = load_pipeline(folder, mesh=make_mesh(parse_mesh("fsdp=4,tensor=2")))
    pristine, placed = leaves(pipe), shardings(pipe)
    pipe.set_loras([(lora, 0.8)])
    assert shardings(pipe) == placed
    np.savez(out, **leaves(pipe))
    pipe.set_loras([(lora, 0.4)])
    pipe.set_loras([])
    assert shardings(pipe) == placed and not differing(leaves(pipe), pristine)


if __name__ == "__main__":
    main(*sys.argv[1:])
