"""The text tower against transformers' CLIPTextModel, all weights random."""

import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from transformers import CLIPTextConfig, CLIPTextModel

from convert.encoders import canonical_clip_text_key, clip_text_config, clip_text_rows
from convert.tables import assign
from dit_jax.config import UserError
from dit_jax.models.clip_text import AXES, HIGHEST_ID, PRESETS, CLIPText
from dit_jax.parameters import named_leaves
from dit_jax.sharding import logical_axes, partition

TINY = {
    "vocab_size": 61, "hidden_size": 20, "intermediate_size": 33, "num_hidden_layers": 3, "num_attention_heads": 5,
    "max_position_embeddings": 13, "bos_token_id": 0,
}  # fmt: skip
START, END = 59, 60
LENGTHS = (13, 7, 2)  # with start and end


def torch_model(activation="quick_gelu", end=END, seed=0):
    torch.manual_seed(seed)
    model = CLIPTextModel(CLIPTextConfig(**TINY, hidden_act=activation, eos_token_id=end)).eval()
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            parameter.data = torch.randn_like(parameter)
        elif parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) * parameter.shape[1] ** -0.5
        else:
            parameter.data = 0.3 * torch.randn_like(parameter) + ("norm" in name and name.endswith("weight"))
    return model


def jax_model(reference):
    config = clip_text_config(reference.config.to_dict())
    abstract = nnx.eval_shape(lambda: CLIPText(config, nnx.Rngs(0)))
    tensors = {canonical_clip_text_key(key): value.float().numpy() for key, value in reference.state_dict().items()}
    return assign(abstract, clip_text_rows(config), tensors)


def texts(pad, end=END, vocabulary=START):
    """A text that fills the positions, and two that are padded."""
    ids = np.random.default_rng(1).integers(3, vocabulary, (len(LENGTHS), max(LENGTHS)))
    ids[:, 0] = START
    for row, length in zip(ids, LENGTHS, strict=True):
        row[length - 1], row[length:] = end, pad
    return ids


def run_torch(model, ids):
    with torch.no_grad():
        out = model(torch.tensor(ids))
    return out.last_hidden_state.float().numpy(), out.pooler_output.float().numpy()


run_jax = jax.jit(CLIPText.__call__)


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("pad", [1, END], ids=["padded with another id", "padded with the end"])
@pytest.mark.parametrize("end", [END, HIGHEST_ID])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_equals_transformers(activation, end, pad):
    reference = torch_model(activation, end)
    model, ids = jax_model(reference), texts(pad)
    states, pooled = run_torch(reference, ids)
    ours = run_jax(model, ids)
    assert relative(ours.states, states) <= 1e-5
    assert relative(ours.pooled, pooled) <= 1e-5
    ends = np.array(LENGTHS) - 1
    np.testing.assert_array_equal(ours.pooled, ours.states[np.arange(len(ids)), ends])


def test_an_end_below_the_highest_id_equals_transformers():
    """Where the two conventions part: `end` is neither the highest id of a text nor there only once."""
    ids = texts(pad=5, end=5)
    ids[2] = START  # no end at all
    for end in (5, HIGHEST_ID):
        reference = torch_model(end=end)
        _, pooled = run_torch(reference, ids)
        assert relative(run_jax(jax_model(reference), ids).pooled, pooled) <= 1e-5


def test_a_short_text_equals_transformers():
    ids = texts(pad=1)[:, :6]
    reference = torch_model()
    states, pooled = run_torch(reference, ids)
    ours = run_jax(jax_model(reference), ids)
    assert relative(ours.states, states) <= 1e-5
    assert relative(ours.pooled, pooled) <= 1e-5


def test_bf16_errs_no_more_than_torch():
    ids = texts(pad=END)
    for seed in range(2):
        reference = torch_model(seed=seed)
        expected, model = run_torch(reference, ids), jax_model(reference)
        theirs = run_torch(reference.to(torch.bfloat16), ids)
        ours = run_jax(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model), ids)
        for found, torchs, exact in zip(ours, theirs, expected, strict=True):
            assert found.dtype == jnp.bfloat16
            assert 1e-4 < relative(found, exact) <= 1.2 * relative(torchs, exact)


def test_no_state_knows_what_follows():
    model, ids = jax_model(torch_model()), texts(pad=1)
    other = ids.copy()
    other[:, 7:] = 4
    np.testing.assert_array_equal(run_jax(model, ids).states[:, :7], run_jax(model, other).states[:, :7])


def test_gradients_reach_every_leaf():
    model = jax_model(torch_model())
    grads = jax.jit(jax.grad(lambda model: jnp.sum(jnp.sin(model(texts(pad=END)).states))))(model)
    for name, leaf in named_leaves(grads):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), name


def test_refuses_a_longer_text():
    with pytest.raises(UserError, match="expected texts of up to 13 tokens, found 14"):
        jax_model(torch_model())(np.zeros((1, 14), int))


def test_every_leaf_has_logical_axes_and_every_row_a_leaf():
    used, mesh = set(), AbstractMesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    for name, leaf in named_leaves(nnx.eval_shape(lambda: CLIPText(PRESETS["clip-vit-l-14"], nnx.Rngs(0)))):
        axes = logical_axes(name, AXES)
        assert len(axes) == leaf.ndim, name
        partition(name, leaf.shape, axes, mesh)  # 12 heads are no hindrance
        used |= {row for row in AXES if fnmatch.fnmatchcase(name, row)}
    assert used == set(AXES)


def test_preset_is_the_published_size():
    model = nnx.eval_shape(lambda: CLIPText(PRESETS["clip-vit-l-14"], nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 123_060_480
