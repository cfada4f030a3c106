"""The sampling program compiled for TPU slices that are not there, and what its memory is made of."""

import importlib.util
import math
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dit_jax.methods import plan as plans
from dit_jax.models.wan import WanConfig
from dit_jax.parameters import cast
from dit_jax.sharding import shardings
from infer import tpu_memory
from infer.program_costs import needed_bytes
from infer.random_pipeline import transformer_component
from infer.tpu_memory import (
    GIB,
    METHOD_COLUMNS,
    METHODS,
    MODEL_COLUMNS,
    Case,
    copied_stacks,
    main,
    make_mesh,
    measure,
    method_cases,
    model_cases,
    parse_mesh,
    plan_cell,
    table_header,
    table_row,
)
from infer.tpu_programs import config_of, plan_of

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'dit-jax[dev]'"
)
# The attention of the 1.3B: stacks too large for on-chip memory, and 12 heads, which are not whole tiles.
SMALL = transformer_component(
    WanConfig(
        blocks=30, width=1536, heads=12, head_width=128, mlp_width=512, text_width=128, in_channels=36, image_width=64
    )
)
CASE = Case(model="small", topology="v5e-4", mesh="data=2,fsdp=2", size="128x96", frames=9)
DOCUMENTED = replace(CASE, model="wan2.1-t2v-14b")


@needs_libtpu
def test_the_sampling_program_compiles_for_tpu_with_one_copy_of_the_weights():
    """`measure` itself refuses a program without splash attention."""
    memory = measure(SMALL, CASE)
    weights = sum(2 * math.prod(shape) for shape in SMALL.shapes.values())  # in bf16
    assert memory.fits
    assert memory.copies == 0
    assert 0.5 * weights < memory.arguments < 0.6 * weights, "two chips share the weights"
    assert memory.temporaries < 0.1 * weights


@needs_libtpu
def test_a_second_expert_takes_room_unless_it_is_offloaded():
    tiny = transformer_component(WanConfig(blocks=2, width=256, heads=2, mlp_width=384, text_width=64))
    case = replace(CASE, model="wan2.2-t2v-a14b", offload_expert=True)
    placed = shardings(
        tiny.abstract, tiny.axes, make_mesh(parse_mesh(case.mesh), tpu_memory.tpu_devices(case.topology))
    )
    weights = 0
    for leaf, sharding in zip(
        jax.tree.leaves(cast(tiny.abstract, tiny.precision(jnp.bfloat16))), jax.tree.leaves(placed), strict=True
    ):
        weights += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    one, two = measure(tiny, case), measure(tiny, replace(case, offload_expert=False))
    assert (two.arguments - one.arguments, two.peak - one.peak) == (weights, weights)


def test_one_transformer_has_no_expert_to_offload(capsys):
    assert main(["--model", "wan2.1-t2v-14b", "--offload-expert"]) == 2
    assert "wan2.1-t2v-14b has no second expert" in capsys.readouterr().err


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
    mesh = make_mesh(parse_mesh(CASE.mesh), tpu_memory.tpu_devices(CASE.topology))
    part, whole = 30 * 768 * 12 * 128 * 2, 30 * 1536 * 512 * 2
    text = """
      %a = bf16[30,768,12,128]{3,1,2,0:T(8,128)(2,1)} parameter(3)
      %b = bf16[30,768,12,128]{1,3,2,0:T(8,128)(2,1)} copy(%a), metadata={}
      %c = bf16[1,768,12,128]{1,3,2,0:T(8,128)(2,1)} fusion(%a), kind=kLoop
      %f = bf16[30,768,12,128]{1,3,2,0:T(8,128)(2,1)S(1)} copy(%a), metadata={}
      %d = bf16[30,1536,512]{2,1,0:T(8,128)(2,1)} all-gather(%e), dimensions={1}
    """
    assert copied_stacks(text, SMALL, mesh) == part + whole


