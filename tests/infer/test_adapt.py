"""Models with a router attached: written, read, hashed, converted, run, and refused where they have none."""

import json
import shutil

import jax
import numpy as np
import pytest
from beside_diffusers import PROMPT, SIZE
from tiny_flux import pipeline as flux_pipeline

from convert.checkpoint import checkpoint_hash, open_checkpoint
from convert.method_parts import part_files, read_parts
from convert.transfer import convert
from dit_jax.config import UserError
from dit_jax.methods.method import Part
from infer import load_pipeline
from infer.adapt import main

SHORT = dict(size=SIZE, frames=5, steps=2, guidance=3.0, seed=3)


def adapt(source, out, *more):
    assert main(["--model", str(source), "--add", "router", "--out", str(out), *more]) == 0
    return out


@pytest.fixture(scope="module")
def adapted(text_to_video, tmp_path_factory):
    return adapt(text_to_video[0], tmp_path_factory.mktemp("adapted") / "model")


@pytest.fixture(scope="module")
def routed(adapted):
    return load_pipeline(adapted)


def test_a_router_comes_with_the_model_and_changes_its_hash(text_to_video, adapted, tmp_path):
    parts = read_parts(open_checkpoint(adapted))
    assert parts["router"].settings["content"] == "latents" and parts["router"].settings["features"] == 9
    assert checkpoint_hash(adapted) != checkpoint_hash(text_to_video[0])
    other = adapt(adapted, tmp_path / "other", "--seed", "1")
    assert checkpoint_hash(other) != checkpoint_hash(adapted)
    convert(open_checkpoint(adapted), tmp_path / "native", "native")
    again = read_parts(open_checkpoint(tmp_path / "native"))["router"]
    assert all(np.array_equal(leaf, again.leaves[name]) for name, leaf in parts["router"].leaves.items())
    with pytest.raises(UserError, match="no place for methods/router"):
        convert(open_checkpoint(adapted), tmp_path / "original", "original")


def test_routing_runs_fewer_blocks_and_all_of_them_are_the_plain_model(routed):
    plain = routed(PROMPT, **SHORT)
    everything = routed(PROMPT, plan="routing:min=3:max=3", **SHORT)
    np.testing.assert_array_equal(everything.latents, plain.latents)
    fewer = routed(PROMPT, plan="routing:min=2:max=2", **SHORT)
    assert np.abs(fewer.latents - plain.latents).max() > 1e-3
    assert fewer.metadata[0]["plan"] == "routing:min=2:max=2"


def test_budgets_and_prompts_compile_nothing_again(routed):
    routed(PROMPT, plan="routing:min=2:max=2", **SHORT)
    programs = len(routed.programs)
    routed("the dog sleeps", plan="routing", **SHORT)
    assert len(routed.programs) == programs


def test_a_model_without_a_router_is_refused_before_anything_compiles(text_to_video):
    pipe = load_pipeline(text_to_video[0])
    with pytest.raises(UserError, match="attach an untrained one with `dit-adapt --add router`"):
        pipe(PROMPT, plan="routing", **SHORT)
    assert len(pipe.programs) == 0


def test_flux_is_routed_by_its_pooled_text(tmp_path):
    flux_pipeline(dev=True).save_pretrained(tmp_path / "flux")
    pipe = load_pipeline(adapt(tmp_path / "flux", tmp_path / "adapted"))
    assert pipe.parts["transformer"]["router"].settings["content"] == "pooled"
    one, two = (
        pipe("a red cat", size=(32, 32), steps=2, plan=plan).latents for plan in ("dense", "routing:min=2:max=3")
    )
    assert np.isfinite(two).all() and np.abs(one - two).max() > 1e-3


def test_each_expert_has_a_router_of_its_own(text_experts, tmp_path):
    pipe = load_pipeline(adapt(text_experts[0], tmp_path / "adapted"))
    assert (tmp_path / "adapted/methods/router/transformer_2/weights.safetensors").is_file()
    pipe(PROMPT, plan="routing", size=SIZE, frames=5, steps=4)
    low = pipe.parts["transformer_2"]["router"]
    assert all(isinstance(leaf, jax.Array) for leaf in low.leaves.values())


def test_damaged_parts_are_refused(adapted, tmp_path):
    shutil.copytree(adapted, tmp_path / "model")
    folder = tmp_path / "model/methods/router"
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"blocks": 7}))
    with pytest.raises(UserError, match="a model of 7 blocks, found one of 3"):
        load_pipeline(tmp_path / "model")(PROMPT, plan="routing", **SHORT)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks weights.safetensors"):
        load_pipeline(tmp_path / "model")


def test_parts_survive_in_any_dtype():
    part = Part({"rank": 3}, {"a.b": np.arange(6.0, dtype=np.float16).reshape(2, 3).T})
    files = part_files({"ddit": part}, "transformer_2")
    assert set(files) == {f"methods/ddit/transformer_2/{name}" for name in ("config.json", "weights.safetensors")}


@pytest.mark.parametrize("source", ["nowhere", "transformer"])
def test_bad_input_is_one_sentence(text_to_video, source, tmp_path, capsys):
    model = text_to_video[0] / source if source == "transformer" else source
    assert main(["--model", str(model), "--add", "router", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "dit-adapt: " in told and not (tmp_path / "out").exists()
