"""Pipelines that name components of another instead of holding copies."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from convert.checkpoint import checkpoint_hash, load_model, open_checkpoint
from convert.cli import main
from convert.components import referring
from convert.transfer import convert
from dit_jax.parameters import named_leaves

LAYOUTS = {"diffusers": "to-torch", "native": "to-jax"}


@pytest.fixture(params=LAYOUTS)
def base(request, text_pipeline, tmp_path):
    convert(open_checkpoint(text_pipeline), tmp_path / "base", request.param)
    return tmp_path / "base"


@pytest.fixture
def student(base, tmp_path):
    """The same pipeline with another transformer, beside its base, which holds all else."""
    source = open_checkpoint(base)
    leaves = source.leaves("transformer")
    first, *_ = leaves
    read = leaves[first].read
    changed = replace(leaves[first], read=lambda block: -read(block))
    edited = replace(source, edited={"transformer": {**leaves, first: changed}})
    convert(edited, tmp_path / "whole", source.layout)
    assert main([LAYOUTS[source.layout], str(tmp_path / "whole"), str(tmp_path / "student"), "--base", str(base)]) == 0
    return tmp_path / "student"


def arrays(folder, name):
    return {key: np.asarray(leaf) for key, leaf in named_leaves(load_model(folder, name))}


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_what_is_the_same_is_named_and_read_from_there(base, student):
    whole = student.with_name("whole")
    index = json.loads((student / "model_index.json").read_text())
    for name in ("vae", "text_encoder", "tokenizer"):
        assert index[name][2] == {"pretrained_model_name_or_path": str(base), "subfolder": name}
        assert not (student / name).exists()
    assert len(index["transformer"]) == 2 and size(student) < size(whole) / 2
    for name in ("transformer", "vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, arrays(student, name), arrays(whole, name))
    ours, theirs = arrays(student, "transformer"), arrays(base, "transformer")
    assert sum(not np.array_equal(array, theirs[name]) for name, array in ours.items()) == 1


def test_a_copy_holds_all_again(student, tmp_path):
    opened = open_checkpoint(student)
    convert(opened, tmp_path / "copy", opened.layout)
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {
        file.name for file in student.with_name("whole").iterdir()
    }
    assert all(len(entry) == 2 for entry in index_of(tmp_path / "copy").values() if isinstance(entry, list))


def test_a_student_of_a_student_names_what_that_one_holds_and_what_it_names(base, student, tmp_path):
    opened = open_checkpoint(student)
    convert(opened, tmp_path / "next", opened.layout, base=str(student))
    index = index_of(tmp_path / "next")
    for name, holder in (("transformer", student), ("vae", base), ("text_encoder", base), ("tokenizer", base)):
        assert index[name][2] == {"pretrained_model_name_or_path": str(holder), "subfolder": name}
        assert not (tmp_path / "next" / name).exists()
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / "next", "vae"), arrays(student, "vae"))


def test_its_hash_changes_with_the_base(base, student):
    before = checkpoint_hash(student)
    file = max(base.joinpath("vae").rglob("*"), key=lambda file: file.stat().st_size)
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert checkpoint_hash(student) != before


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda base: base.rename(base.with_name("gone")), "there is no "),
        (lambda base: (base / "vae").rename(base / "other"), "lacks the folder vae, which model_index.json names"),
    ],
)
def test_a_base_that_is_gone(base, student, capsys, spoil, message):
    spoil(base)
    assert main(["inspect", str(student)]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_what_cannot_be_a_base(base, student, tmp_path, capsys):
    layout = open_checkpoint(base).layout
    words = [LAYOUTS[layout], str(student.with_name("whole")), str(tmp_path / "out"), "--base"]
    other = next(name for name in LAYOUTS if name != layout)
    convert(open_checkpoint(base), tmp_path / "other", other)
    assert main([*words, str(tmp_path / "other")]) == 2
    assert f"expected a pipeline in the {layout} layout" in capsys.readouterr().err
    assert main([*words, "demo-flux"]) == 2
    assert not (tmp_path / "out").exists()


def test_the_words_are_those_of_modular_pipelines():
    told = {"pretrained_model_name_or_path": "org/base", "subfolder": "vae"}
    assert referring(["diffusers", "AutoencoderKL"], "org/base", "vae") == ["diffusers", "AutoencoderKL", told]
