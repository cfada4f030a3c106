"""Native blocks that are cut into parts: the same values for everybody, and a part is read without the others."""

import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert import native
from convert.leaves import Leaf
from convert.native import read_native, write_native
from dit_jax.config import UserError

RNG = np.random.default_rng(0)
ARRAYS = {
    "blocks.up": RNG.standard_normal((3, 5, 24)).astype(np.float32),
    "blocks.q": RNG.standard_normal((3, 5, 4, 6)).astype(np.float16),
    "blocks.o": RNG.standard_normal((3, 4, 6, 10)).astype(np.float32),
    "blocks.bias": RNG.standard_normal((3, 24)).astype(np.float32),
    "out": RNG.standard_normal((6, 16)).astype(np.float32),
    "scale": np.float32(3.5).reshape(()),
}
AXES = {
    "blocks.up": ("blocks", "embed", "mlp"),
    "blocks.q": ("blocks", "embed", "heads", None),
    "blocks.o": ("blocks", "heads", None, "embed"),
    "blocks.bias": ("blocks", "mlp"),
    "out": (None, "mlp"),
    "scale": (),
}
CHUNKS = {
    "blocks.up": (1, 5, 3),
    "blocks.q": (1, 5, 1, 6),
    "blocks.o": (1, 4, 6, 5),
    "blocks.bias": (1, 24),  # a slice of a block's first axis lies together anyway
    "out": (6, 2),
    "scale": (),
}


def written(folder, smallest, monkeypatch):
    monkeypatch.setattr(native, "SMALLEST_PART", smallest)
    leaves = {
        name: Leaf(array.shape, array.dtype, name.startswith("blocks"), lambda block, array=array: array[block])
        if name.startswith("blocks")
        else Leaf(array.shape, array.dtype, False, lambda block, array=array: array)
        for name, array in ARRAYS.items()
    }
    write_native(folder, leaves, AXES)
    return folder


@pytest.fixture
def cut(tmp_path, monkeypatch):
    return written(tmp_path / "params", 16, monkeypatch)


def test_blocks_are_cut_along_their_last_sharded_axis(cut):
    arrays = {name: native.ts.open(native._read_spec(cut, name, "zarr"), open=True).result() for name in ARRAYS}
    assert {name: tuple(array.chunk_layout.read_chunk.shape or ()) for name, array in arrays.items()} == CHUNKS


def test_small_blocks_are_left_whole(tmp_path, monkeypatch):
    folder = written(tmp_path / "params", 1 << 20, monkeypatch)
    assert len([file for file in (folder / "blocks.up").iterdir() if not file.name.startswith(".")]) == 3


def test_whole_blocks_and_rectangles_are_the_same(cut):
    leaves = read_native(cut)
    assert {name: leaf.stacked for name, leaf in leaves.items()} == {n: n.startswith("blocks") for n in ARRAYS}
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf.block(None), ARRAYS[name])
        assert leaf.dtype == ARRAYS[name].dtype
    for _ in range(30):
        for name, leaf in leaves.items():
            ends = [sorted(RNG.choice(size + 1, 2, replace=False)) for size in leaf.shape]
            part = tuple(slice(int(start), int(stop)) for start, stop in ends)
            np.testing.assert_array_equal(leaf.rectangle(part), ARRAYS[name][part], err_msg=f"{name} {part}")
            np.testing.assert_array_equal(leaf.cast(np.dtype(np.float64)).rectangle(part), ARRAYS[name][part])


def test_orbax_reads_them_by_itself(cut):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        tree = checkpointer.restore(cut)
    np.testing.assert_array_equal(tree["blocks"]["o"], ARRAYS["blocks.o"])
    np.testing.assert_array_equal(tree["out"], ARRAYS["out"])


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"short")])
def test_damage_in_a_part_is_named_and_other_parts_are_read(damage, cut):
    damage(cut / "blocks.up" / "1.0.7")
    leaf = read_native(cut)["blocks.up"]
    part = (slice(0, 3), slice(0, 5), slice(0, 21))
    np.testing.assert_array_equal(leaf.rectangle(part), ARRAYS["blocks.up"][part])
    with pytest.raises(UserError, match=r"block 1 of blocks\.up cannot be read"):
        leaf.rectangle((slice(0, 3), slice(0, 5), slice(12, 24)))


def test_nan_in_what_is_read_is_named(tmp_path):
    bad = ARRAYS["blocks.up"].copy()
    bad[2, 4, 23] = np.nan
    leaf = Leaf(bad.shape, bad.dtype, True, lambda block: bad[block])
    write_native(tmp_path / "params", {"blocks.up": leaf}, AXES)
    read = read_native(tmp_path / "params")["blocks.up"]
    read.rectangle((slice(0, 3), slice(0, 4), slice(0, 24)))
    with pytest.raises(UserError, match=r"block 2 of blocks\.up holds NaN or infinite values"):
        read.rectangle((slice(0, 3), slice(4, 5), slice(0, 24)))
