"""Opening and loading checkpoints: a toy component shows every mistake, the real ones load equal from every layout."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fake_devices import printed
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert import checkpoint, components
from convert.checkpoint import checkpoint_hash, load_model, open_checkpoint, resolve
from convert.components import Component
from convert.leaves import Leaf
from convert.summary import summarise
from convert.tables import LINEAR, Part, Row
from convert.transfer import convert
from dit_jax.config import UserError
from dit_jax.parameters import named_leaves

G, D, F = 3, 4, 6


class Block(nnx.Module):
    def __init__(self, rngs):
        self.q = nnx.Param(jax.random.normal(rngs.params(), (D, F)))
        self.k = nnx.Param(jax.random.normal(rngs.params(), (D, F)))


class Toy(nnx.Module):
    """A stack whose two kernels are one tensor in the original layout, a vector, and a scalar."""

    def __init__(self, config, rngs):
        build = nnx.split_rngs(splits=config)(nnx.vmap(Block, in_axes=0, out_axes=0))
        self.blocks = build(rngs)
        self.bias = nnx.Param(jnp.zeros(F))
        self.scale = nnx.Param(jnp.zeros(()))


ROWS = [
    Row(
        ours=f"blocks.{name}",
        pattern=LINEAR,
        diffusers=f"layers.{{i}}.{name}.weight",
        original="l.{i}.qk",
        parts={"original": Part(i * F, (i + 1) * F, 2 * F)},
    )
    for i, name in enumerate("qk")
] + [Row(ours="bias", diffusers="bias", original="b"), Row(ours="scale", diffusers="scale", original="s")]


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    def describe(settings, name):
        config = settings["num_layers"]
        canonical = lambda key: None if key == "buffer" else key.removeprefix("old.")  # noqa: E731
        return Component(
            class_name=name, config=config, model=Toy, rows=ROWS, stem="model", canonical=canonical, fp32=("bias",)
        )

    monkeypatch.setitem(components.COMPONENTS, "Toy", describe)


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    layers = {f"layers.{i}.{n}.weight": rng.standard_normal((F, D), np.float32) for i in range(G) for n in "qk"}
    return layers | {"bias": rng.standard_normal(F).astype(np.float16), "scale": np.array(0.5, ml_dtypes.bfloat16)}


def saved(folder: Path, change=lambda t: t, **settings) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Toy"], "num_layers": G} | settings))
    save_file(change(tensors()), folder / "model.safetensors")
    return folder


def test_the_toy_goes_round(tmp_path):
    source = saved(tmp_path / "toy")
    convert(open_checkpoint(source), tmp_path / "native", "native")
    convert(open_checkpoint(tmp_path / "native"), tmp_path / "back", "diffusers")
    found, expected = load_file(tmp_path / "back" / "model.safetensors"), tensors()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape
        assert found[key].tobytes() == tensor.tobytes()


def test_load_model_places_every_value(tmp_path):
    model, theirs = load_model(saved(tmp_path / "toy")), tensors()
    for i in range(G):
        for name in "qk":
            ours = np.asarray(getattr(model.blocks, name)[i])
            np.testing.assert_array_equal(ours, theirs[f"layers.{i}.{name}.weight"].T)
    np.testing.assert_array_equal(model.bias[...], theirs["bias"])
    assert {name: str(leaf.dtype) for name, leaf in named_leaves(model)} == {
        "bias": "float16", "blocks.k": "float32", "blocks.q": "float32", "scale": "bfloat16",
    }  # fmt: skip


def test_load_model_casts_all_but_what_stays_fp32(tmp_path):
    model = load_model(saved(tmp_path / "toy"), dtype=jnp.bfloat16)
    assert {str(leaf.dtype) for name, leaf in named_leaves(model) if name != "bias"} == {"bfloat16"}
    assert model.bias.dtype == jnp.float32


def test_a_loaded_leaf_does_not_share_the_file(tmp_path):
    file = tmp_path / "mapped"
    file.write_bytes(bytes(4096))
    mapped = np.memmap(file, np.float32, "r+")  # aligned as jax wants it for an array without a copy
    leaf = Leaf(mapped.shape, mapped.dtype, False, lambda block: mapped)
    on_one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = [checkpoint._placed(leaf, sharding) for sharding in (None, on_one_device)]
    mapped[:] = 7
    assert not any(np.asarray(array).any() for array in placed)


def dropped(key):
    return lambda t: {name: value for name, value in t.items() if name != key}


def put(key, value):
    return lambda t: t | {key: value}


def poisoned(key, value):
    def change(t):
        t[key] = t[key].copy()
        t[key].reshape(-1)[-1] = value
        return t

    return change


Q1 = "layers.1.q.weight"
MISTAKES = {
    "missing": (dropped(Q1), rf"lacks {Q1}; expected shape \(6, 4\), found nothing"),
    "unexpected": (
        put("extra.weight", np.ones(2)),
        r"model.safetensors: unexpected tensor extra.weight of shape \(2,\)",
    ),
    "misshapen": (put(Q1, np.ones((4, 6), np.float32)), rf"safetensors: {Q1} has shape \(4, 6\), expected \(6, 4\)"),
    "another block too many": (put("layers.3.q.weight", np.ones((6, 4))), r"unexpected tensor layers.3.q.weight"),
    "two dtypes": (put(Q1, np.ones((6, 4), np.float16)), rf"{Q1} is float16 but layers.0.q.weight is float32"),
    "nan": (poisoned(Q1, np.nan), rf"model.safetensors: {Q1} holds NaN"),
    "infinity": (poisoned("bias", np.inf), r"bias holds NaN or infinite"),
    "two spellings": (put("old.bias", np.ones(6, np.float16)), r"are one tensor, found different values"),
}


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_named_and_leave_nothing(kind, layout, tmp_path):
    change, message = MISTAKES[kind]
    source = saved(tmp_path / "toy", change)
    with pytest.raises(UserError, match=message) as caught:
        convert(open_checkpoint(source), tmp_path / "out", layout)
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    with pytest.raises(UserError, match=message):
        load_model(source)


def test_truncation_is_named_and_leaves_nothing(tmp_path):
    source = saved(tmp_path / "toy")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="is truncated"):
        convert(open_checkpoint(source), tmp_path / "out", "native")
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_ties_and_buffers_are_no_mistakes(tmp_path):
    change = lambda t: t | {"old.bias": t["bias"], "buffer": np.arange(3)}  # noqa: E731
    np.testing.assert_array_equal(load_model(saved(tmp_path / "toy", change)).bias[...], tensors()["bias"])


def test_native_leaves_that_do_not_fit_their_config(tmp_path):
    convert(open_checkpoint(saved(tmp_path / "toy")), tmp_path / "native", "native")
    (tmp_path / "native" / "config.json").write_text('{"architectures": ["Toy"], "num_layers": 2}')
    with pytest.raises(UserError, match=r"blocks\.[qk] has shape \(3, 4, 6\), expected \(2, 4, 6\)"):
        load_model(tmp_path / "native")


def index_of(folder: Path, **entries) -> Path:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"} | entries))
    return folder


def toy_pipeline(folder: Path) -> Path:
    saved(folder / "toy")
    return index_of(folder, toy=["tests", "Toy"], absent=[None, None], boundary_ratio=0.5)


def test_a_component_is_asked_for_by_name(tmp_path):
    folder = toy_pipeline(tmp_path / "pipe")
    assert open_checkpoint(folder).is_pipeline
    assert load_model(folder, "toy").bias.shape == (F,)
    with pytest.raises(UserError, match="no component 'vae' with weights; it has: toy"):
        load_model(folder, "vae")


def test_the_index_tells_the_class_that_a_config_leaves_out(tmp_path):
    folder = toy_pipeline(tmp_path / "pipe")
    (folder / "toy" / "config.json").write_text(json.dumps({"num_layers": G, "architectures": None}))
    assert load_model(folder, "toy").bias.shape == (F,)


def test_index_entries_that_name_no_class_are_no_components(tmp_path):
    folder = index_of(toy_pipeline(tmp_path / "pipe"), toy=["tests", "Toy"], empty=[], nested=[["Toy"]], number=[3])
    assert list(open_checkpoint(folder).settings) == ["toy"]


def with_config(folder: Path, text: str) -> None:
    (saved(folder) / "config.json").write_text(text)


# What to make in a folder, which of its folders to open, and what must be said.
NO_CHECKPOINT = {
    "unknown class": (lambda f: saved(f / "a", architectures=["Other"]), "a", "no converter for Other"),
    "no class": (lambda f: saved(f / "a", architectures=None), "a", "no converter for a config without"),
    "classes no list": (lambda f: saved(f / "a", architectures=5), "a", "no converter for a config without"),
    "class no text": (lambda f: saved(f / "a", _class_name=["Toy"]), "a", "no converter for a config without"),
    "setting missing": (lambda f: with_config(f / "a", '{"_class_name": "Toy"}'), "a", "'num_layers'"),
    "setting of no use": (lambda f: saved(f / "a", num_layers="three"), "a", "cannot be used"),
    "config no json": (lambda f: with_config(f / "a", "{"), "a", "config.json is not JSON"),
    "config a list": (lambda f: with_config(f / "a", "[]"), "a", "found list"),
    "no weights": (lambda f: (saved(f / "a") / "model.safetensors").unlink(), "a", "expected model.safetensors"),
    "empty folder": (lambda f: (f / "a").mkdir(), "a", "is no checkpoint"),
    "a file": (lambda f: (f / "a").write_text(""), "a", "is neither the folder of a checkpoint nor a file of weights"),
    "no folder": (lambda f: None, "a", "there is no "),
    "component folder missing": (lambda f: index_of(f, toy=["tests", "Toy"]), ".", "lacks the folder toy"),
    "component outside": (lambda f: index_of(f, **{"../toy": ["tests", "Toy"]}), ".", "lacks the folder"),
    "component config missing": (lambda f: (toy_pipeline(f) / "toy/config.json").unlink(), ".", r"lacks config\.json"),
}


def opened_leaves(path: Path) -> None:
    opened = open_checkpoint(path)
    for name in opened.settings:
        opened.leaves(name)


@pytest.mark.parametrize("kind", NO_CHECKPOINT)
def test_what_is_no_checkpoint(kind, tmp_path):
    make, name, message = NO_CHECKPOINT[kind]
    make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        opened_leaves(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_that_mixes_layouts(tmp_path):
    folder = toy_pipeline(tmp_path / "pipe")
    convert(open_checkpoint(folder / "toy"), tmp_path / "native", "native")
    (tmp_path / "native").rename(folder / "other")
    index_of(folder, toy=["tests", "Toy"], other=["tests", "Toy"])
    with pytest.raises(UserError, match="mixes components"):
        open_checkpoint(folder)


def test_resolve(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve("demo-wan") == checkpoint.SHIPPED["demo-wan"]


def test_resolve_tells_what_is_wrong():
    for text in ("/no/such/folder", "nothing", "a/b/c", "org/name@", "./a", "a/b.safetensors"):
        with pytest.raises(UserError, match=r"there is no .*; expected a folder"):
            resolve(text)


def test_the_hash_changes_with_contents_only(tmp_path):
    source = saved(tmp_path / "one")
    before = checkpoint_hash(source)
    assert len(before) == 12 and before == checkpoint_hash(saved(tmp_path / "two"))
    (source / "README.md").write_text("documents do not count")
    (source / "config.json").touch()
    assert checkpoint_hash(source) == before
    last_byte_flipped(source / "model.safetensors")
    assert checkpoint_hash(source) != before


@pytest.mark.parametrize("layout", ["diffusers", "native", "original"])
def test_outputs_in_the_folder_leave_the_hash_alone(layout, text_pipeline, tmp_path):
    folder = tmp_path / "pipe"
    convert(open_checkpoint(text_pipeline), folder, layout, max_shard_bytes=20_000)
    before = checkpoint_hash(folder)
    (folder / "out.mp4").write_bytes(b"video")
    save_file({"latents": np.ones(3, np.float32)}, folder / "out.mp4.latents.safetensors")
    (folder / "sheets").mkdir()
    (folder / "sheets" / "out.png").write_bytes(b"sheet")
    assert checkpoint_hash(folder) == before
    assert checkpoint_hash(open_checkpoint(folder)) == before


def last_byte_flipped(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


@pytest.mark.parametrize("layout", ["diffusers", "native", "original"])
def test_every_file_of_a_checkpoint_counts_in_its_hash(layout, text_pipeline, tmp_path):
    folder = tmp_path / "pipe"
    convert(open_checkpoint(text_pipeline), folder, layout, max_shard_bytes=20_000)
    seen = {checkpoint_hash(folder)}
    weights = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name[0].isdigit()]
    weights += sorted(folder.rglob("*.safetensors"))
    files = [*weights[::5], *folder.rglob("spiece.model")]
    for file in files:
        last_byte_flipped(file)
        seen.add(checkpoint_hash(folder))
    assert len(seen) == len(files) + 1 > 3


def test_the_hash_of_what_ships_is_of_all_its_files():
    shipped = open_checkpoint(checkpoint.SHIPPED["demo-wan"])
    known = {file for file in shipped.files.values() if isinstance(file, Path)}
    known |= {file for name in shipped.settings for file in shipped.weight_files(name)}
    assert known == {file for file in checkpoint.SHIPPED["demo-wan"].rglob("*") if file.is_file()}


def test_the_hash_of_a_native_checkpoint_repeats(tmp_path):
    source = saved(tmp_path / "toy")
    convert(open_checkpoint(source), tmp_path / "a", "native")
    convert(open_checkpoint(source), tmp_path / "b", "native")
    assert checkpoint_hash(tmp_path / "a") == checkpoint_hash(tmp_path / "b")


def test_summary(text_pipeline, tmp_path):
    summary = summarise(open_checkpoint(text_pipeline))
    assert (summary.layout, summary.kind) == ("diffusers", "pipeline WanPipeline")
    assert summary.variant == "Wan text-to-video, 3 blocks of width 24 with 2 heads"
    assert summary.other_components == ["scheduler", "tokenizer"]
    parts = summary.components
    assert {name: part.dtypes for name, part in parts.items()} == {
        "text_encoder": ["float16"], "transformer": ["bfloat16"], "vae": ["float32"],
    }  # fmt: skip
    for name, part in parts.items():
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        stored = load_file(text_pipeline / name / f"{stem}.safetensors")
        assert part.parameters == sum(tensor.size for tensor in stored.values())
        assert part.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert summary.parameters == sum(part.parameters for part in parts.values())
    assert json.loads(json.dumps(summary.as_dict()))["hash"] == checkpoint_hash(text_pipeline)


ON_EIGHT_DEVICES = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from convert.checkpoint import load_model
from dit_jax.models.wan import AXES
from dit_jax.parameters import named_leaves
from dit_jax.sharding import leaf_sharding

mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
for folder in sys.argv[1:]:
    alone = load_model(folder, "transformer")
    place = lambda name, shape: leaf_sharding(name, shape, AXES, mesh)
    spread, copied = load_model(folder, "transformer", shardings=place), load_model(folder, "transformer", mesh=mesh)
    split = 0
    for (name, one), (_, two), (_, three) in zip(*map(named_leaves, (alone, spread, copied))):
        assert two.sharding == place(name, one.shape), name
        assert three.sharding.is_fully_replicated and len(three.devices()) == 8, name
        split += not two.sharding.is_fully_replicated
        for other in (two, three):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), name
    assert split > 10
print("equal")
"""


def test_leaves_go_straight_to_their_shards(text_pipeline, tmp_path):
    convert(open_checkpoint(text_pipeline), tmp_path / "native", "native")
    assert printed("-c", ON_EIGHT_DEVICES, text_pipeline, tmp_path / "native") == "equal"
