"""Dtypes on their way in: fp32, bf16 and fp16 as they are, fp8 with and without scales as bfloat16."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_checkpoints import model_folder, single_file, tensors

from convert.checkpoint import load_model, open_checkpoint
from convert.fp8 import widened
from convert.native import read_native
from convert.safetensors_files import Outgoing, read_safetensors, write_safetensors
from convert.summary import summarise
from convert.transfer import convert
from dit_jax.config import UserError
from dit_jax.parameters import named_leaves

BFLOAT16, E4M3, E5M2 = (np.dtype(kind) for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
TRANSFORMERS = ("wan", "flux-dev")
STEMS = {"wan": "diffusion_pytorch_model", "flux-dev": "flux1-dev"}


def save(file: Path, arrays: dict) -> Path:
    write_safetensors(file, [Outgoing(key, a.dtype, a.shape, lambda a=a: a) for key, a in arrays.items()])
    return file


def is_matrix(key: str, array: np.ndarray) -> bool:
    return key.endswith(".weight") and array.ndim == 2


def quantised(name: str, spelling: str = "scale_weight", rows: bool = False, dtype=E4M3) -> dict[str, np.ndarray]:
    """As ComfyUI's files are: matrices in fp8 with a scale each, everything else in bf16."""
    out: dict[str, np.ndarray] = {"scaled_fp8": np.zeros(0, dtype)}
    for key, array in tensors(name).items():
        if not is_matrix(key, array):
            out[key] = array.astype(BFLOAT16)
            continue
        largest = np.abs(array).max(axis=1 if rows else None, keepdims=True)
        scale = (largest / float(ml_dtypes.finfo(dtype).max)).astype(np.float32)
        layer = key.removesuffix(".weight")
        out[key] = (array / scale).astype(dtype)
        out[f"{layer}.{spelling}"] = scale if rows else scale.reshape(())
        out[f"{layer}.{'scale_input' if spelling == 'scale_weight' else 'input_scale'}"] = np.ones(1, np.float32)
    return out


def expected_of(arrays: dict, spelling: str) -> dict[str, np.ndarray]:
    """Values times scales in fp64, rounded to bfloat16."""
    out = {}
    for key, array in arrays.items():
        if array.dtype in (E4M3, E5M2) and array.size:
            scale = arrays.get(f"{key.removesuffix('.weight')}.{spelling}", np.ones(()))
            out[key] = (array.astype(np.float64) * scale.astype(np.float64)).astype(BFLOAT16)
        elif array.dtype == BFLOAT16:
            out[key] = array
    return out


