"""Files of torch as sources: alone or in a folder, only with the torch extra, and never running what is in them."""

import os
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_checkpoints import tensors

from convert import cli
from convert.checkpoint import open_checkpoint
from convert.transfer import convert

torch = pytest.importorskip("torch")
STEMS = {"wan": "diffusion_pytorch_model", "flux-dev": "flux1-dev", "wan-vae": "Wan2.1_VAE", "t5": "t5xxl"}


def state_of(name: str, dtype) -> dict:
    return {key: torch.from_numpy(array).to(dtype) for key, array in tensors(name).items()}


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("name", "suffix"), [("wan", "pth"), ("flux-dev", "pt"), ("wan-vae", "pth"), ("t5", "pt")])
def test_a_single_file_of_torch(name, suffix, dtype, tmp_path):
    state = state_of(name, dtype)
    file = tmp_path / f"renamed.{suffix}"
    torch.save(state, file)
    convert(open_checkpoint(file), tmp_path / "out", "original")
    found = load_file(tmp_path / "out" / f"{STEMS[name]}.safetensors")
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert found[key].dtype == np.dtype(getattr(ml_dtypes, str(dtype)[6:], None) or str(dtype)[6:])
        np.testing.assert_array_equal(found[key].astype(np.float32), tensor.float().numpy(), err_msg=key)


def test_fp8_of_torch_is_widened(tmp_path):
    state = state_of("wan", torch.float8_e4m3fn)
    torch.save(state, tmp_path / "fp8.pth")
    convert(open_checkpoint(tmp_path / "fp8.pth"), tmp_path / "out", "original")
    for key, array in load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors").items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array.astype(np.float32), state[key].float().numpy(), err_msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_file_of_before_torch_1_6_is_read_too(dtype, tmp_path):
    state = state_of("wan-vae", dtype)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "new.pth")
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    for name in ("old", "new"):
        convert(open_checkpoint(tmp_path / f"{name}.pth"), tmp_path / name, "original")
    file = "Wan2.1_VAE.safetensors"
    assert (tmp_path / "old" / file).read_bytes() == (tmp_path / "new" / file).read_bytes()


@pytest.mark.parametrize("length", [0, 3, 100, -100])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_of_torch_is_one_sentence(zipped, length, tmp_path, capsys):
    file = tmp_path / "cut.pth"
    torch.save(state_of("wan-vae", torch.float32), file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:length])
    assert run("to-jax", file, tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"dit-convert: {file} cannot be read as a file of weights") and "download" in error


@pytest.mark.parametrize("alone", [True, False], ids=["file", "folder"])
def test_without_torch_the_error_is_one_sentence(alone, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    torch.save(state_of("wan-vae", torch.float32), folder / "Wan2.1_VAE.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run("to-jax", folder / "Wan2.1_VAE.pth" if alone else folder, tmp_path / "out") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert error.startswith("dit-convert: ") and error.endswith('torch; run: pip install "dit-jax[torch]".')
    assert str(folder / "Wan2.1_VAE.pth") in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


class Spy:
    """What a malicious pickle would run."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return (os.mkdir, (str(self.place),))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("command", ["inspect", "to-jax", "to-torch"])
def test_code_in_a_file_of_torch_never_runs(command, zipped, tmp_path, capsys):
    file, place = tmp_path / "model.pth", tmp_path / "it-ran"
    state = state_of("wan-vae", torch.float32) | {"spy": Spy(place)}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    assert run(command, file, *([] if command == "inspect" else [tmp_path / "out"])) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"dit-convert: {file} cannot be read as a file of weights")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


STRANGE = {
    "a list": [torch.ones(2)],
    "numbers for keys": {3: torch.ones(2)},
    "a sparse tensor": {"a": torch.eye(3).to_sparse()},
    "complex numbers": {"shared.weight": torch.ones(2, dtype=torch.complex64)},
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file_of_weights(kind, tmp_path, capsys):
    torch.save(STRANGE[kind], tmp_path / "strange.pt")
    assert run("to-jax", tmp_path / "strange.pt", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"dit-convert: {tmp_path / 'strange.pt'}") and error.endswith(".")
