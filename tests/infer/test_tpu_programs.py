"""Abstract sampling programs: what they are told, what methods keep, and one compiled for a TPU that is not there."""

import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from dit_jax.config import UserError
from dit_jax.flops import Shape
from dit_jax.methods.patch_adapters import AXES as ADAPTER_AXES
from dit_jax.models.flux import FLUX_DEV, FluxConfig
from dit_jax.models.wan import WAN_14B, WanConfig
from dit_jax.parameters import named_leaves
from dit_jax.sharding import logical_axes, make_mesh, parse_mesh
from infer.chips import tpu_devices
from infer.random_pipeline import transformer_component
from infer.tpu_memory import measure
from infer.tpu_programs import Case, abstract_parts, abstract_request, config_of, plan_of, trace

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'dit-jax[dev]'"
)
WAN = transformer_component(WanConfig(blocks=2, width=256, heads=2, mlp_width=384, text_width=64))
FLUX = transformer_component(
    FluxConfig(double_blocks=3, single_blocks=2, width=256, heads=2, mlp_width=384, text_width=64, pooled_width=32)
)
ON_WAN = Case(model="wan2.1-t2v-14b", topology="v5e-4", mesh="data=2,fsdp=2", size="240x176", frames=9)
ON_FLUX = Case(model="flux.1-dev", topology="v5e-4", mesh="fsdp=2,context=2", size="240x176", frames=1)


def mesh_of(case):
    return make_mesh(parse_mesh(case.mesh), tpu_devices(case.topology))


def test_flux_is_told_its_guidance_in_one_row():
    guided, latents = abstract_request(transformer_component(FLUX_DEV), "1024x1024", 1)
    told = guided.conditioning
    assert latents.shape == (1, 1, 128, 128, 16) and latents.dtype == jnp.float32
    assert (told.text.shape, told.pooled.shape, told.guidance.shape) == ((1, 512, 4096), (1, 768), (1,))
    assert guided.branches == 1 and guided.extra is None
    assert {leaf.dtype for leaf in jax.tree.leaves(guided.model)} == {jnp.dtype(jnp.bfloat16)}


def test_wan_is_guided_in_two_rows():
    guided, latents = abstract_request(transformer_component(WAN_14B), "832x480", 81)
    assert latents.shape == (1, 21, 60, 104, 16)
    assert guided.conditioning.text.shape == (2, 512, 4096) and guided.conditioning.pooled is None
    assert guided.branches == 2
    leaves = dict(named_leaves(guided.model))
    assert leaves["time.up.kernel"].dtype == jnp.float32 and leaves["blocks.mlp.up.kernel"].dtype == jnp.bfloat16


def test_a_model_of_images_makes_no_video():
    with pytest.raises(UserError, match="9 frames do not fit: expected 1"):
        abstract_request(FLUX, "240x176", 9)


def test_pruned_widths_are_those_of_dit_prune():
    pruned = {"heads": 0.3, "ffn": 0.3}
    wan = config_of(replace(ON_WAN, **pruned))
    assert (wan.heads, wan.mlp_width, wan.width, wan.norm_counts_pruned) == (28, 9728, 5120, True)
    flux = config_of(replace(ON_FLUX, **pruned))
    assert (flux.heads, flux.mlp_width, flux.width) == (17, 8576, 3072)
    assert config_of(ON_WAN) == WAN_14B and config_of(ON_FLUX) == FLUX_DEV


@pytest.mark.parametrize("component", [WAN, FLUX], ids=["wan", "flux"])
def test_parts_are_what_the_methods_ask_for(component):
    parts = abstract_parts(component)
    stacks = component.abstract.stacks
    for text in ("routing", "ddit", "magcache"):
        plan_of(component.config, text).check(stacks, parts)
    assert parts["router"].leaves["out.bias"].shape == (sum(stacks),)
    assert parts["router"].settings["content"] == ("pooled" if component is FLUX else "latents")
    for name, leaf in parts["ddit"].leaves.items():
        assert len(logical_axes(name, ADAPTER_AXES)) == leaf.ndim


def test_magcache_alone_has_ratios_for_every_step():
    (magcache,) = plan_of(FLUX_DEV, "magcache").methods
    assert magcache.steps == 28 and plan_of(WAN_14B, "magcache").steps == 50


@needs_libtpu
@pytest.mark.parametrize("plan", ["dense", "hsa:75A", "magcache", "taylorseer"])
def test_what_a_method_keeps_is_counted(plan):
    """On four chips, against the method's own arithmetic; padding and what is of a token's size come on top."""
    shape = Shape(tokens=3 * 11 * 15, text=512, branches=2, itemsize=2)
    expected = sum(method.kept_bytes(WAN.config, shape) for method in plan_of(WAN.config, plan).methods)
    kept = 4 * trace(WAN, replace(ON_WAN, plan=plan), mesh_of(ON_WAN)).kept
    padded = 512 / shape.tokens
    assert expected <= kept / padded * 1.001 and kept <= 1.2 * padded * expected


@needs_libtpu
@pytest.mark.parametrize(
    ("component", "plan", "message"),
    [
        (FLUX, "teacache:0.1:model=wan2.1-t2v-14b", "not for this model"),
        (WAN, "routing:min=3:max=9", "3 to 9 blocks of a model of 2"),
        (WAN, "ddit:2p@0-99", "the last of 50 steps"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_it_is_lowered(component, plan, message):
    case = ON_FLUX if component is FLUX else ON_WAN
    with pytest.raises(UserError, match=message):
        trace(component, replace(case, plan=plan), mesh_of(case))


@needs_libtpu
def test_each_patch_size_has_a_program_of_its_own():
    cases = [replace(ON_WAN, frames=17, plan="ddit", variant=size) for size in (1, 2, 4)]
    texts = [trace(WAN, case, mesh_of(case)).traced.lower().as_text() for case in cases]
    # Tokens of a branch, in whole lanes of 128 on each of the two chips that share them.
    assert ["tensor<2x1024x256xbf16>" in text for text in texts] == [True, False, False]
    assert ["tensor<2x256x256xbf16>" in text for text in texts] == [False, True, True]
    assert ["x32xf32>" in text for text in texts] == [False, True, True], "low-rank maps of rank 32"


@needs_libtpu
def test_a_plan_with_parts_compiles_for_tpu():
    memory = measure(FLUX, replace(ON_FLUX, plan="ddit+routing+coredit:0.45", variant=2))
    assert memory.fits and not memory.copies
    assert 0 < memory.arguments < memory.peak
