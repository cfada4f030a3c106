"""dit-plan: what is told of a recipe's step and of sampling on a described slice."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.flops import weight_bytes
from dit_jax.models.wan import WanConfig
from infer.chips import CHIPS, GIB
from train import plan

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'dit-jax[dev]'"
)
SMALL = ["--set", "model=demo-wan", "--set", "size=128x128", "--set", "frames=17", "--set", "batch=4"]


@needs_libtpu
def test_a_recipes_step_is_compiled_and_told(capsys):
    words = ["finetune", "--topology", "v5e:2x2", "--mesh", "data=2,fsdp=2", *SMALL]
    assert plan.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and 0 < told["peak_bytes"] < told["capacity_bytes"] == int(15.75 * GIB)
    # Of 3.2 M weights that 320 tokens of 4 samples pass, forward, again, and twice backward; attention besides.
    assert told["flops"] > 8 * 3.0e6 * 320 * 4 / 4
    assert told["floor_seconds"] == max(told[f"{what}_seconds"] for what in ("compute", "memory", "network"))
    assert told["sent_bytes"]["all-gather"] > 0
    found = plan.Report(**told)
    assert "finetune demo-wan: fits" in plan.told(found)
    assert found.tokens_per_second == pytest.approx(4 * 320 / found.floor_seconds)


@needs_libtpu
@pytest.mark.long
def test_several_slices_talk_over_the_network(capsys):
    words = ["finetune", "--topology", "v5e:2x2", "--slices", "2", "--mesh", "data=2,fsdp=4", *SMALL]
    assert plan.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["slices"], told["chips"]) == (2, 8)
    # Of two slices each sends half of its share of the gradients of 3.0 M weights at least, in bf16.
    assert told["sent_bytes"]["all-reduce between slices"] > 3.0e6 / 4


@needs_libtpu
@pytest.mark.long
def test_a_sampling_plan_is_compiled_and_told(capsys):
    words = ["wan2.1-t2v-1.3b", "--topology", "v5e:2x2", "--plan", "hsa:50", "--size", "128x128", "--frames", "5"]
    assert plan.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["what"] == "wan2.1-t2v-1.3b hsa:50" and told["fits"]
    # 1.3e9 weights in bf16 on four chips, a quarter on each.
    assert 1.3e9 * 2 / 4 < told["arguments"] < 1.6e9 * 2 / 4
    assert told["tokens_per_second"] > 0


SLICE = plan.Target(topology="v5e:2x2", slices=1, mesh="data=4")


def doubled(rows, donated=False):
    """Of a program that doubles so many rows of 16 KiB on each of four chips."""
    mesh = SLICE.built()
    shape = jax.ShapeDtypeStruct((4 * rows, 4096), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    traced = jax.jit(lambda x: 2 * x, donate_argnums=(0,) * donated).trace(shape)
    return plan.report(plan.Subject(what="x", traced=traced, tokens=10, flops=4e6), SLICE, mesh)


@needs_libtpu
@pytest.mark.parametrize("donated", [False, True])
def test_what_a_program_takes_of_a_chip(donated):
    found, size = doubled(1024, donated), 1024 * 4096 * 4
    assert found.fits and found.arguments == size and found.moved_bytes == 2 * size
    assert found.peak_bytes == found.temporaries + (1 if donated else 2) * size
    assert found.memory_seconds == 2 * size / CHIPS["v5e"].hbm == found.floor_seconds
    assert found.compute_seconds == 1e6 / CHIPS["v5e"].flops and found.network_seconds == 0
    assert found.tokens_per_second == 10 / found.floor_seconds and found.intensity == 1e6 / (2 * size)


@needs_libtpu
def test_a_program_that_does_not_fit_says_by_how_much(capsys, monkeypatch):
    found, size = doubled(2**20), 2**34
    assert not found.fits and found.arguments is None and found.moved_bytes is None
    assert 2 * size <= found.peak_bytes < 2.1 * size
    monkeypatch.setattr(plan, "of_recipe", lambda name, settings, target: found)
    assert plan.main(["finetune", "--topology", "v5e:2x2"]) == 1
    assert f"short by {(found.peak_bytes - 15.75 * GIB) / GIB:.2f} GiB a chip" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["wan2.1-t2v-14b", "--offload-expert"], ["finetune", "--offload-expert"]])
def test_only_two_experts_are_offloaded(words, capsys):
    assert plan.main([*words, "--topology", "v5e:2x2"]) == 2
    assert "--offload-expert" in capsys.readouterr().err


@needs_libtpu
def test_both_experts_of_a_sampled_model_are_counted(capsys, monkeypatch):
    tiny = WanConfig(blocks=2, width=256, heads=2, mlp_width=384, text_width=64)
    monkeypatch.setitem(plan.PRESETS, "wan2.2-t2v-a14b", tiny)
    words = ["wan2.2-t2v-a14b", "--topology", "v5e:2x2", "--size", "128x128", "--frames", "5", "--json"]
    found = []
    for more in ([], ["--offload-expert"]):
        assert plan.main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    two, one = found
    assert two["arguments"] - one["arguments"] == two["peak_bytes"] - one["peak_bytes"] > weight_bytes(tiny, 2) / 4
    assert two["moved_bytes"] == one["moved_bytes"]


def test_what_does_not_fit_says_by_how_much():
    report = plan.Report(
        what="x", topology="v5e:2x2", slices=2, mesh="data=8", chips=8, fits=False, peak_bytes=20 * GIB,
        capacity_bytes=15 * GIB, flops=1e12, arguments=None, temporaries=None, moved_bytes=None, sent_bytes={},
        compute_seconds=1.0, memory_seconds=0.0, network_seconds=0.0, floor_seconds=1.0, tokens_per_second=5.0,
        compile_seconds=3.0,
    )  # fmt: skip
    assert "x: does not fit, short by 5.00 GiB a chip" in plan.told(report)
    assert "2 x v5e:2x2, 8 chips" in plan.told(report)


def test_every_number_is_told():
    report = plan.Report(
        what="x", topology="v5p:2x2x1", slices=1, mesh="fsdp=4", chips=4, fits=True, peak_bytes=30 * GIB,
        capacity_bytes=95 * GIB, flops=4e14, arguments=20 * GIB, temporaries=10 * GIB, moved_bytes=int(2e12),
        sent_bytes={"all-gather": 3 * GIB, "reduce-scatter": GIB}, compute_seconds=0.9, memory_seconds=0.7,
        network_seconds=0.1, floor_seconds=0.9, tokens_per_second=54321.0, compile_seconds=3.0,
    )  # fmt: skip
    told = plan.told(report)
    for words in (
        "x: fits",
        "v5p:2x2x1, 4 chips, fsdp=4",
        "30.00 GiB of 95.00 GiB",
        "arguments 20.00 GiB, temporaries 10.00 GiB",
        "4.000e+14, 200 FLOPs a byte of HBM",
        "all-gather 3.00 GiB, reduce-scatter 1.00 GiB",
        "0.900 s (compute 0.900, memory 0.700, network 0.100)",
        "54,321 a second",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["finetune", "--topology", "v9x:2x2"], "unknown topology 'v9x:2x2'"),
        (["finetune", "--topology", "v5e:2x2", "--mesh", "data=3"], "mesh data=3 needs 3 devices, found 4"),
        (["demo_text", "--topology", "v5e:2x2"], "has no `training"),
        (["finetun", "--topology", "v5e:2x2"], "did you mean finetune"),
        (["finetune", "--topology", "v5e:2x2", "--set", "bach=4"], "did you mean 'batch'"),
        (
            ["finetune", "--topology", "v5e:2x2", "--mesh", "data=4", *SMALL[:-1], "batch=6"],
            "does not divide over data=4",
        ),
        (
            ["finetune", "--topology", "v5e:2x2", "--remat", "full", *SMALL],
            "remat is 'full', expected one of none, blocks",
        ),
        (["finetune", "--topology", "v5e:4x4", "--mesh", "tensor=16", *SMALL], "8 heads (blocks"),
        (["wan2.1-t2v-1.3b", "--topology", "v5e:2x2", "--plan", "hsa:99"], "hsa"),
    ],
)
@needs_libtpu
def test_bad_input_is_one_sentence(capsys, words, expected):
    assert plan.main(words) == 2
    told = capsys.readouterr().err
    assert expected in told and told.count("\n") == 1
