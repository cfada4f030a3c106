"""Run by test_hosts.py as each of two processes: the first writes native weights, twice, while the other waits for it,
as at the end of a run with `export`."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from train.hosts import join, wait_for_all

join()

from convert.leaves import Leaf  # noqa: E402
from convert.native import read_native, write_native  # noqa: E402

KERNEL = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
read = []
if jax.process_index() == 0:
    for name in ("first", "second"):
        folder = Path(sys.argv[1]) / name
        write_native(folder, {"blocks.kernel": Leaf(KERNEL.shape, KERNEL.dtype, True, lambda block: KERNEL[block])}, {})
        read.append(read_native(folder)["blocks.kernel"].rectangle(None).tolist())
wait_for_all("written")
print(json.dumps(read))
