"""The sampling program compiled for TPU slices that are not there, and what its memory is made of."""

import importlib.util
import json
import re

import jax
import pytest

from dit_jax.models import wan
from dit_jax.models.wan import WanConfig
from infer import tpu_memory
from infer.tpu_memory import GIB, Case, abstract_request, copied_stacks, main, make_mesh, measure, parse_mesh

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'dit-jax[dev]'"
)
# Heads of 128 as in the published models; 12 of them are not whole tiles, as in the 1.3B.
SMALL = WanConfig(
    blocks=5, width=384, heads=12, head_width=128, mlp_width=1024, text_width=128, in_channels=36, image_width=64
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
    assert memory.peak < 0.02 * 15.75 * GIB


@needs_libtpu
def test_copies_of_stacked_weights_are_counted():
    model = abstract_request(SMALL, CASE.size, CASE.frames)[0].model
    mesh = make_mesh(parse_mesh(CASE.mesh), tpu_memory.tpu_devices(CASE.topology))
    part, whole = 5 * 192 * 12 * 128 * 2, 5 * 384 * 1024 * 2
    text = """
      %a = bf16[5,192,12,128]{3,1,2,0:T(8,128)(2,1)} parameter(3)
      %b = bf16[5,192,12,128]{1,3,2,0:T(8,128)(2,1)} copy(%a), metadata={}
      %c = bf16[1,192,12,128]{1,3,2,0:T(8,128)(2,1)} fusion(%a), kind=kLoop
      %f = bf16[5,192,12,128]{1,3,2,0:T(8,128)(2,1)S(1)} copy(%a), metadata={}
      %d = bf16[5,384,1024]{2,1,0:T(8,128)(2,1)} all-gather(%e), dimensions={1}
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


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "topology", "mesh", "size", "limit"),
    [
        ("wan2.1-t2v-1.3b", "v5e-8", "data=2,fsdp=4", "832x480", 2),
        ("wan2.1-t2v-14b", "v5p-8", "data=2,fsdp=2", "832x480", 17),
        ("wan2.1-t2v-14b", "v6e-8", "data=2,fsdp=4", "1280x720", 16),
        ("wan2.1-i2v-14b", "v5e-8", "fsdp=4,tensor=2", "832x480", 8),
    ],
)
def test_published_models_fit(model, topology, mesh, size, limit, capsys):
    """Within `limit` GiB a chip, without a second copy of any stacked weight."""
    assert main(["--model", model, "--topology", topology, "--mesh", mesh, "--size", size, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["copies"] == 0
    assert found["peak"] < limit * GIB


def test_the_table_names_programs_that_exist():
    for model, topology, mesh in tpu_memory.TABLE:
        assert model in wan.PRESETS and topology in tpu_memory.SLICES and parse_mesh(mesh)
