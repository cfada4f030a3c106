"""What `test_mesh_reads.py` runs as each of two processes: loads its part of a native checkpoint on a mesh over both.

Arguments: checkpoint, mesh, address of the first process, number of this one. Prints a JSON object: `read` bytes of
weights that came from the disk, `mine` bytes of the parts that are this process's, `all` bytes there are.
"""

import functools
import json
import mmap
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices

from convert import native
from convert.checkpoint import load_model, open_checkpoint
from dit_jax.parameters import named_leaves
from dit_jax.sharding import leaf_sharding, make_mesh, parse_mesh


def read_bytes():
    """Bytes that this process has fetched from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def forget(folder):
    """Drops every file from the machine's cache."""
    for file in filter(Path.is_file, folder.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class PagesAlone(np.memmap):
    """A mapped file of which the kernel fetches the pages that are asked for and none ahead."""

    def __new__(cls, *arguments, **options):
        mapped = super().__new__(cls, *arguments, **options)
        mapped._mmap.madvise(mmap.MADV_RANDOM)
        return mapped


def own_bytes(array):
    parts = {tuple((part.start, part.stop) for part in shard.index): shard for shard in array.addressable_shards}
    return sum(shard.data.nbytes for shard in parts.values())


def main(folder, mesh, address, number):
    jax.distributed.initialize(address, 2, int(number))
    native.np.memmap = PagesAlone
    checkpoint = open_checkpoint(folder)
    mesh = make_mesh(parse_mesh(mesh))
    placed = functools.partial(leaf_sharding, table=checkpoint.component("").axes, mesh=mesh)
    load = functools.partial(load_model, checkpoint, mesh=mesh, shardings=placed)
    load()  # once for the libraries' own pages
    sync_global_devices("loaded")
    forget(Path(folder))
    sync_global_devices("forgotten")
    before = read_bytes()
    leaves = dict(named_leaves(load()))
    found = {
        "read": read_bytes() - before,
        "mine": sum(own_bytes(leaf) for leaf in leaves.values()),
        "all": sum(leaf.nbytes for leaf in leaves.values()),
    }
    sync_global_devices("measured")
    for name, expected in checkpoint.leaves("").items():
        for shard in leaves[name].addressable_shards:
            assert np.array_equal(np.asarray(shard.data), expected.rectangle(None)[shard.index]), name
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
