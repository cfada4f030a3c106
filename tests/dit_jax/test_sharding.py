"""Meshes, parameter shardings, and the same numbers on eight devices (`eight_devices.py`) as on one."""

import fnmatch
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_devices import printed
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from dit_jax.config import UserError
from dit_jax.models import clip, clip_text, flux, t5, wan
from dit_jax.parameters import named_leaves
from dit_jax.sharding import logical_axes, make_mesh, parse_mesh, partition, shardings
from infer.chips import tpu_devices

MESHES = ("data=2,context=4", "fsdp=4,tensor=2", "tensor=4,context=2", "context=8", "fsdp=8", "data=2,fsdp=2,tensor=2")


def abstract(model, config):
    return nnx.eval_shape(lambda: model(config, nnx.Rngs(0)))


def abstract_mesh(text):
    axes = parse_mesh(text)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


# Every model whose parameters are split; those of the VAE are whole on every device.
FIRST_LAST = replace(wan.PRESETS["wan2.1-i2v-14b"], image_positions=514)
MODELS = (
    [(wan, wan.Wan, config) for config in (*wan.PRESETS.values(), FIRST_LAST)]
    + [(flux, flux.Flux, config) for config in flux.PRESETS.values()]
    + [(clip_text, clip_text.CLIPText, config) for config in clip_text.PRESETS.values()]
    + [(t5, t5.T5Encoder, config) for config in t5.PRESETS.values()]
    + [(clip, clip.CLIPVision, config) for config in (clip.VIT_H, replace(clip.VIT_H, projection=1024))]
)


@pytest.mark.parametrize("module", [wan, flux, t5, clip, clip_text], ids=lambda module: module.__name__)
def test_every_leaf_has_one_row_and_every_row_a_leaf(module):
    used = set()
    for its_module, model, config in MODELS:
        for name, leaf in named_leaves(abstract(model, config)) if its_module is module else ():
            assert len(logical_axes(name, module.AXES)) == leaf.ndim, name
            used |= {row for row in module.AXES if fnmatch.fnmatchcase(name, row)}
    assert used == set(module.AXES)


@pytest.mark.parametrize(
    ("module", "model", "config"),
    [(wan, wan.Wan, wan.WAN_14B), (flux, flux.Flux, flux.FLUX_DEV), (t5, t5.T5Encoder, t5.UMT5_XXL)],
    ids=["wan2.1-t2v-14b", "flux.1-dev", "umt5-xxl"],
)
@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tensor=2", "tensor=8"])
def test_a_large_model_is_split(module, model, config, mesh):
    """Each of eight devices holds hardly more than an eighth of the parameters."""
    leaves = jax.tree.leaves(abstract(model, config))
    placed = jax.tree.leaves(shardings(abstract(model, config), module.AXES, abstract_mesh(mesh)))
    held = sum(np.prod(its.shard_shape(leaf.shape)) for leaf, its in zip(leaves, placed, strict=True))
    assert held <= 0.13 * sum(leaf.size for leaf in leaves)


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
        shardings(abstract(wan.Wan, wan.WAN_1_3B), wan.AXES, abstract_mesh("tensor=8"))


@pytest.mark.parametrize(
    ("module", "model", "config"),
    [(t5, t5.T5Encoder, t5.UMT5_XXL), (clip, clip.CLIPVision, clip.VIT_H)],
    ids=["umt5-xxl", "clip-vit-h-14"],
)
def test_heads_of_encoders_stay_whole_where_tensor_would_cut_them(module, model, config):
    """The transformer of 12 heads takes tensor=3, and its pipeline has to."""
    for tensor, split in ((3, None), (2, "tensor")):
        placed = dict(named_leaves(shardings(abstract(model, config), module.AXES, abstract_mesh(f"tensor={tensor}"))))
        assert placed["blocks.attention.q.kernel"].spec == PartitionSpec(None, None, split, None)


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


@pytest.mark.parametrize(("topology", "axes"), [("v6e:8x8", {"data": 4, "fsdp": 16}), ("v5p:4x4x4", {"fsdp": 64})])
def test_an_axis_may_be_rows_of_a_slice(topology, axes):
    """Neighbours on an axis are close on the chips' own grid: an axis is a box of it."""
    mesh = make_mesh(axes, tpu_devices(topology))
    assert dict(mesh.shape) == axes
    for chips in mesh.devices.reshape(-1, axes["fsdp"]):
        places = np.array([chip.coords for chip in chips])
        assert np.prod(places.max(0) - places.min(0) + 1) == axes["fsdp"]


def test_data_alone_crosses_the_network_between_slices():
    chips = tpu_devices("v5e:2x2", 2)
    mesh = make_mesh({"data": 4, "fsdp": 2}, chips)
    assert [{chip.slice_index for chip in half.ravel()} for half in np.split(mesh.devices, 2)] == [{0}, {1}]
    with pytest.raises(UserError, match="data=1,fsdp=8 spans 2 slices, found data=1: only data may cross"):
        make_mesh({"data": 1, "fsdp": 8}, chips)


@pytest.fixture(scope="module")
def eight_devices():
    """What this file prints when run on eight fake devices."""
    return json.loads(printed(Path(__file__).with_name("eight_devices.py"), *MESHES))


def test_same_result_on_every_mesh(eight_devices):
    errors = eight_devices["errors"]
    assert len(errors) == 2 * len(MESHES) + 2 * 3 * 3  # network and samples; three more cases on three meshes
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


def test_a_second_segment_compiles_nothing(eight_devices):
    assert eight_devices["compilations"] == dict.fromkeys(MESHES, 0)