def converted(file: Path, folder: Path, stem: str) -> dict[str, np.ndarray]:
    convert(open_checkpoint(file), folder, "original")
    return load_file(folder / f"{stem}.safetensors")


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype and found[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_floats_pass_as_they_are(name, dtype, tmp_path):
    file = single_file(tmp_path / "original.safetensors", name, dtype)
    assert_same(converted(file, tmp_path / "out", STEMS[name]), tensors(name, dtype=dtype))
    folder = model_folder(tmp_path / "diffusers", name, dtype)
    convert(open_checkpoint(folder), tmp_path / "native", "native")
    assert {leaf.dtype for leaf in read_native(tmp_path / "native" / "params").values()} == {np.dtype(dtype)}
    assert summarise(open_checkpoint(file)).dtypes == [np.dtype(dtype).name]


@pytest.mark.parametrize("rows", [False, True], ids=["a scale a tensor", "a scale a row"])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_scaled_fp8_becomes_bfloat16(name, spelling, rows, tmp_path):
    arrays = quantised(name, spelling, rows)
    found = converted(save(tmp_path / "fp8.safetensors", arrays), tmp_path / "out", STEMS[name])
    assert_same(found, expected_of(arrays, spelling))
    exact = tensors(name)
    for key, array in found.items():
        error = np.linalg.norm(array.astype(np.float32) - exact[key]) / np.linalg.norm(exact[key])
        assert error < (0.04 if is_matrix(key, array) else 0.004), key


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_fp8_without_scales_is_exact_in_bfloat16(name, dtype, tmp_path):
    arrays = tensors(name, dtype=dtype)
    found = converted(save(tmp_path / "fp8.safetensors", arrays), tmp_path / "out", STEMS[name])
    for key, array in arrays.items():
        assert found[key].dtype == BFLOAT16
        np.testing.assert_array_equal(found[key].astype(np.float32), array.astype(np.float32), err_msg=key)


def test_fp8_in_a_folder_of_diffusers_and_behind_a_prefix(tmp_path):
    folder = model_folder(tmp_path / "diffusers", "wan")
    file = folder / "diffusion_pytorch_model.safetensors"
    arrays = {key: array.astype(E4M3) for key, array in load_file(file).items()}
    file.unlink()
    save(file, arrays)
    loaded = dict(named_leaves(load_model(folder)))
    assert {str(leaf.dtype) for leaf in loaded.values()} == {"bfloat16"}
    prefixed = {f"model.diffusion_model.{key}": array for key, array in quantised("wan").items()}
    found = converted(save(tmp_path / "fp8.safetensors", prefixed), tmp_path / "out", STEMS["wan"])
    assert_same(found, expected_of(quantised("wan"), "scale_weight"))


def test_inspect_tells_the_dtypes_on_disk(tmp_path):
    arrays = quantised("wan")
    summary = summarise(open_checkpoint(save(tmp_path / "fp8.safetensors", arrays)))
    assert summary.dtypes == ["float8_e4m3fn", "bfloat16"]
    weights = {key: array for key, array in arrays.items() if "scale" not in key}
    assert summary.parameters == sum(array.size for array in weights.values())
    assert summary.components[""].bytes == sum(array.nbytes for array in weights.values())


def noted(note: bytes) -> dict[str, np.ndarray]:
    note_array = np.frombuffer(note, np.uint8)
    return {f"{key.removesuffix('.weight')}.comfy_quant": note_array for key in quantised("wan") if "ffn.0.w" in key}


def test_a_layers_note_is_no_weight(tmp_path):
    arrays = quantised("wan", "weight_scale") | noted(json.dumps({"format": "float8_e4m3fn"}).encode())
    found = converted(save(tmp_path / "fp8.safetensors", arrays), tmp_path / "out", STEMS["wan"])
    assert_same(found, expected_of(quantised("wan", "weight_scale"), "weight_scale"))


LAYER = "blocks.1.self_attn.q"
SCALE = f"{LAYER}.scale_weight"
WRONG = {
    "of another shape": (
        {SCALE: np.ones(7, np.float32)},
        rf"{SCALE} has shape \(7,\), expected one scale or .*256 row",
    ),
    "of blocks": ({SCALE: np.ones((2, 2), np.float32)}, rf"{SCALE} has shape \(2, 2\), expected one scale"),
    "of columns": ({SCALE: np.ones((1, 256), np.float32)}, rf"{SCALE} has shape \(1, 256\), expected one scale"),
    "NaN": ({SCALE: np.array(np.nan, np.float32)}, f"{SCALE} holds a scale that is negative, NaN or infinite"),
    "infinite": ({SCALE: np.array(np.inf, np.float32)}, f"{SCALE} holds a scale that is negative, NaN or infinite"),
    "negative": ({SCALE: np.array(-1, np.float32)}, f"{SCALE} holds a scale that is negative, NaN or infinite"),
    "an integer": ({SCALE: np.array(3, np.int32)}, f"{SCALE} is int32, expected a scale in fp32"),
    "missing": ({SCALE: None}, rf"lacks a scale of {LAYER}\.weight"),
    "twice": ({f"{LAYER}.weight_scale": np.ones(1, np.float32)}, rf"{LAYER}\.weight has two scales"),
    "of a bias that is not fp8": ({f"{LAYER}.bias.scale_weight": np.ones(1, np.float32)}, "unexpected tensor"),
    "of a weight in bf16": ({f"{LAYER}.weight": np.ones((256, 256), BFLOAT16)}, f"unexpected tensor {LAYER}.scale"),
    "of another format": (noted(b'{"format": "nvfp4"}'), "has format 'nvfp4', expected float8_e4m3fn"),
    "noted in no JSON": (noted(b"{"), "is no JSON that names a format"),
    "NaN in a weight": ({f"{LAYER}.weight": np.full((256, 256), np.nan, E4M3)}, rf"{LAYER}\.weight holds NaN"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_scale_is_named(kind, tmp_path):
    changes, message = WRONG[kind]
    arrays = {key: array for key, array in (quantised("wan") | changes).items() if array is not None}
    file = save(tmp_path / "fp8.safetensors", arrays)
    with pytest.raises(UserError, match=message) as caught:
        convert(open_checkpoint(file), tmp_path / "out", "native")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_large_tensor_is_scaled_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.fp8._PIECE", 40)
    rng = np.random.default_rng(0)
    arrays = {"a.weight": rng.standard_normal((13, 17)).astype(E4M3), "a.scale_weight": rng.random((13, 1), np.float32)}
    found = widened(read_safetensors(save(tmp_path / "fp8.safetensors", arrays)))["a.weight"].read()
    assert found.tobytes() == expected_of(arrays, "scale_weight")["a.weight"].tobytes()
