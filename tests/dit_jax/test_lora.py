"""Adapters merged into leaves: in what precision, on what mesh, and from which weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_devices import printed
from flax import nnx

from dit_jax.config import UserError
from dit_jax.lora import Adapter, beside, delta, merged, merged_leaf, untrained
from dit_jax.models.flux import Flux, FluxConfig
from dit_jax.models.network import Conditioning, NetworkCall, layout, network
from dit_jax.models.wan import Wan, WanConfig
from dit_jax.parameters import named_leaves, with_leaves

TINY = WanConfig(
    blocks=3, width=24, heads=2, head_width=12, mlp_width=20, in_channels=4, out_channels=4, text_width=11,
    time_frequencies=8,
)  # fmt: skip
QUERY, OUT, BIAS = "blocks.attn1.q.linear.kernel", "out.kernel", "blocks.mlp.up.bias"


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def low_rank(inputs, outputs, blocks=(), rank=4, seed=0):
    """An adapter of ordinary size with another alpha and rank in every block."""
    down = random(*blocks, *inputs, rank, seed=seed) / np.prod(inputs) ** 0.5
    up, ranks = random(*blocks, rank, *outputs, seed=seed + 1), np.full(blocks, rank, np.float32)
    alpha = (1 + np.arange(blocks[0] if blocks else 1, dtype=np.float32)) * 1.5
    return Adapter(stacked=bool(blocks), down=down, up=up, alpha=alpha if blocks else alpha[0], rank=ranks)


def model():
    abstract = nnx.eval_shape(lambda: Wan(TINY, nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(random(*leaf.shape)), abstract)


def lora(seed=0):
    return {
        QUERY: low_rank((24,), (2, 12), blocks=(3,), seed=seed),
        OUT: low_rank((24,), (16,), seed=seed),
        BIAS: Adapter(stacked=True, full=random(3, 20, seed=seed)),
    }


def leaves(module):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(module)}


def by_hand(weights, adapters):
    """In fp64, block by block, from the definition."""
    total = weights.astype(np.float64)
    for adapter, strength in adapters:
        if adapter.full is not None:
            total = total + strength * np.float64(adapter.full)
            continue
        blocks = range(len(adapter.alpha)) if adapter.stacked else [slice(None)]
        parts = []
        for block in blocks if adapter.stacked else [...]:
            product = np.tensordot(np.float64(adapter.down[block]), np.float64(adapter.up[block]), 1)
            parts.append(product * adapter.alpha[block] / adapter.rank[block])
        total = total + strength * (np.stack(parts) if adapter.stacked else parts[0])
    return total


def test_every_touched_leaf_is_the_sum_and_no_other_changes():
    loras = [(lora(0), 0.8), (lora(5), -0.4)]
    before, after = model(), leaves(merged(model(), loras))
    for name, weights in leaves(before).items():
        if name in (QUERY, OUT, BIAS):
            expected = by_hand(weights, [(own[name], strength) for own, strength in loras])
            assert np.linalg.norm(after[name] - expected) <= 1e-6 * np.linalg.norm(expected)
            assert np.linalg.norm(after[name] - weights) > 0.1 * np.linalg.norm(weights)
        else:
            np.testing.assert_array_equal(after[name], weights)


def test_the_model_that_is_merged_into_stays_as_it_is():
    pristine = model()
    first = leaves(merged(pristine, [(lora(), 1.0)]))
    for name, weights in leaves(model()).items():
        np.testing.assert_array_equal(leaves(pristine)[name], weights)
    again = leaves(merged(pristine, [(lora(), 1.0)]))
    assert all((first[name] == again[name]).all() for name in first)


def test_bf16_weights_are_rounded_once():
    weights = jnp.asarray(random(3, 24, 2, 12), jnp.bfloat16)
    adapters = [(lora()[QUERY], 0.5), (lora(7)[QUERY], 0.25)]
    found = merged_leaf(weights, adapters)
    assert found.dtype == jnp.bfloat16
    expected = by_hand(np.asarray(weights, np.float32), adapters)
    nearest = np.asarray(jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16), np.float32)
    differing = np.asarray(found, np.float32) != nearest  # ties, a last bit of fp32 apart
    assert differing.mean() < 0.001


def test_a_leaf_that_the_model_lacks_is_refused_by_name():
    with pytest.raises(UserError, match=r"no leaf blocks\.nothing"):
        merged(model(), [({"blocks.nothing": lora()[BIAS]}, 1.0)])


def test_adapters_are_data_that_gradients_reach():
    weights, adapter = jnp.asarray(random(3, 24, 2, 12)), lora()[QUERY]

    def loss(adapter):
        return ((weights + jax.vmap(delta)(adapter)) ** 2).sum()

    gradient = jax.grad(loss)(jax.tree.map(jnp.asarray, adapter))
    assert gradient.down.shape == adapter.down.shape and np.abs(gradient.up).max() > 0


@pytest.mark.parametrize("kind", ["wan", "flux"])
def test_an_untrained_lora_is_of_every_linear_map_of_the_blocks_and_adds_nothing(kind):
    flux = FluxConfig(double_blocks=2, single_blocks=3, width=32, heads=4, head_width=8, mlp_width=52, in_channels=4)
    abstract = nnx.eval_shape(lambda: Wan(TINY, nnx.Rngs(0)) if kind == "wan" else Flux(flux, nnx.Rngs(0)))
    made, shapes = untrained(abstract, rank=5), {name: leaf.shape for name, leaf in named_leaves(abstract)}
    streams = {
        "wan": ("blocks.attn1.", "blocks.attn2."),
        "flux": ("double.image.attn.", "double.text.attn.", "single.attn."),
    }
    maps = [f"{stream}{name}" for stream in streams[kind] for name in ("q.linear", "k.linear", "v", "o")]
    mlps = {"wan": ("blocks",), "flux": ("double.image", "double.text", "single")}[kind]
    maps += [f"{stream}.mlp.{name}" for stream in mlps for name in ("up", "down")]
    assert set(made) == {f"{name}.kernel" for name in maps}
    for name, adapter in made.items():
        blocks, inputs = shapes[name][0], adapter.down.shape[1:-1]
        assert adapter.down.shape[1:-1] + adapter.up.shape[2:] == shapes[name][1:] and adapter.stacked
        assert len(inputs) == (2 if ".o." in name else 1) and adapter.down.shape[-1] == adapter.up.shape[1] == 5
        assert not adapter.up.any() and (adapter.alpha == 5).all() and (adapter.rank == 5).all()
        np.testing.assert_allclose(adapter.down.std() * np.prod(inputs) ** 0.5, 1, rtol=0.2)
        assert len(adapter.alpha) == len(adapter.down) == len(adapter.up) == blocks


MESHES = ("fsdp=4,tensor=2", "data=2,context=4")


@pytest.fixture(scope="module")
def on_eight():
    return json.loads(printed(Path(__file__).with_name("lora_on_eight_devices.py"), *MESHES))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_sharded_model_gets_the_same_weights_and_keeps_its_shardings(on_eight, mesh):
    assert on_eight[mesh]["error"] <= 1e-6
    assert on_eight[mesh]["shardings kept"]
    assert on_eight[mesh]["sharded leaves"] == (2 if "fsdp" in mesh else 0)


def velocity_rows(model):
    tokens, text = layout(jnp.asarray(random(2, 2, 4, 6, 4)), TINY.patch), jnp.asarray(random(2, 5, 11))
    return network(model, NetworkCall(), tokens, jnp.float32([700, 20]), Conditioning(text))[0]


def test_a_lora_beside_the_weights_is_a_merged_one_and_so_are_its_gradients():
    """Of maps to heads, from heads and of plain ones; nothing else gets a gradient."""
    shapes = {
        QUERY: ((24,), (2, 12)), "blocks.attn2.o.kernel": ((2, 12), (24,)), "blocks.mlp.up.kernel": ((24,), (20,))
    }  # fmt: skip
    plain, adapters = model(), {name: low_rank(*of, blocks=(3,), seed=7) for name, of in shapes.items()}
    adapters[OUT] = low_rank((24,), (16,), seed=7)
    adapters = jax.tree.map(jnp.asarray, adapters)

    def with_merged(plain, lora):
        total = {
            name: jax.vmap(lambda down, up, scale: jnp.tensordot(down, up, 1) * scale)(
                adapter.down, adapter.up, adapter.alpha / adapter.rank
            )
            if adapter.stacked
            else delta(adapter)
            for name, adapter in lora.items()
        }
        leaves = {name: leaf + total.get(name, 0) for name, leaf in named_leaves(plain)}
        return with_leaves(plain, leaves)

    def loss(lora, place):
        return jnp.mean(jnp.square(velocity_rows(place(plain, lora))))

    found, gradients = jax.jit(jax.value_and_grad(lambda lora: loss(lora, beside)))(adapters)
    expected, wanted = jax.jit(jax.value_and_grad(lambda lora: loss(lora, with_merged)))(adapters)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, adapter in wanted.items():
        for part in ("down", "up"):
            one, other = getattr(gradients[name], part), getattr(adapter, part)
            assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other) and np.abs(other).max() > 0
        assert not np.any(gradients[name].alpha) and not np.any(gradients[name].rank)


def test_what_is_no_low_rank_kernel_cannot_lie_beside():
    with pytest.raises(UserError, match=r"mlp\.up\.bias cannot lie beside"):
        beside(model(), lora())
