"""The sampling program compiled for TPU slices that are not there, and what its memory is made of."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dit_jax.models.wan import WanConfig
from infer import tpu_memory
from infer.tpu_memory import (
    GIB,
    SIZES,
    TABLE,
    Case,
    abstract_request,
    copied_stacks,
    main,
    make_mesh,
    measure,
    parse_mesh,
)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'dit-jax[dev]'"
)
# The attention of the 1.3B: stacks too large for on-chip memory, and 12 heads, which are not whole tiles.
SMALL = WanConfig(
    blocks=30, width=1536, heads=12, head_width=128, mlp_width=512, text_width=128, in_channels=36, image_width=64
)
CASE = Case(model="small", topology="v5e-4", mesh="data=2,fsdp=2", size="128x96", frames=9)


@needs_libtpu
def test_the_sampling_program_compiles_for_tpu_with_one_copy_of_the_weights():
    """`measure` itself refuses a program without splash attention."""
    memory = measure(SMALL, CASE)
    model = abstract_request(SMALL, CASE.size, CASE.frames)[0].model
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
    assert memory.fits
    assert memory.copies == 0
    assert 0.5 * weights < memory.arguments < 0.6 * weights, "two chips share the weights"
    assert memory.temporaries < 0.1 * weights


@needs_libtpu
@pytest.mark.long
def test_a_plan_with_a_cache_holds_it_once():
    case = replace(CASE, size="512x256", frames=17, plan="hsa:75A")
    tokens = 5 * 16 * 32
    dense, cached = measure(SMALL, replace(case, plan="dense")), measure(SMALL, case)
    cache = 2 * 30 * 2 * tokens * 1536 * 2 // 4  # K and V of 30 blocks for two branches in bf16, over four chips
    assert cached.arguments - dense.arguments < 1.1 * cache
    assert cached.temporaries < dense.temporaries + 0.2 * cache


@needs_libtpu
def test_copies_of_stacked_weights_are_counted():
    model = abstract_request(SMALL, CASE.size, CASE.frames)[0].model
    mesh = make_mesh(parse_mesh(CASE.mesh), tpu_memory.tpu_devices(CASE.topology))
    part, whole = 30 * 768 * 12 * 128 * 2, 30 * 1536 * 512 * 2
    text = """
      %a = bf16[30,768,12,128]{3,1,2,0:T(8,128)(2,1)} parameter(3)
      %b = bf16[30,768,12,128]{1,3,2,0:T(8,128)(2,1)} copy(%a), metadata={}
      %c = bf16[1,768,12,128]{1,3,2,0:T(8,128)(2,1)} fusion(%a), kind=kLoop
      %f = bf16[30,768,12,128]{1,3,2,0:T(8,128)(2,1)S(1)} copy(%a), metadata={}
      %d = bf16[30,1536,512]{2,1,0:T(8,128)(2,1)} all-gather(%e), dimensions={1}
    """
    assert copied_stacks(text, model, mesh) == part + whole


def test_a_program_that_exceeds_hbm_is_reported_not_raised():
    message = "RESOURCE_EXHAUSTED: total memory required for HLO temporaries (120.00G) exceeds available HBM (15.75G)."
    memory = tpu_memory._over_capacity(RuntimeError(message), 3.0)
    assert not memory.fits and memory.peak == 120 * GIB
    assert "| 120.00 | 15.75 | no | 3 |" in tpu_memory.table_row(CASE, memory)
    with pytest.raises(RuntimeError, match="of another kind"):
        tpu_memory._over_capacity(RuntimeError("of another kind"), 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--topology h100-8", "unknown topology 'h100-8'"),
        ("--topology v5e-99", "unknown topology 'v5e-99'"),
        ("--size 830x480", "multiples of 16"),
        ("--size large", "expected WIDTHxHEIGHT"),
        ("--frames 80", "ask for 81"),
        ("--mesh rows=8", "'rows'"),
        pytest.param("--topology v5e-8 --mesh data=2", "needs 2 devices, found 8", marks=needs_libtpu),
        pytest.param("--topology v5e-8 --mesh tensor=8", "12 heads.*tensor=8", marks=needs_libtpu),
        pytest.param("--topology v5e:7x9 --mesh data=2", "cannot describe 'v5e:7x9'", marks=needs_libtpu),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(options, message, capsys):
    assert main(["--model", "wan2.1-t2v-1.3b", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def documented():
    """The rows of the table in docs/tpu.md, as lists of cells."""
    lines = (Path(__file__).parents[2] / "docs" / "tpu.md").read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| wan2.1")]


def test_the_documented_table_is_the_commands():
    rows = [tuple(cells[:4]) for cells in documented()]
    assert rows == [(model, f"{size}x81", topology, mesh) for model, topology, mesh in TABLE for size in SIZES]


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("cells", documented(), ids=lambda cells: " ".join(cells[:3]))
def test_a_published_model_takes_what_is_documented(cells, capsys):
    """The command prints the documented row (GiB within 3 % and 0.03, not the time): one copy of the weights."""
    model, video, topology, mesh, *expected = cells
    size, _, frames = video.rpartition("x")
    main(["--model", model, "--topology", topology, "--mesh", mesh, "--size", size, "--frames", frames])
    row = capsys.readouterr().out.splitlines()[-1]
    *found, fits, _ = (cell.strip() for cell in row.split("|")[5:-1])
    assert fits == expected[-2], row
    assert [float(x or 0) for x in found] == pytest.approx(
        [float(x or 0) for x in expected[:-2]], rel=0.03, abs=0.03
    ), row
    assert fits != "yes" or float(found[2]) == 0, row