def test_a_program_that_exceeds_hbm_is_reported_not_raised():
    message = "RESOURCE_EXHAUSTED: total memory required for HLO temporaries (120.00G) exceeds available HBM (15.75G)."
    peak = needed_bytes(RuntimeError(message))
    assert peak == 120 * GIB
    memory = tpu_memory.Memory(peak=peak, kept=7 * GIB, seconds=3.0, fits=False)
    assert "| 120.00 | 15.75 | no | 3 |" in table_row(MODEL_COLUMNS, DOCUMENTED, memory)
    assert "| data=2,fsdp=2 | 7.00 | | | | 120.00 |".replace("| |", "|  |").replace("| |", "|  |") in table_row(
        METHOD_COLUMNS, DOCUMENTED, memory
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--topology h100-8", "unknown topology 'h100-8'"),
        ("--topology v5e-99", "unknown topology 'v5e-99'"),
        ("--size 830x480", "multiples of 16"),
        ("--size large", "expected WIDTHxHEIGHT"),
        ("--frames 80", "ask for 81"),
        ("--mesh rows=8", "'rows'"),
        ("--heads 1", "--heads is 1.0"),
        ("--plan hsa:50+coredit:0.3", "coredit and hsa cannot share a plan"),
        ("--plan magcache:0.1", "expected ratios=FILE.json"),
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


def test_the_table_of_methods_has_every_method_on_every_slice():
    for on in METHODS:
        rows = [case for case in method_cases() if (case.model, case.topology) == (on["model"], on["topology"])]
        named = {method.name for case in rows for method in plan_of(config_of(case), case.plan).methods}
        assert named == set(plans.METHODS)
        assert [plan_cell(case) for case in rows[:2]] == ["dense", "dense --heads 0.3 --ffn 0.3"]
        assert [plan_cell(case) for case in rows if case.plan == "ddit"] == ["ddit at p", "ddit at 2p", "ddit at 4p"]


def documented(columns):
    """The rows of the table with these columns in docs/tpu.md, each as a dict of its cells."""
    text = (Path(__file__).parents[2] / "docs" / "tpu.md").read_text()
    rows = text.partition(table_header(columns))[2].partition("\n\n")[0].strip().splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    return [dict(zip(columns, row, strict=True)) for row in cells]


def of_methods(row):
    """The program of a row of the table of methods."""
    wanted = (row["model"], row["plan"], row["slice"], row["mesh"])
    return next(case for case in method_cases() if (case.model, plan_cell(case), case.topology, case.mesh) == wanted)


def compared():
    """(row, its program) of both tables: all models, on one slice FLUX's methods and Wan's that keep most."""
    methods = [(row, of_methods(row)) for row in documented(METHOD_COLUMNS) if row["slice"] == "v5p-8"]
    most = ("hsa:50", "taylorseer")
    few = [(row, case) for row, case in methods if case.model == "flux.1-dev" or case.plan in most]
    return [*zip(documented(MODEL_COLUMNS), model_cases(), strict=True), *few]


def test_the_documented_tables_are_the_commands():
    models = [(row["model"], row["video"], row["slice"], row["mesh"]) for row in documented(MODEL_COLUMNS)]
    assert models == [(case.model, f"{case.size}x81", case.topology, case.mesh) for case in model_cases()]
    assert [of_methods(row) for row in documented(METHOD_COLUMNS)] == method_cases()


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize(("row", "case"), compared())
def test_a_published_model_takes_what_is_documented(row, case):
    """A new compilation gives the documented row (GiB within 3 % and 0.03, not the time): one copy of the weights."""
    memory = measure(transformer_component(config_of(case)), case)
    columns = tuple(row)
    cells = (cell.strip() for cell in table_row(columns, case, memory).split("|")[1:-1])
    found = dict(zip(columns, cells, strict=True))
    assert found["fits"] == row["fits"]
    sizes = [name for name in columns if name in ("kept", "arguments", "temporaries", "weights copied", "peak")]
    expected = [float(row[name] or 0) for name in sizes]
    assert [float(found[name] or 0) for name in sizes] == pytest.approx(expected, rel=0.03, abs=0.03), found
    assert not memory.copies
