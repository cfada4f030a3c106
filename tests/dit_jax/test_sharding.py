"""Meshes, parameter shardings, and the same numbers on eight devices (`eight_devices.py`) as on one."""

import fnmatch
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from dit_jax.config import UserError
from dit_jax.models import wan
from dit_jax.models.wan import Wan
from dit_jax.parameters import named_leaves
from dit_jax.sharding import logical_axes, make_mesh, parse_mesh, partition, shardings

MESHES = ("data=2,context=4", "fsdp=4,tensor=2", "tensor=4,context=2", "context=8", "fsdp=8", "data=2,fsdp=2,tensor=2")


def abstract(config, model=Wan):
    return nnx.eval_shape(lambda: model(config, nnx.Rngs(0)))


def abstract_mesh(text):
    axes = parse_mesh(text)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


MODELS = {name: (lambda config=config: abstract(config), wan.AXES) for name, config in wan.PRESETS.items()}
MODELS["wan-with-positions"] = (lambda: abstract(replace(wan.PRESETS["wan2.1-i2v-14b"], image_positions=514)), wan.AXES)


@pytest.mark.parametrize("name", MODELS)
def test_every_leaf_has_one_row(name):
    build, table = MODELS[name]
    for leaf_name, leaf in named_leaves(build()):
        assert len(logical_axes(leaf_name, table)) == leaf.ndim, leaf_name


@pytest.mark.parametrize("table", [wan.AXES], ids=["wan"])
def test_no_row_is_dead(table):
    names = {name for build, its in MODELS.values() if its is table for name, _ in named_leaves(build())}
    assert not [row for row in table if not fnmatch.filter(names, row)]


def test_large_leaves_are_split():
    """On a mesh of both parameter axes a chip of eight holds hardly more than an eighth of the 14B."""
    model = abstract(wan.WAN_14B)
    placed = jax.tree.leaves(shardings(model, wan.AXES, abstract_mesh("fsdp=4,tensor=2")))
    held = sum(
        np.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in zip(jax.tree.leaves(model), placed, strict=True)
    )
    assert held <= 0.127 * sum(leaf.size for leaf in jax.tree.leaves(model))


def test_rules():
    mesh = abstract_mesh("fsdp=4,tensor=2")
    assert partition("a", (3, 8, 6, 5), ("blocks", "embed", "heads", None), mesh) == PartitionSpec(
        None, "fsdp", "tensor", None
    )
    assert partition("a", (6, 5), ("embed", "mlp"), mesh) == PartitionSpec(None, None), (
        "axes that do not divide are left whole"
    )
    assert partition("a", (8, 8), ("heads", "mlp"), mesh) == PartitionSpec("tensor", None), (
        "a mesh axis splits one dimension only"
    )
    assert partition("a", (8, 8), ("embed", "mlp"), abstract_mesh("context=8")) == PartitionSpec(None, None)


def test_heads_that_tensor_cuts_are_refused():
    with pytest.raises(UserError, match=r"12 heads \(blocks\.attn1.*tensor=8.*divides 12"):
        shardings(abstract(wan.WAN_1_3B), wan.AXES, abstract_mesh("tensor=8"))


def test_bad_tables_are_refused():
    with pytest.raises(LookupError, match=r"a\.b matches 2 rows"):
        logical_axes("a.b", {"a.*": (None,), "*.b": (None,)})
    with pytest.raises(LookupError, match=r"a\.b matches 0 rows"):
        logical_axes("a.b", {"c": (None,)})
    with pytest.raises(LookupError, match=r"shape \(3, 4\).*1 axes"):
        partition("a", (3, 4), (None,), abstract_mesh("context=8"))


def test_parse_mesh():
    assert parse_mesh("data=2, context=4") == {"data": 2, "context": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows=2", "'rows', expected some of data"),
        ("", "names the axis ''"),
        ("data", "data the size ''"),
        ("data=two", "data the size 'two'"),
        ("data=0", "data the size '0'"),
        ("data=-2", "data the size '-2'"),
        ("data=2,data=2", "'data' twice"),
    ],
)
def test_a_bad_mesh_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_mesh(text)


def test_a_mesh_of_another_size_is_refused():
    count = len(jax.devices())
    with pytest.raises(UserError, match=rf"data=3,context=5 needs 15 devices, found {count}.*product is {count}"):
        make_mesh({"data": 3, "context": 5})


@pytest.fixture(scope="module")
def eight_devices():
    """What this file prints when run on eight fake devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("eight_devices.py"), *MESHES],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_same_result_on_every_mesh(eight_devices):
    errors = eight_devices["errors"]
    assert len(errors) == len(MESHES) * 4
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


def test_a_second_segment_compiles_nothing(eight_devices):
    assert eight_devices["compilations"] == dict.fromkeys(MESHES, 0)
