"""Products of fp32 ask for all of it: a TPU would multiply them in one bf16 pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.lora_extract import nearest_product
from dit_jax.lora import Adapter, Beside
from dit_jax.methods.coherence import Lattice
from dit_jax.models import vae_kl, vae_wan_blocks
from dit_jax.models.clip_text import CLIPText, CLIPTextConfig
from dit_jax.models.t5 import T5Config, T5Encoder
from dit_jax.ops.attention import _gpu
from dit_jax.ops.linear import Linear
from dit_jax.parameters import Precision, cast

RNGS = nnx.Rngs(0)
T5 = T5Config(vocab_size=9, width=8, heads=2, head_width=4, mlp_width=8, blocks=2)
CLIP = CLIPTextConfig(blocks=2, width=64, heads=1, mlp_width=8, vocab_size=9, positions=5, end_token=8)
PICTURE, ROWS, IDS = jnp.ones((1, 2, 4, 4, 8)), jnp.ones((1, 36, 8)), jnp.zeros((1, 5), int)
ADAPTER = Adapter(stacked=False, down=np.ones((8, 2)), up=np.ones((2, 8)), alpha=np.ones(()), rank=np.ones(()))
MODULES = {
    "Wan VAE's attention": (vae_wan_blocks.FrameAttention(8, rngs=RNGS), PICTURE),
    "FLUX VAE's attention": (vae_kl.FrameAttention(8, 2, rngs=RNGS), PICTURE),
    "T5": (T5Encoder(T5, RNGS), IDS),
    "CLIP's text tower": (CLIPText(CLIP, RNGS), IDS),
    "a LoRA beside a map": (Beside(Linear(8, 8, rngs=RNGS), ADAPTER), ROWS),
}


def products(program, *arguments):
    """Whether each product of a program has fp32 operands, and the precisions that it asks for."""

    def found(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                exact = all(operand.aval.dtype == jnp.float32 for operand in equation.invars)
                yield exact, equation.params["precision"]
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from found(inner)

    return list(found(jax.make_jaxpr(program)(*arguments).jaxpr))


def all_exact(found):
    return bool(found) and all(exact and set(asked or ()) == {jax.lax.Precision.HIGHEST} for exact, asked in found)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_in_fp32(name):
    module, told = MODULES[name]
    assert all_exact(products(lambda module, told: module(told), module, told))


@pytest.mark.parametrize("name", ["Wan VAE's attention", "FLUX VAE's attention", "T5", "CLIP's text tower"])
def test_in_bf16_nothing_is_asked_for(name):
    module, told = MODULES[name]
    module = cast(module, Precision(weights=jnp.bfloat16))
    told = told if told is IDS else told.astype(jnp.bfloat16)
    found = products(lambda module, told: module(told), module, told)
    assert found and not any(exact or "HIGHEST" in str(asked) for exact, asked in found)


@pytest.mark.parametrize("side", [4, 32])
def test_gradients_ask_as_their_modules_do(side):
    """Attention at once, and one column or frame at a time."""
    picture = jnp.ones((1, 2, side, side, 8))
    for name in ("Wan VAE's attention", "FLUX VAE's attention"):
        module = MODULES[name][0]
        gradient = jax.grad(lambda module, x: jnp.sum(jax.tree.leaves(module(x))[0]))
        assert all_exact(products(gradient, module, picture))


def test_the_means_that_stand_in_for_skipped_tokens():
    lattice = Lattice(grid=(1, 6, 6), cells=(3, 2))
    kept, slots = jnp.ones((1, 36), bool), jnp.zeros((1, 36), int)
    assert all_exact(products(lattice.reconstructed, ROWS, slots, kept, jnp.ones((1, 36))))


def test_attention_on_a_gpu():
    heads = jnp.ones((1, 4, 2, 8))
    assert all_exact(products(lambda q: _gpu(q, q, q, scale=1.0), heads))


def test_the_lora_nearest_to_a_difference():
    assert all_exact(products(lambda matrix: nearest_product(matrix, 2), jnp.ones((8, 6))))
