"""The arithmetic of `dit_jax/flops.py` against the matrix products that a traced program holds, and XLA's count."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dit_jax.flops import (
    BlockWork,
    Cost,
    Shape,
    StepAt,
    StepWork,
    attention_cost,
    block_counts,
    dense_work,
    plan_cost,
    plan_memory,
    step_cost,
    weight_bytes,
)
from dit_jax.methods.coredit import Coredit
from dit_jax.methods.hsa import PRESETS, KeysValues, Prefix
from dit_jax.methods.plan import parse_plan
from dit_jax.models.flux import FLUX_DEV, Flux, FluxConfig
from dit_jax.models.network import Aux, Conditioning, NetworkCall, Route, State, Tokens, TokenTimesteps, network
from dit_jax.models.wan import WAN_1_3B, WAN_14B, Wan, WanConfig
from dit_jax.parameters import named_leaves
from infer.program_costs import matmul_flops

WAN = WanConfig(
    blocks=3, width=48, heads=4, head_width=12, mlp_width=80, in_channels=5, out_channels=4, text_width=11,
    time_frequencies=8,
)  # fmt: skip
FLUX = FluxConfig(
    double_blocks=2, single_blocks=3, width=32, heads=4, head_width=8, mlp_width=52, in_channels=4, out_channels=4,
    text_width=11, pooled_width=9, time_frequencies=8, rope_widths=(2, 2, 4),
)  # fmt: skip
IMAGE = replace(WAN, image_width=14)
CASES = {
    "wan": (WAN, Shape(tokens=45, text=7, samples=2, branches=2)),
    "pruned": (replace(WAN, heads=3, mlp_width=56), Shape(tokens=45, text=7)),
    "image-to-video": (IMAGE, Shape(tokens=30, text=7, image=9, samples=2)),
    "first-and-last-frame": (replace(IMAGE, image_positions=10), Shape(tokens=30, text=7, image=10, samples=2)),
    "held": (WAN, Shape(tokens=45, text=7, samples=3, timesteps=2)),
    "flux": (FLUX, Shape(tokens=35, text=7, samples=2, branches=2)),
    "schnell": (replace(FLUX, guidance=False), Shape(tokens=35, text=6)),
}


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def arguments(config, shape: Shape, tokens: int | None = None):
    """Model, tokens, timesteps and conditioning of a network call, all abstract."""
    model = nnx.eval_shape(lambda: (Wan if isinstance(config, WanConfig) else Flux)(config, nnx.Rngs(0)))
    rows, tokens = shape.rows, tokens or shape.tokens
    patches = Tokens(abstract(rows, tokens, 4 * config.in_channels), abstract(rows, tokens, 3), None)
    t = abstract(rows)
    if shape.timesteps > 1:
        t = TokenTimesteps(abstract(rows, shape.timesteps), abstract(rows, tokens, dtype=jnp.int32))
    text = abstract(rows, shape.text, config.text_width)
    if isinstance(config, FluxConfig):
        pooled, guidance = abstract(rows, config.pooled_width), abstract(rows) if config.guidance else None
        return model, patches, t, Conditioning(text, pooled=pooled, guidance=guidance)
    image = None
    if config.image_width:
        images = 2 if config.image_positions else 1
        image = abstract(images * rows, shape.image // images, config.image_width)
    return model, patches, t, Conditioning(text, image)


def plain(model, tokens, t, told):
    return network(model, NetworkCall(), tokens, t, told)[0]


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_programs_products(name):
    config, shape = CASES[name]
    jaxpr = jax.make_jaxpr(plain)(*arguments(config, shape)).jaxpr
    assert step_cost(config, shape, dense_work(config, shape)).flops == matmul_flops(jaxpr)


@pytest.mark.parametrize("config", [WAN, FLUX], ids=["wan", "flux"])
def test_a_step_of_hsa_projects_what_is_due_and_attends_all(config):
    shape, due = Shape(tokens=40, text=7, branches=2), 10
    keys = abstract(sum(block_counts(config)), shape.rows, config.heads, 1, shape.tokens, config.head_width)

    def refreshed(model, tokens, t, told, cache):
        return network(model, NetworkCall(attention=Prefix(1, due)), tokens, t, told, State(attention=cache))[0]

    jaxpr = jax.make_jaxpr(refreshed)(*arguments(config, shape, due), KeysValues(keys, keys)).jaxpr
    hsa = replace(PRESETS["50"], shares=(0.25, 0.75))
    inside = StepAt(hsa.margin + 1, hsa.steps, 0, {})
    assert step_cost(config, shape, hsa.step_work(dense_work(config, shape), inside)).flops == matmul_flops(jaxpr)


def test_a_block_that_is_skipped_costs_nothing():
    shape = Shape(tokens=45, text=7)

    def routed(model, tokens, t, told):
        routes = (Route(jnp.arange(3), jnp.int32(2)),)
        return network(model, NetworkCall(), tokens, t, told, aux=Aux(routes=routes))[0]

    jaxpr = jax.make_jaxpr(routed)(*arguments(WAN, shape)).jaxpr
    work = dense_work(WAN, shape)
    skipping = work._replace(blocks=(work.blocks[0], work.blocks[1]._replace(share=0.0), work.blocks[2]))
    assert step_cost(WAN, shape, skipping).flops == matmul_flops(jaxpr, trips=2)
    assert step_cost(WAN, shape, work).flops == matmul_flops(jaxpr, trips=3)


def test_pruned_tokens_and_larger_patches_by_hand():
    shape, block = Shape(tokens=10, text=3), BlockWork(10, 10, 10)
    dense = step_cost(WAN, shape, StepWork(10, 1, (block,)))
    pruned = step_cost(WAN, shape, StepWork(10, 1, (block._replace(projected=6, keys=6),)))
    # Four tokens of four projections less, and 6 x 6 scores and mixtures in place of 10 x 10.
    assert dense.flops - pruned.flops == 2 * 4 * 4 * 48 * 48 + 4 * 48 * (100 - 36)
    larger = step_cost(WAN, shape, StepWork(2.5, 4, (block,)))
    assert larger.flops == dense.flops, "a quarter of the tokens, each of four patches"


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (
            replace(WAN_1_3B, blocks=1, width=512, heads=4, mlp_width=2048, text_width=64),
            Shape(tokens=256, text=128),
        ),
        (
            replace(FLUX_DEV, double_blocks=1, single_blocks=1, width=512, heads=4, mlp_width=2048, text_width=64),
            Shape(tokens=192, text=64),
        ),
    ],
    ids=["wan", "flux"],
)
def test_xla_counts_within_two_percent(config, shape):
    """One block and one turn of attention: XLA counts a loop's body once."""
    counted = jax.jit(plain).lower(*arguments(config, shape)).cost_analysis()["flops"]
    assert counted == pytest.approx(step_cost(config, shape, dense_work(config, shape)).flops, rel=0.02)


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_attention_alone_is_a_steps_cost_without_the_rest(name):
    config, shape = CASES[name]
    work = dense_work(config, shape)
    fewer = work.in_blocks(lambda block: block._replace(projected=20, keys=30))
    saved = step_cost(config, shape, work).flops - step_cost(config, shape, fewer).flops
    assert saved == attention_cost(config, shape, work).flops - attention_cost(config, shape, fewer).flops > 0
    none = work.in_blocks(lambda block: block._replace(share=0.0))
    assert attention_cost(config, shape, none) == Cost()
    run = plan_cost(config, shape, (), 3, of_step=attention_cost)
    assert run.flops == 3 * attention_cost(config, shape, work).flops < plan_cost(config, shape, (), 3).flops


