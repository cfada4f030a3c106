"""The reader and writer of tensor files against the safetensors library and torch, and every kind of damage."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.safetensors_files import (
    DTYPES,
    Outgoing,
    has_nan_or_infinity,
    read_safetensors,
    write_safetensors,
    write_tensors,
)
from convert.weight_files import read_tensors
from dit_jax.config import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def outgoing(arrays):
    return [Outgoing(key, array.dtype, array.shape, lambda a=array: a) for key, array in arrays.items()]


def samples() -> dict[str, np.ndarray]:
    """One tensor of every dtype, with odd sizes, an empty one and a scalar among them."""
    rng = np.random.default_rng(0)
    arrays = {f"t.{name}": (rng.standard_normal((3, 5)) * 9).astype(dtype) for name, dtype in DTYPES.items()}
    return arrays | {"empty": np.zeros((0, 4), np.float32), "scalar": np.array(3, np.int64)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert found[key].tobytes() == array.tobytes(), key


def test_what_we_write_the_library_reads(tmp_path):
    expected = {key: array for key, array in samples().items() if "F8" not in key}
    write_safetensors(tmp_path / "a.safetensors", outgoing(expected))
    assert_same(load_file(tmp_path / "a.safetensors"), expected)


def test_what_the_library_writes_we_read(tmp_path):
    expected = {key: array for key, array in samples().items() if "F8" not in key}
    save_file(expected, tmp_path / "a.safetensors")
    assert_same({key: tensor.read() for key, tensor in read_safetensors(tmp_path / "a.safetensors").items()}, expected)


def test_every_dtype_comes_back(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", outgoing(samples()))
    assert_same({key: tensor.read() for key, tensor in read_safetensors(tmp_path / "a.safetensors").items()}, samples())


def test_torch_files_of_every_dtype(tmp_path):
    torch = pytest.importorskip("torch")
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
    state = {name: torch.arange(-6, 6).reshape(3, 4).t().to(dtype) for name, dtype in dtypes.items()}
    torch.save(state, tmp_path / "w.pth")
    tensors = read_tensors(tmp_path, "w")
    for name, tensor in tensors.items():
        assert tensor.dtype == DTYPES[name] and tensor.shape == (4, 3)
        np.testing.assert_array_equal(tensor.read().astype(np.float32), state[name].float().numpy())


class Spy:
    """What a malicious pickle would run."""

    def __reduce__(self):
        return (Path.touch, (Path("/tmp/dit-jax-pickle-ran"),))


def test_a_torch_file_runs_no_code(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.ones(2), "spy": Spy()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(tmp_path, "w")
    assert not Path("/tmp/dit-jax-pickle-ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"weight": 3}])
def test_a_torch_file_of_something_else(content, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="dict of tensors"):
        read_tensors(tmp_path, "w")


def test_without_torch_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r'pip install "dit-jax\[torch\]"'):
        read_tensors(tmp_path, "w")


def saved(folder: Path) -> Path:
    file = folder / "w.safetensors"
    write_safetensors(file, outgoing({"a": np.ones((4, 6), np.float32), "b": np.ones(5, BFLOAT16)}))
    return file


def with_header(file: Path, change) -> None:
    """Rewrites a file's header after `change`, data untouched."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(json.loads(raw[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edited(key: str, **changes):
    return lambda header: header | {key: header[key] | changes}


