"""Taps: blocks' outputs beside a network's own, at no memory that grows with the number of blocks."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_jax.models.flux import Flux, FluxConfig
from dit_jax.models.network import Aux, Conditioning, NetworkCall, Place, _pinned, layout, network
from dit_jax.models.wan import Wan, WanConfig

WAN = WanConfig(
    blocks=4, width=24, heads=2, head_width=12, mlp_width=32, text_width=8, in_channels=4, out_channels=4,
    time_frequencies=8,
)  # fmt: skip
FLUX = FluxConfig(
    double_blocks=2, single_blocks=3, width=16, heads=2, head_width=8, mlp_width=20, in_channels=4, out_channels=4,
    text_width=8, pooled_width=8, time_frequencies=8, rope_widths=(2, 2, 4), guidance=False,
)  # fmt: skip
MODELS = {"wan": (Wan, WAN, (2, 3, 4, 6, 4)), "flux": (Flux, FLUX, (2, 1, 6, 10, 4))}


def random_model(kind):
    of_kind, config, _ = MODELS[kind]
    rng = np.random.default_rng(0)

    def fill(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape) / 3, jnp.float32)

    return jax.tree.map(fill, nnx.eval_shape(lambda: of_kind(config, nnx.Rngs(0))))


def told(kind, seed=1):
    rng = np.random.default_rng(seed)
    latents = jnp.asarray(rng.standard_normal(MODELS[kind][2]), jnp.float32)
    pooled = jnp.asarray(rng.standard_normal((2, 8)), jnp.float32)
    return latents, Conditioning(jnp.asarray(rng.standard_normal((2, 5, 8)), jnp.float32), pooled=pooled)


@partial(jax.jit, static_argnames="call")
def tapped(model, latents, conditioning, aux, call=NetworkCall()):
    t = jnp.full(2, 700.0)
    rows, state = network(model, call, layout(latents, model.config.patch), t, conditioning, aux=aux)
    return rows, state.taps


def block_by_block(model, latents, conditioning, gates) -> list[np.ndarray]:
    """Tokens behind every block, one block after the other."""
    tokens, call = layout(latents, model.config.patch), NetworkCall()
    signal = model.signal(jnp.full(2, 700.0), conditioning)
    place = Place(tokens.positions, model.rope(tokens.positions), None)
    joint, found = isinstance(model, Flux), []
    x = (model.embed(tokens.rows), signal.text) if joint else (model.embed(tokens.rows),)
    stacks = ((model.double, 2), (model.single, 3)) if joint else ((model.blocks, 4),)
    for stack, count in stacks:
        for index in range(count):
            block = jax.tree.map(lambda leaf, index=index: leaf[index], stack)
            given = x if joint else x[0]
            after, _ = block(given, signal, place, call.attention, jnp.int32(len(found)), None, None)
            gate = gates[:, len(found), None, None]
            x = tuple(gate * new + (1 - gate) * old for new, old in zip(after if joint else (after,), x, strict=True))
            found.append(np.asarray(x[0]))
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_taps_are_what_lies_behind_blocks_and_their_gates(kind):
    model, (latents, conditioning) = random_model(kind), told(kind)
    gates = jnp.asarray(np.random.default_rng(3).uniform(0, 1, (2, sum(model.stacks))), jnp.float32)
    expected = block_by_block(model, latents, conditioning, gates)
    rows, nothing = tapped(model, latents, conditioning, Aux(gates=gates))
    assert nothing is None
    for call in (NetworkCall(), NetworkCall(remat="blocks")):
        found, taps = tapped(model, latents, conditioning, Aux(gates=gates, taps=jnp.array([3, 0, 2])), call)
        np.testing.assert_allclose(found, rows, atol=1e-5)
        for tap, block in zip(taps, (3, 0, 2), strict=True):
            np.testing.assert_allclose(tap, expected[block], rtol=1e-4, atol=1e-5)
    programs = tapped._cache_size()
    taps = tapped(model, latents, conditioning, Aux(gates=1 - gates, taps=jnp.array([1, 2, 0])), call)[1]
    assert tapped._cache_size() == programs and np.isfinite(taps).all()


def test_taps_cost_memory_that_does_not_grow_with_the_blocks():
    """Of a gradient with recomputed blocks: buffers as large as what is tapped, at 4 blocks and at 12 alike."""
    count, rows, tokens = 3, 2, 4 * 16 * 16

    def given(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def memory(blocks, taps):
        config = replace(WAN, blocks=blocks)

        def loss(model, latents, conditioning, taps):
            tokens = layout(latents, config.patch)
            out, state = network(
                model, NetworkCall(remat="blocks"), tokens, jnp.full(2, 700.0), conditioning, aux=Aux(taps=taps)
            )
            return jnp.sum(out**2) + (0 if state.taps is None else jnp.sum(state.taps**2))

        model = nnx.eval_shape(lambda: Wan(config, nnx.Rngs(0)))
        lowered = jax.jit(jax.grad(loss)).lower(model, given(rows, 4, 32, 32, 4), Conditioning(given(rows, 5, 8)), taps)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = (memory(blocks, given(count, dtype=jnp.int32)) - memory(blocks, None) for blocks in (4, 12))
    of_tokens = 4 * rows * tokens * WAN.width
    assert few <= 2.5 * (count + 1) * of_tokens
    assert many <= few + 0.1 * of_tokens, "the buffer is saved with every block"


@pytest.mark.parametrize(("length", "parts"), [(512, ("fsdp", "context")), (77, None)])
def test_text_that_blocks_change_is_split_like_the_tokens_where_it_divides(length, parts):
    """Chips that share a sample share its text too, instead of each computing all of it."""
    mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    streams = tuple(jax.ShapeDtypeStruct((1, count, 16), jnp.float32) for count in (4096, length))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(_pinned)(streams)
    tokens, text = (equation.params["sharding"].spec for equation in traced.eqns)
    assert tokens[1] == ("fsdp", "context")
    assert (text[1] if len(text) > 1 else None) == parts


def test_a_trunk_cache_is_not_tapped():
    model, (latents, conditioning) = random_model("wan"), told("wan")
    with pytest.raises(ValueError, match="may skip the blocks that are tapped"):
        tapped(model, latents, conditioning, Aux(taps=jnp.array([0])), NetworkCall(cache=FreshTrunk()))


class FreshTrunk:
    """A trunk cache that keeps nothing."""

    def init(self, model, x_BMD, signal):
        return None

    def __call__(self, trunk, x_BMD, state):
        return trunk.run(x_BMD, state)