def test_a_run_is_the_sum_of_its_steps():
    shape = Shape(tokens=100, text=7)
    [hsa] = parse_plan("hsa:75A").methods
    step = step_cost(WAN, shape, dense_work(WAN, shape))
    assert plan_cost(WAN, shape, (), 8).flops == pytest.approx(8 * step.flops)
    cost = plan_cost(WAN, shape, (hsa,), 40)
    expected = Cost()
    for index in range(40):
        due = StepAt(index, 40, 0, {})
        expected += step_cost(WAN, shape, hsa.step_work(dense_work(WAN, shape), due))
    assert cost.flops == pytest.approx(expected.flops) and cost.weights == 40 * step.weights
    restarted = plan_cost(WAN, shape, (hsa,), 40, stages={0: "transformer", 21: "transformer_2"})
    assert restarted.flops > cost.flops, "the first step of a stage refreshes all"


def test_an_expert_skips_by_its_own_ratios():
    shape = Shape(tokens=100, text=7)
    coredit = Coredit(ratios=(0.5,), experts=(("transformer_2", (0.2,)),), late_share=0)

    def flops(method, stages=None):
        return plan_cost(WAN, shape, (method,), 8, stages=stages).flops

    experts = flops(coredit, {0: "transformer", 6: "transformer_2"})
    high, low = flops(coredit), flops(Coredit(ratios=(0.2,), late_share=0))
    assert experts == pytest.approx((6 * high + 2 * low) / 8, rel=1e-12) and low > high