DAMAGE = {
    "truncated in the data": (lambda f: f.write_bytes(f.read_bytes()[:-3]), r"truncated: b of shape \(5,\)"),
    "truncated in the header": (lambda f: f.write_bytes(f.read_bytes()[:30]), "truncated"),
    "empty": (lambda f: f.write_bytes(b""), "truncated"),
    "bytes to spare": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "107 bytes of data, expected 106"),
    "no json": (lambda f: with_header(f, lambda h: b"{not json"), "not JSON"),
    "no object": (lambda f: with_header(f, lambda h: b"[1]"), "JSON object"),
    "no offsets": (lambda f: with_header(f, lambda h: h | {"a": {"dtype": "F32", "shape": [4, 6]}}), "entry of a"),
    "unknown dtype": (lambda f: with_header(f, edited("a", dtype="C64")), "a has dtype C64"),
    "shape and bytes differ": (lambda f: with_header(f, edited("a", shape=[4, 7])), r"a of shape \(4, 7\).* 112 bytes"),
    "negative shape": (lambda f: with_header(f, edited("a", shape=[-4, -6])), "damaged: a of shape"),
    "dtype a list": (lambda f: with_header(f, edited("a", dtype=[])), "entry of a is not"),
    "entry a list": (lambda f: with_header(f, lambda h: h | {"a": [1]}), "entry of a is not"),
    "huge size": (lambda f: with_header(f, edited("a", shape=[10**30])), "entry of a is not"),
    "infinite size": (lambda f: with_header(f, edited("a", shape=[float("inf")])), "entry of a is not"),
    "broken size": (lambda f: with_header(f, edited("a", shape=[4.5, 6])), "entry of a is not"),
    "size a text": (lambda f: with_header(f, edited("a", shape="46")), "entry of a is not"),
    "too many axes": (lambda f: with_header(f, edited("a", shape=[1] * 63 + [4, 6])), "entry of a is not"),
    "product past 64 bits": (lambda f: with_header(f, edited("a", shape=[2**62, 4])), f"needs {2**66} bytes"),
    "one offset": (lambda f: with_header(f, edited("a", data_offsets=[96])), "entry of a is not"),
    "endless number": (lambda f: with_header(f, lambda h: b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "deep nesting": (lambda f: with_header(f, lambda h: b"[" * 200_000), "not JSON"),
    "overlap": (lambda f: with_header(f, edited("b", data_offsets=[90, 100])), "b begins at byte 90, expected 96"),
    "duplicate": (lambda f: with_header(f, lambda h: json.dumps(h)[:-1].encode() + b', "a": {}}'), "holds a twice"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind, tmp_path):
    file = saved(tmp_path)
    damage, message = DAMAGE[kind]
    damage(file)
    with pytest.raises(UserError, match=message) as caught:
        read_tensors(tmp_path, "w")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def sharded(folder: Path) -> Path:
    arrays = {"a": np.ones((4, 6), np.float32), "b": np.ones((2, 3), np.float32), "c": np.ones(5, BFLOAT16)}
    write_tensors(folder, "w", outgoing(arrays), max_shard_bytes=100)
    return folder / "w.safetensors.index.json"


def reindexed(index: Path, **changes) -> None:
    content = json.loads(index.read_text())
    content["weight_map"] |= changes
    content["weight_map"] = {key: name for key, name in content["weight_map"].items() if name is not None}
    index.write_text(json.dumps(content))


SECOND = "w-00002-of-00002.safetensors"
INDEX_DAMAGE = {
    "missing shard": (lambda i: (i.parent / SECOND).unlink(), f"points to {SECOND}, which is missing"),
    "outside": (lambda i: reindexed(i, a="../w.safetensors"), "outside its own folder"),
    "absolute": (lambda i: reindexed(i, a="/etc/passwd"), "outside its own folder"),
    "no name": (lambda i: reindexed(i, a=7), "outside its own folder"),
    "a list": (lambda i: reindexed(i, a=["x"]), "outside its own folder"),
    "promised": (lambda i: reindexed(i, d=SECOND), "lacks d"),
    "not promised": (lambda i: reindexed(i, c=None), "c is in .*puts it in no file"),
    "elsewhere": (lambda i: reindexed(i, b="w-00001-of-00002.safetensors"), "b is in"),
    "no map": (lambda i: i.write_text("{}"), "no weight_map"),
    "map a list": (lambda i: i.write_text('{"weight_map": [["a", "b"]]}'), "no weight_map"),
    "no object": (lambda i: i.write_text("[]"), "no weight_map"),
    "no json": (lambda i: i.write_text("{"), "not JSON"),
    "deep nesting": (lambda i: i.write_text("[" * 200_000), "not JSON"),
}


@pytest.mark.parametrize("kind", INDEX_DAMAGE)
def test_a_damaged_index_is_named(kind, tmp_path):
    index = sharded(tmp_path)
    assert read_tensors(tmp_path, "w").keys() == {"a", "b", "c"}
    damage, message = INDEX_DAMAGE[kind]
    damage(index)
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path, "w")


def test_a_key_in_two_shards_is_named(tmp_path):
    sharded(tmp_path)
    first = tmp_path / "w-00001-of-00002.safetensors"
    (tmp_path / SECOND).write_bytes(first.read_bytes())
    with pytest.raises(UserError, match="a is both in"):
        read_tensors(tmp_path, "w")


def test_no_weights_at_all(tmp_path):
    with pytest.raises(UserError, match=r"has no weights: expected w\.safetensors"):
        read_tensors(tmp_path, "w")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BFLOAT16, DTYPES["F8_E5M2"], DTYPES["F8_E4M3"]])
def test_nan_and_infinity_are_found(dtype):
    array = np.full((3, 7), 1.5).astype(dtype)
    assert not has_nan_or_infinity(array)
    bad = [np.nan] if dtype == DTYPES["F8_E4M3"] else [np.nan, np.inf, -np.inf]
    for value in bad:
        array[2, 5] = value
        assert has_nan_or_infinity(array)
        assert has_nan_or_infinity(array.T)
    assert not has_nan_or_infinity(np.full(3, -1, np.int32))


def test_extremes_are_finite():
    for dtype in (np.float32, np.float16, BFLOAT16):
        limits = ml_dtypes.finfo(dtype)
        assert not has_nan_or_infinity(np.array([limits.max, limits.min, limits.smallest_subnormal, -0.0], dtype))
