"""Two hosts that load a native checkpoint onto one mesh: each reads its own shards from the disk, and no others."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from flax import nnx

from convert import native
from convert.transfer import write_model
from convert.wan import wan_settings
from dit_jax.models.wan import WAN_1_3B, Wan

SCRIPT = Path(__file__).with_name("two_hosts.py")
CONFIG = replace(WAN_1_3B, blocks=3, width=512, heads=4, mlp_width=2048, text_width=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of which every large block is cut, as those of the true sizes are."""
    folder = tmp_path_factory.mktemp("hosts") / "native"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "SMALLEST_PART", 1 << 16)
        write_model(folder, Wan(CONFIG, nnx.Rngs(0)), wan_settings(CONFIG), "native")
    return folder


def on_two_hosts(folder, mesh):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    hosts = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), mesh, address, str(number)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    told = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told[0][1][-2000:] + told[1][1][-2000:]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in told]


@pytest.mark.parametrize("mesh", ["fsdp=2", "tensor=2"])
def test_a_host_reads_its_own_shards_alone(checkpoint, mesh):
    hosts = on_two_hosts(checkpoint, mesh)
    if sum(host["read"] for host in hosts) == 0:
        pytest.skip("files here are not on a disk: there is nothing to count")
    for host in hosts:
        assert host["mine"] < 0.6 * host["all"], "the mesh does not split the weights"
        # Whole pages at the edges of rows, and the small files of metadata.
        assert host["read"] <= 1.05 * host["mine"], host
    assert sum(host["read"] for host in hosts) >= 0.9 * hosts[0]["all"]
