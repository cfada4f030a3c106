"""Native weights: Orbax's own defaults are read too, and damage is named."""

import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert.leaves import Leaf
from convert.native import read_native, write_native
from convert.tables import contiguous
from dit_jax.config import UserError

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((3, 4, 5)).astype(np.float32)
BIAS = RNG.standard_normal(7).astype(np.float16)


def written(folder):
    kernel = Leaf(KERNEL.shape, KERNEL.dtype, True, lambda block: KERNEL[block])
    write_native(folder, {"blocks.kernel": kernel, "bias": Leaf(BIAS.shape, BIAS.dtype, False, lambda block: BIAS)}, {})
    return folder


def test_round_trip_of_stacked_and_single_leaves(tmp_path):
    leaves = read_native(written(tmp_path / "params"))
    assert {name: (leaf.shape, leaf.dtype, leaf.stacked) for name, leaf in leaves.items()} == {
        "blocks.kernel": ((3, 4, 5), KERNEL.dtype, True),
        "bias": ((7,), BIAS.dtype, False),
    }
    np.testing.assert_array_equal(leaves["blocks.kernel"].block(1), KERNEL[1])
    np.testing.assert_array_equal(leaves["blocks.kernel"].block(None), KERNEL)
    part = (slice(1, 3), slice(None), slice(0, 2))
    np.testing.assert_array_equal(leaves["blocks.kernel"].rectangle(part), KERNEL[part])
    np.testing.assert_array_equal(leaves["bias"].rectangle((slice(2, 5),)), BIAS[2:5])


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_zarr3": True}])
def test_a_tree_that_orbax_saved_by_itself(options, tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(tmp_path / "params", args=ocp.args.PyTreeSave({"blocks": {"kernel": KERNEL}, "bias": BIAS}))
    leaves = read_native(tmp_path / "params")
    np.testing.assert_array_equal(leaves["blocks.kernel"].block(None), KERNEL)
    np.testing.assert_array_equal(leaves["blocks.kernel"].block(2), KERNEL[2])
    np.testing.assert_array_equal(leaves["bias"].block(None), BIAS)


DAMAGE = {
    "a block is missing": (lambda f: (f / "blocks.kernel" / "1.0.0").unlink(), "block 1 of blocks.kernel"),
    "a block is truncated": (
        lambda f: (f / "blocks.kernel" / "1.0.0").write_bytes(b"short"),
        "block 1 of blocks.kernel",
    ),
    "an array is missing": (lambda f: (f / "bias" / ".zarray").unlink(), "bias"),
    "the tree is missing": (lambda f: (f / "_METADATA").unlink(), "_METADATA is missing"),
    "the tree is damaged": (lambda f: (f / "_METADATA").write_text("{"), "damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind, tmp_path):
    folder = written(tmp_path / "params")
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        [leaf.block(None) for leaf in read_native(folder).values()]
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_nan_is_named(tmp_path):
    bad = KERNEL.copy()
    bad[2, 0, 0] = np.nan
    write_native(tmp_path / "params", {"blocks.kernel": Leaf(bad.shape, bad.dtype, True, lambda block: bad[block])}, {})
    leaf = read_native(tmp_path / "params")["blocks.kernel"]
    leaf.block(1)
    with pytest.raises(UserError, match=r"block 2 of blocks\.kernel holds NaN or infinite values"):
        leaf.block(None)


def test_a_failing_disk_is_an_oserror_that_names_the_leaf(largest_file, tmp_path):
    kernel = np.ones((2, 1 << 16), np.float32)
    leaf = Leaf(kernel.shape, kernel.dtype, True, lambda block: kernel[block])
    with largest_file(1 << 17), pytest.raises(OSError, match=r"cannot be written \(.*blocks\.kernel") as caught:
        write_native(tmp_path / "params", {"blocks.kernel": leaf}, {})
    assert str(tmp_path) in str(caught.value.filename) and "\n" not in str(caught.value)


def test_an_error_while_writing_comes_through(tmp_path):
    def read(block):
        raise UserError("the source is damaged")

    with pytest.raises(UserError, match="the source is damaged"):
        write_native(tmp_path / "params", {"blocks.kernel": Leaf(KERNEL.shape, KERNEL.dtype, True, read)}, {})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn", "int64"])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1), (0, 1, 2)])
def test_reordered_arrays_are_copied_bit_for_bit(dtype, order):
    bits = np.random.default_rng(0).integers(0, 256, (70, 3, 130, np.dtype(dtype).itemsize), np.uint8)
    view = bits.view(dtype)[..., 0].transpose(order)
    copied = contiguous(view)
    assert copied.flags.c_contiguous and copied.dtype == view.dtype
    np.testing.assert_array_equal(copied.view(np.uint8), np.array(view, order="C").view(np.uint8))
