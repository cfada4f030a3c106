"""Conversions of whole pipelines: tensors bit for bit, other files byte for byte, nothing left of a failure."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import transfer
from convert.checkpoint import checkpoint_hash, load_model, open_checkpoint
from convert.components import component_of
from convert.native import read_native
from convert.transfer import convert, staged, write_model
from dit_jax.config import UserError
from dit_jax.parameters import named_leaves

KEPT_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/spiece.model",
    "generation_defaults.json",
)


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor below a folder, under the place of its file's stem."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        stem = re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", file.relative_to(folder).as_posix())
        found |= {f"{stem}/{key}": tensor for key, tensor in load_file(file).items()}
    return found


def assert_same_weights(one: Path, other: Path):
    expected, found = weights(one), weights(other)
    assert expected and found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert found[key].tobytes() == tensor.tobytes(), key


def run(source: Path, destination: Path, layout, **options) -> Path:
    convert(open_checkpoint(source), destination, layout, **options)
    return destination


@pytest.mark.parametrize("kind", ["text_pipeline", "image_pipeline", "projecting_pipeline"])
def test_round_trips_are_bit_exact(kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    native = run(source, tmp_path / "native", "native")
    assert_same_weights(source, run(native, tmp_path / "diffusers", "diffusers"))
    for name in KEPT_FILES:
        assert (tmp_path / "diffusers" / name).read_bytes() == (source / name).read_bytes()
        assert (native / name).read_bytes() == (source / name).read_bytes()

    original = run(source, tmp_path / "original", "original")
    again = run(original, tmp_path / "native2", "native")
    assert_same_weights(original, run(again, tmp_path / "original2", "original"))
    assert_same_weights(source, run(original, tmp_path / "diffusers2", "diffusers"))
    assert (tmp_path / "original2" / "google" / "umt5-xxl" / "spiece.model").read_bytes() == bytes(range(256))


def test_dtypes_survive_in_native(text_pipeline, tmp_path):
    native = run(text_pipeline, tmp_path / "native", "native")
    dtypes = {
        name: {leaf.dtype.name for leaf in read_native(native / name / "params").values()}
        for name in ("transformer", "text_encoder", "vae")
    }
    assert dtypes == {"transformer": {"bfloat16"}, "text_encoder": {"float16"}, "vae": {"float32"}}


def test_shards_carry_an_index_and_read_back(text_pipeline, tmp_path):
    folder = run(text_pipeline, tmp_path / "sharded", "diffusers", max_shard_bytes=20_000)
    index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in (folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for key, tensor in weights(text_pipeline).items() if key.startswith("transformer/")
    )
    assert_same_weights(text_pipeline, folder)
    assert_same_weights(text_pipeline, run(folder, tmp_path / "whole", "diffusers"))


def test_diffusers_and_transformers_open_what_we_write(image_pipeline, tmp_path):
    import torch
    from diffusers import WanTransformer3DModel
    from transformers import CLIPVisionModel, UMT5EncoderModel

    native = run(image_pipeline, tmp_path / "native", "native")
    folder = run(native, tmp_path / "diffusers", "diffusers", max_shard_bytes=20_000)
    for name, kind in {
        "transformer": WanTransformer3DModel,
        "text_encoder": UMT5EncoderModel,
        "image_encoder": CLIPVisionModel,
    }.items():
        expected = kind.from_pretrained(image_pipeline / name).state_dict()
        found = kind.from_pretrained(folder / name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_orbax_restores_a_native_component_by_itself(text_pipeline, tmp_path):
    import orbax.checkpoint as ocp

    native = run(text_pipeline, tmp_path / "native", "native")
    tree = ocp.StandardCheckpointer().restore((native / "transformer" / "params").resolve())
    model = load_model(text_pipeline, "transformer")
    for name, leaf in named_leaves(model):
        node = tree
        for part in name.split("."):
            node = node[part]
        assert np.asarray(node).tobytes() == np.asarray(leaf).tobytes(), name


def test_a_lone_transformer_converts_both_ways(text_pipeline, tmp_path):
    source = text_pipeline / "transformer"
    native = run(source, tmp_path / "native", "native")
    assert (native / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert_same_weights(source, run(native, tmp_path / "diffusers", "diffusers"))
    original = run(native, tmp_path / "original", "original")
    assert_same_weights(source, run(original, tmp_path / "diffusers2", "diffusers"))


def test_a_model_in_memory_can_be_written(text_pipeline, tmp_path):
    opened = open_checkpoint(text_pipeline)
    model, settings = load_model(opened, "transformer"), opened.settings["transformer"]
    with staged(tmp_path / "pipe") as folder:
        write_model(folder / "transformer", model, settings)
        write_model(folder / "native", model, settings, "native")
    assert_same_weights(text_pipeline / "transformer", tmp_path / "pipe" / "transformer")
    assert component_of(settings, tmp_path).shapes.keys() == read_native(tmp_path / "pipe" / "native" / "params").keys()


@pytest.mark.parametrize("layout", ["diffusers", "native"])
def test_a_model_of_another_width_than_its_config_is_refused(layout, text_pipeline, tmp_path):
    opened = open_checkpoint(text_pipeline / "transformer")
    settings = opened.settings[""] | {"ffn_dim": 44}
    with pytest.raises(UserError, match=r"out: blocks\.mlp\.\S+ has shape \(.*40.*\), expected \(.*44.*\)"):
        write_model(tmp_path / "out", load_model(opened), settings, layout)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_refused_then_replaced(text_pipeline, tmp_path):
    source, destination = text_pipeline / "vae", tmp_path / "out"
    run(source, destination, "native")
    before = checkpoint_hash(destination)
    with pytest.raises(UserError, match=r"exists.*--overwrite"):
        run(source, destination, "diffusers")
    assert checkpoint_hash(destination) == before
    run(source, destination, "diffusers", overwrite=True)
    assert_same_weights(source, destination)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_spares_what_is_no_checkpoint(text_pipeline, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(UserError, match="no checkpoint"):
        run(text_pipeline / "vae", tmp_path / "photos", "native", overwrite=True)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"


@pytest.mark.parametrize("place", [".", "..", "inside"])
def test_source_and_destination_may_not_overlap(place, text_pipeline):
    with pytest.raises(UserError, match="lie in one another"):
        run(text_pipeline / "vae", text_pipeline / "vae" / place, "native", overwrite=True)


class Interrupting:
    """A progress bar that stops the conversion in its middle."""

    total = 0

    def __init__(self, error):
        self.error, self.count = error, 0

    def update(self):
        self.count += 1
        if self.count == self.total // 2:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError("disk full")])
@pytest.mark.parametrize("layout", ["native", "diffusers", "original"])
def test_an_interruption_leaves_nothing(error, layout, text_pipeline, tmp_path):
    with pytest.raises(type(error)):
        run(text_pipeline, tmp_path / "new" / "deep", layout, progress=Interrupting(error))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("step", "left"), [("rename", "native"), ("flush", "diffusers"), ("rmtree", "diffusers")])
def test_an_interruption_of_the_swap_leaves_one_whole_checkpoint(step, left, text_pipeline, tmp_path, monkeypatch):
    destination = run(text_pipeline / "vae", tmp_path / "out", "native")
    owner = {"rename": Path, "flush": transfer, "rmtree": transfer.shutil}[step]
    real, interrupted = getattr(owner, step), []

    def once(path, *arguments, **options):
        if path in (tmp_path, tmp_path / f"out.{'partial' if step == 'rename' else 'old'}-{os.getpid()}"):
            interrupted.append(path)
            if len(interrupted) == 1:
                raise KeyboardInterrupt
        return real(path, *arguments, **options)

    monkeypatch.setattr(owner, step, once)
    with pytest.raises(KeyboardInterrupt):
        run(text_pipeline / "vae", destination, "diffusers", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert open_checkpoint(destination).layout == left


def test_an_interruption_leaves_the_old_destination(text_pipeline, tmp_path):
    destination = run(text_pipeline / "vae", tmp_path / "out", "native")
    before = checkpoint_hash(destination)
    with pytest.raises(KeyboardInterrupt):
        run(text_pipeline, destination, "native", overwrite=True, progress=Interrupting(KeyboardInterrupt()))
    assert checkpoint_hash(destination) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