@pytest.mark.parametrize(("preset", "token_steps"), [("75A", 30.0), ("50", 19.84), ("25", 9.92)])
def test_hsa_of_a_large_model_saves_what_its_token_steps_promise(preset, token_steps):
    shape = Shape(tokens=32_760, text=512, branches=2, itemsize=2)
    [hsa] = parse_plan(f"hsa:{preset}").methods
    ratio = plan_cost(WAN_14B, shape, (), 40).flops / plan_cost(WAN_14B, shape, (hsa,), hsa.steps).flops
    assert ratio == pytest.approx(40 / token_steps, rel=0.01)


def test_what_was_measured_reaches_a_method():
    class Cached:
        def step_work(self, work, at):
            run = at.measured["cached"]
            return work.in_blocks(lambda block: block._replace(share=run))

    shape = Shape(tokens=45, text=7)

    def cost(*shares):
        return plan_cost(WAN, shape, (Cached(),), 4, measured={"cached": shares}).flops

    full, half, none = cost(1.0, 1.0, 1.0, 1.0), cost(1.0, 0.0, 0.5, 0.5), cost(0.0, 0.0, 0.0, 0.0)
    assert half == pytest.approx((full + none) / 2) and none < full == plan_cost(WAN, shape, (), 4).flops


@pytest.mark.parametrize(("name", "config"), [("wan", WAN), ("flux", FLUX)])
def test_weights_are_the_models(name, config):
    shape = CASES[name][1]
    model = arguments(config, shape)[0]
    leaves = named_leaves(model)
    assert weight_bytes(config, 4) == sum(leaf.size * 4 for _, leaf in leaves)
    kernels = sum(leaf.size * 4 for path, leaf in leaves if path.endswith("kernel"))
    # FLUX's single blocks read theirs for the text and for the image.
    twice = ("single.attn.", "single.mlp.")
    kernels += sum(leaf.size * 4 for path, leaf in leaves if path.endswith("kernel") and path.startswith(twice))
    assert step_cost(config, shape, dense_work(config, shape)).weights == kernels
    assert weight_bytes(config, 4) / 2 <= weight_bytes(config, 2) < weight_bytes(config, 4)


def test_memory_of_the_papers_cache():
    """K and V of Wan at 480x832x81 in bf16, a guidance branch: 5.6 GiB and 25 GiB."""
    [hsa] = parse_plan("hsa:50").methods
    shape = Shape(tokens=32_760, text=512, itemsize=2)
    for config, gib in ((WAN_1_3B, 5.6), (WAN_14B, 25)):
        memory = plan_memory(config, shape, (hsa,))
        assert memory.kept / 2**30 == pytest.approx(gib, rel=0.02)
        assert memory.total == memory.weights + memory.kept + memory.activations
        assert plan_memory(config, shape, ()).kept == 0


def test_a_second_expert_is_counted():
    shape = Shape(tokens=100, text=10)
    one, two = plan_memory(WAN, shape, ()), plan_memory(WAN, shape, (), experts=2)
    assert two.weights == 2 * one.weights and two.total - one.total == one.weights
