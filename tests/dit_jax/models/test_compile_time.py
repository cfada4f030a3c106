"""Blocks are a loop in the compiled program: many compile in the time of a few."""

import statistics
import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from dit_jax.models.network import Conditioning, NetworkCall, layout, network
from dit_jax.models.wan import Wan, WanConfig

ROUNDS = 3


@pytest.fixture
def _nothing_is_kept():
    """A program of the persistent cache costs the same however many blocks it has: nothing, when another test had it
    compiled, or when it took so long (jax_persistent_cache_min_compile_time_secs) that the round before kept it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def compile_seconds(blocks: int) -> float:
    """CPU seconds (all threads, of this process alone) of tracing and compiling a network of so many blocks."""
    config = WanConfig(
        blocks=blocks, width=24, heads=2, head_width=12, mlp_width=32, in_channels=4, out_channels=4, text_width=8
    )
    model = nnx.eval_shape(lambda: Wan(config, nnx.Rngs(0)))

    def run(model, latents, t, text):
        return network(model, NetworkCall(), layout(latents, config.patch), t, Conditioning(text))[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 3, 8, 8, 4), (2,), (2, 7, 8))]
    jax.clear_caches()
    began = time.process_time()
    jax.jit(run).lower(model, *shapes).compile()
    return time.process_time() - began


@pytest.mark.usefixtures("_nothing_is_kept")
def test_forty_blocks_compile_in_hardly_more_than_the_time_of_four():
    compile_seconds(4)  # the first compilation of a process also loads the compiler
    few, many = zip(*((compile_seconds(4), compile_seconds(40)) for _ in range(ROUNDS)), strict=True)
    assert statistics.median(many) <= 1.3 * statistics.median(few)
