"""What a checkpoint holds for methods, under PyTorch's keys and back, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import pipeline_folder

from convert.checkpoint import open_checkpoint
from convert.cli import main
from convert.method_keys import method_keys
from convert.method_parts import part_files, read_parts, transformers
from convert.transfer import convert
from dit_jax.config import UserError
from dit_jax.methods.method import Part

PIPELINES = {
    "wan": {"transformer": "wan"},
    "experts": {"transformer": "wan", "transformer_2": "wan"},
    "image": {"transformer": "wan-image"},
    "flux": {"transformer": "flux-dev"},
}
RATIOS = {"ratios": [0.1, 0.5], "stride": 3, "experts": {"transformer_2": [0.2, 0.3]}}
FEW_STEP = {"timesteps": [1000, 500], "shift": 5.0, "guidance_scale": 1.0, "sampler": "euler"}
ADAPTERS = {"scales": [2, 4], "rank": 3, "residual_channels": 5}
WEIGHTS = "weights.safetensors"


def settings_of(blocks):
    router = {"content": "latents", "features": 9, "blocks": blocks, "hidden": 7, "time_frequencies": 6}
    return {"router": router, "ddit": ADAPTERS, "coredit": RATIOS, "few_step": FEW_STEP, "other": {"any": "thing"}}


def parts_of(component, seed):
    """Random ones of every kind, and of a kind that the converter does not know; a dtype each."""
    rng, parts = np.random.default_rng(seed), {}
    for name, settings in settings_of(sum(component.abstract.stacks)).items():
        keys = method_keys(name, settings, component)
        dtype = np.float16 if name == "ddit" else np.float32
        shapes = {"some.array": (2, 3)} if name == "other" else {} if keys is None else keys.shapes
        parts[name] = Part(settings, {key: rng.standard_normal(s).astype(dtype) for key, s in shapes.items()})
    return parts


@pytest.fixture(params=PIPELINES)
def native(request, tmp_path):
    """(a native checkpoint with parts, those parts by component)."""
    plain = open_checkpoint(pipeline_folder(tmp_path / "plain", PIPELINES[request.param]))
    parts = {name: parts_of(plain.component(name), seed) for seed, name in enumerate(transformers(plain))}
    files = dict(plain.files)
    for name, of_component in parts.items():
        files |= part_files(of_component, name)
    convert(replace(plain, files=files), tmp_path / "native", "native")
    return tmp_path / "native", parts


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        assert dict(found[name].settings) == part.settings and found[name].leaves.keys() == part.leaves.keys()
        for key, array in part.leaves.items():
            assert found[name].leaves[key].dtype == array.dtype
            np.testing.assert_array_equal(found[name].leaves[key], array)


def test_they_come_back_bit_for_bit(native, tmp_path):
    folder, parts = native
    assert main(["to-torch", str(folder), str(tmp_path / "torch")]) == 0
    assert main(["to-jax", str(tmp_path / "torch"), str(tmp_path / "again")]) == 0
    for name, expected in parts.items():
        for place in ("native", "torch", "again"):
            assert_same(read_parts(open_checkpoint(tmp_path / place), name), expected)
    for file in folder.glob("methods/**/*"):
        again = tmp_path / "again" / file.relative_to(folder)
        if file.suffix == ".json":
            assert again.read_bytes() == file.read_bytes()
        elif file.is_file():
            one, other = load_file(file), load_file(again)
            assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_files_of_diffusers_layout_have_pytorchs_keys_and_axes(native, tmp_path):
    folder, parts = native
    assert main(["to-torch", str(folder), str(tmp_path / "torch")]) == 0
    inside = tmp_path / "torch/methods"
    ours, theirs = parts["transformer"], {name: load_file(inside / name / WEIGHTS) for name in ("router", "ddit")}
    router = ours["router"].leaves
    assert sorted(theirs["router"]) == [f"{n}.{p}" for n in ("middle", "out", "up") for p in ("bias", "weight")]
    np.testing.assert_array_equal(theirs["router"]["up.weight"], router["up.kernel"].T)
    adapters, found = ours["ddit"].leaves, theirs["ddit"]
    flux = "2p.x_embedder.weight" in found
    up, down = ("single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.1.proj_out") if flux else (
        f"blocks.0.{name}" for name in ("ffn.net.0.proj", "ffn.net.2")
    )  # fmt: skip
    stack, block = ("single", 1) if flux else ("blocks", 0)
    for name, key in (("up", up), ("down", down)):
        for factor, its in (("down", "lora_A"), ("up", "lora_B")):
            array = adapters[f"4p.lora.{stack}.mlp.{name}.{factor}"][block]
            np.testing.assert_array_equal(found[f"4p.{key}.{its}.weight"], array.T)
    conv = found["2p.residual.conv.weight"]
    np.testing.assert_array_equal(conv, np.transpose(adapters["2p.residual.conv"], (3, 2, 0, 1)))
    assert found["2p.residual.out.weight"].shape[2:] == (1, 1)
    patch = found["4p.x_embedder.weight" if flux else "4p.patch_embedding.weight"]
    width = len(patch)
    # Our rows are cells (y, x, c), those of a convolution and of FLUX's packed latents (c, y, x).
    cells = adapters["4p.patch.kernel"].reshape(8, 8, -1, width)
    np.testing.assert_array_equal(patch.reshape(width, -1, 8, 8), np.transpose(cells, (3, 2, 0, 1)))
    assert (inside / "other" / WEIGHTS).read_bytes() == (folder / "methods/other" / WEIGHTS).read_bytes()
    assert not (inside / "coredit" / WEIGHTS).exists() and not (inside / "few_step" / WEIGHTS).exists()


@pytest.mark.parametrize("kind", ["wan", "flux"])
def test_adapters_of_rank_0_come_back_without_low_rank_maps(kind, tmp_path):
    plain = open_checkpoint(pipeline_folder(tmp_path / "plain", PIPELINES[kind]))
    settings, rng = ADAPTERS | {"rank": 0}, np.random.default_rng(0)
    shapes = method_keys("ddit", settings, plain.component("transformer")).shapes
    parts = {"ddit": Part(settings, {key: rng.standard_normal(shape) for key, shape in shapes.items()})}
    convert(replace(plain, files=plain.files | part_files(parts)), tmp_path / "native", "native")
    assert main(["to-torch", str(tmp_path / "native"), str(tmp_path / "torch")]) == 0
    theirs = load_file(tmp_path / "torch/methods/ddit" / WEIGHTS)
    assert len(theirs) == len(shapes) == 22 and not any("lora" in key for key in theirs)
    assert main(["to-jax", str(tmp_path / "torch"), str(tmp_path / "again")]) == 0
    for place in ("native", "torch", "again"):
        assert_same(read_parts(open_checkpoint(tmp_path / place)), parts)


def test_settings_alone_are_told_to_both_experts(tmp_path):
    plain = open_checkpoint(pipeline_folder(tmp_path / "plain", PIPELINES["experts"]))
    files = part_files({"coredit": Part(RATIOS, {})}) | part_files({"few_step": Part(FEW_STEP, {})}, "transformer_2")
    assert set(files) == {"methods/coredit/config.json", "methods/few_step/config.json"}
    convert(replace(plain, files=plain.files | files), tmp_path / "out", "diffusers")
    for name in ("transformer", "transformer_2"):
        assert read_parts(open_checkpoint(tmp_path / "out"), name) == {
            "coredit": Part(RATIOS, {}), "few_step": Part(FEW_STEP, {}),
        }  # fmt: skip


def test_our_own_keys_in_diffusers_layout_are_read_and_rewritten(tmp_path):
    """What was written before there were keys for PyTorch."""
    plain = open_checkpoint(pipeline_folder(tmp_path / "plain", PIPELINES["wan"]))
    parts = parts_of(plain.component("transformer"), 3)
    for place, content in part_files(parts).items():
        (tmp_path / "plain" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / place).write_bytes(content)
    assert_same(read_parts(open_checkpoint(tmp_path / "plain")), parts)
    assert main(["to-torch", str(tmp_path / "plain"), str(tmp_path / "torch")]) == 0
    assert "up.weight" in load_file(tmp_path / "torch/methods/router" / WEIGHTS)


def test_the_authors_layout_has_no_place_for_them(native, tmp_path, capsys):
    folder, _ = native
    assert main(["to-torch", str(folder), str(tmp_path / "out"), "--layout", "original"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert "no place for methods/" in told[-1] and "use --layout diffusers" in told[-1]
    assert not (tmp_path / "out").exists()


def _edited(file: Path, change):
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file)


DAMAGE = {
    "missing": (lambda arrays: arrays.pop("middle.bias"), "lacks middle.bias"),
    "unexpected": (lambda arrays: arrays.update({"more": np.zeros(2, np.float32)}), "unexpected tensor more"),
    "misshapen": (lambda arrays: arrays.update({"up.bias": np.zeros(2, np.float32)}), r"up.bias has shape \(2,\)"),
    "infinite": (lambda arrays: arrays["up.bias"].fill(np.inf), "up.bias holds NaN or infinite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("keys", ["ours", "theirs"])
def test_damage_is_one_sentence_and_nothing_is_written(damage, keys, tmp_path, capsys):
    plain = open_checkpoint(pipeline_folder(tmp_path / "plain", PIPELINES["wan"]))
    files = part_files(parts_of(plain.component("transformer"), 0))
    layout = "native" if keys == "ours" else "diffusers"
    convert(replace(plain, files=plain.files | files), tmp_path / "good", layout)
    change, told = DAMAGE[damage]
    _edited(tmp_path / "good/methods/router" / WEIGHTS, change)
    with pytest.raises(UserError, match=told.replace("tensor", "(tensor|leaf)")):
        read_parts(open_checkpoint(tmp_path / "good"))
    assert main(["to-torch", str(tmp_path / "good"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists() and len(capsys.readouterr().err.strip().splitlines()) >= 1


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("router", {"blocks": 7}, "a model of 7 blocks, found one of 2"),
        ("router", {"colour": "red"}, "expected content, features, blocks"),
        ("ddit", {"colour": "red"}, "methods/ddit/config.json: the config of ddit cannot be used"),
        ("ddit", {"rank": 4}, r"has shape \(3, "),
    ],
)
def test_settings_of_another_model_are_refused(name, settings, told, tmp_path):
    plain = open_checkpoint(pipeline_folder(tmp_path / "plain", PIPELINES["wan"]))
    files = part_files(parts_of(plain.component("transformer"), 0))
    convert(replace(plain, files=plain.files | files), tmp_path / "good", "diffusers")
    config = tmp_path / f"good/methods/{name}/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(UserError, match=told):
        convert(open_checkpoint(tmp_path / "good"), tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()
