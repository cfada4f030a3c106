"""The text encoders against transformers' UMT5EncoderModel and T5EncoderModel, with random weights everywhere."""

import fnmatch
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from convert.encoders import canonical_t5_key, t5_config, t5_rows
from convert.tables import assign
from dit_jax.models.t5 import AXES, PRESETS, T5Encoder, relative_buckets
from dit_jax.parameters import named_leaves
from dit_jax.sharding import logical_axes

TINY = {
    "vocab_size": 61, "d_model": 24, "d_kv": 6, "d_ff": 37, "num_layers": 3, "num_heads": 5,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 12, "relative_attention_max_distance": 20,
}  # fmt: skip
FAMILIES = {"umt5": (UMT5Config, UMT5EncoderModel), "t5": (T5Config, T5EncoderModel)}
LENGTHS = (29, 11, 1)


def torch_model(family):
    config, model = FAMILIES[family]
    torch.manual_seed(0)
    model = model(config(**TINY)).eval()
    for name, parameter in model.named_parameters():
        spread = 0.3 if "norm" in name else 1.0 if "shared" in name or "bias" in name else parameter.shape[1] ** -0.5
        parameter.data = torch.randn_like(parameter) * spread + ("norm" in name)
    return model


def jax_model(reference):
    config = t5_config(reference.config.to_dict())
    abstract = nnx.eval_shape(lambda: T5Encoder(config, nnx.Rngs(0)))
    tensors = {canonical_t5_key(key): value.float().numpy() for key, value in reference.state_dict().items()}
    return assign(abstract, t5_rows(config), tensors)


def inputs():
    ids = np.random.default_rng(1).integers(0, TINY["vocab_size"], (3, max(LENGTHS)))
    return ids, np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]


def run_torch(model):
    ids, valid = inputs()
    with torch.no_grad():
        return model(torch.tensor(ids), torch.tensor(valid).long()).last_hidden_state.float().numpy()


def run_jax(model):
    return jax.jit(lambda model, ids, valid: model(ids, valid))(model, *inputs())


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family):
    reference = torch_model(family)
    # Padding is compared too: its states are computed, though nothing attends to them.
    assert relative(run_jax(jax_model(reference)), run_torch(reference)) <= 1e-5


def test_without_a_mask_equals_transformers():
    """FLUX runs T5 over rows that are mostly padding, and hides none of it."""
    reference, ids = torch_model("t5"), np.zeros((2, 128), int)
    ids[:, :29] = inputs()[0][:2]
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).last_hidden_state.numpy()
    model = jax_model(reference)
    states = jax.jit(lambda model, ids: model(ids))(model, ids)
    assert relative(states, expected) <= 1e-5
    assert relative(jax.jit(T5Encoder.__call__)(model, ids, ids > 0), expected) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_errs_no_more_than_torch(family):
    reference = torch_model(family)
    expected, ours = run_torch(reference), jax_model(reference)
    theirs = relative(run_torch(reference.to(torch.bfloat16)), expected)
    states = run_jax(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours))
    assert states.dtype == jnp.bfloat16
    assert relative(states, expected) <= 1.2 * theirs


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (12, 20), (64, 512)])
def test_buckets_equal_transformers(buckets, farthest):
    sizes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": farthest}
    module = UMT5EncoderModel(UMT5Config(**TINY | sizes)).encoder.block[0].layer[0].SelfAttention
    distances = np.arange(-700, 701)
    expected = module._relative_position_bucket(torch.tensor(distances)).numpy()
    np.testing.assert_array_equal(relative_buckets(distances, buckets, farthest), expected)


def test_a_row_without_tokens_is_finite():
    model = jax_model(torch_model("umt5"))
    ids, valid = inputs()
    assert np.isfinite(model(ids, np.zeros_like(valid))).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_leaf(family):
    model = jax_model(torch_model(family))
    grads = jax.jit(jax.grad(lambda model: jnp.sum(jnp.sin(model(*inputs())))))(model)
    for name, leaf in named_leaves(grads):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), name


def test_every_leaf_has_logical_axes_and_every_row_a_leaf():
    used = set()
    for config in PRESETS.values():
        for name, leaf in named_leaves(nnx.eval_shape(lambda config=config: T5Encoder(config, nnx.Rngs(0)))):
            assert len(logical_axes(name, AXES)) == leaf.ndim, name
            used |= {row for row in AXES if fnmatch.fnmatchcase(name, row)}
    assert used == set(AXES)


def test_presets_have_the_published_number_of_parameters():
    def billions(config):
        # The blocks are alike: two are enough to build.
        counts = [
            sum(leaf.size for leaf in jax.tree.leaves(nnx.eval_shape(lambda c=c: T5Encoder(c, nnx.Rngs(0)))))
            for c in (replace(config, blocks=1), replace(config, blocks=2))
        ]
        return (counts[0] + (config.blocks - 1) * (counts[1] - counts[0])) / 1e9

    assert billions(PRESETS["umt5-xxl"]) == pytest.approx(5.681, abs=1e-3)
    assert billions(PRESETS["t5-xxl"]) == pytest.approx(4.762, abs=1e-3)
