"""What a checkpoint says besides its weights: models that this pipeline does not run, and damaged files."""

import json
import shutil

import pytest

from dit_jax.config import UserError
from infer import load_pipeline


@pytest.fixture
def copied(text_to_video, tmp_path):
    return shutil.copytree(text_to_video[0], tmp_path / "copy")


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        load_pipeline(folder)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_two_transformers_without_a_boundary_are_refused(copied):
    shutil.copytree(copied / "transformer", copied / "transformer_2")
    change(copied / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    refused(copied, "two experts", "transformer_2 with the boundary_ratio None")


def test_a_boundary_without_a_second_transformer_is_refused(copied):
    change(copied / "model_index.json", boundary_ratio=0.875)
    refused(copied, "two experts", "no transformer_2 and the boundary_ratio 0.875")


def test_experts_of_two_sizes_are_refused(copied):
    shutil.copytree(copied / "transformer", copied / "transformer_2")
    change(copied / "transformer_2" / "config.json", num_layers=2)
    index = dict(transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.9)
    change(copied / "model_index.json", **index)
    refused(copied, "experts of two sizes", "one config")


def test_an_image_without_an_image_branch_is_refused(copied):
    change(copied / "transformer" / "config.json", in_channels=13)
    refused(copied, "without an image encoder", "13 channels", "expected 4 or 12")


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("{", ["is not JSON"]),
        ('{"stepz": 3}', ["'stepz'", "steps"]),
        ('{"size": 3}', ["size", "3", "[width, height]"]),
        ('{"steps": "ten"}', ["steps", "'ten'", "whole number"]),
        ('{"guidance": null}', ["guidance", "None", "number"]),
        ('{"grammar": "latin"}', ["grammar", "'latin'", "moving-digits or digits"]),
        ('{"guidance": [4, 3, 2]}', ["guidance", "[4, 3, 2]", "two of them"]),
    ],
)
def test_damaged_defaults(copied, contents, words):
    (copied / "generation_defaults.json").write_text(contents)
    refused(copied, "generation_defaults.json", *words)


@pytest.mark.parametrize(
    ("scheduler", "own", "solver"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, "euler"),
        ("UniPCMultistepScheduler", {}, "unipc"),
        ("DPMSolverMultistepScheduler", {}, "unipc"),
        ("FlowMatchEulerDiscreteScheduler", {"solver": "renoise"}, "renoise"),
    ],
)
def test_the_solver_is_the_schedulers_unless_the_model_says_otherwise(copied, scheduler, own, solver):
    change(copied / "scheduler" / "scheduler_config.json", _class_name=scheduler)
    (copied / "generation_defaults.json").write_text(json.dumps(own))
    assert load_pipeline(copied).defaults.solver == solver


@pytest.mark.parametrize("grammar", ["moving-digits", "digits", None])
def test_defaults_of_the_model(copied, grammar):
    settings = {"size": [48, 32], "frames": 5, "guidance": 2, "grammar": grammar}
    (copied / "generation_defaults.json").write_text(json.dumps(settings))
    defaults = load_pipeline(copied).defaults
    assert (defaults.size, defaults.frames, defaults.steps, defaults.guidance) == ((48, 32), 5, 50, 2)
    assert defaults.grammar == grammar


def test_damaged_shift(copied):
    change(copied / "scheduler" / "scheduler_config.json", flow_shift="three")
    refused(copied, "scheduler_config.json", "'three'", "number")


def test_damaged_tokenizer(copied):
    (copied / "tokenizer" / "tokenizer.json").write_text("{}")
    refused(copied, "tokenizer", "download")


def test_missing_tokenizer(copied):
    shutil.rmtree(copied / "tokenizer")
    index = json.loads((copied / "model_index.json").read_text())
    del index["tokenizer"]
    (copied / "model_index.json").write_text(json.dumps(index))
    refused(copied, "no tokenizer")
