"""TPU chips and slices: names, memory, speed, and their description by libtpu on a host that has none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from dit_jax.config import UserError

GIB = 1 << 30

# Cloud names of slices. v5p counts TensorCores, two a chip; the others count chips.
SLICES = {
    "v5e-4": "v5e:2x2", "v5e-8": "v5e:2x4", "v5e-16": "v5e:4x4", "v5e-32": "v5e:4x8",
    "v5p-8": "v5p:2x2x1", "v5p-16": "v5p:2x2x2", "v5p-32": "v5p:2x2x4",
    "v6e-4": "v6e:2x2", "v6e-8": "v6e:2x4", "v6e-16": "v6e:4x4",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What a chip can do at most.

    capacity  bytes of HBM that the compiler lets a program use (it keeps a little for itself)
    flops     bf16 FLOP/s
    hbm       bytes/s between HBM and the chip
    ici       bytes/s out of the chip to its neighbours, over all links
    """

    capacity: int
    flops: float
    hbm: float
    ici: float


# Speeds from cloud.google.com/tpu/docs (v5e, v5p, v6e); capacities from the compiler's own refusals.
CHIPS = {
    "v5e": Chip(capacity=int(15.75 * GIB), flops=197e12, hbm=819e9, ici=200e9),
    "v5p": Chip(capacity=int(95.73 * GIB), flops=459e12, hbm=2765e9, ici=600e9),
    "v6e": Chip(capacity=int(31.24 * GIB), flops=918e12, hbm=1640e9, ici=448e9),
}

# Most bf16 FLOP/s by what jax calls a device (`device_kind`); of GPUs without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def chip_name(topology: str) -> str:
    """`v5e` of `v5e-8` or `v5e:2x4`; UserError for one that is not known."""
    name = SLICES.get(topology, topology).partition(":")[0]
    if name not in CHIPS:
        raise UserError(
            f"unknown topology {topology!r}: expected one of {', '.join(SLICES)} or a shape such as v5p:2x2x4"
        )
    return name


def tpu_devices(topology: str, slices: int = 1) -> list[Any]:
    """Chips of so many slices (`v5e-8`) or topologies (`v5e:2x4`), described by libtpu; UserError if it cannot."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    chip_name(topology)
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        described = topologies.get_topology_desc(SLICES.get(topology, topology), platform="tpu", **options)
        return list(described.devices)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"libtpu cannot describe {topology!r} ({reason}): install libtpu, or name a shape that exists"
        ) from error
