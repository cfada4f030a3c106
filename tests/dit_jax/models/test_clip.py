"""The image tower against transformers' CLIPVisionModel, with and without projection, all weights random."""

import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from convert.encoders import canonical_clip_vision_key, clip_vision_config, clip_vision_rows
from convert.tables import assign
from dit_jax.models.clip import AXES, PRESETS, CLIPVision, preprocess
from dit_jax.parameters import named_leaves
from dit_jax.sharding import logical_axes

TINY = {
    "hidden_size": 20, "intermediate_size": 33, "num_hidden_layers": 3, "num_attention_heads": 5, "image_size": 23,
    "patch_size": 7, "projection_dim": 11, "layer_norm_eps": 1e-5,
}  # fmt: skip


def torch_model(architecture=CLIPVisionModelWithProjection, activation="gelu"):
    torch.manual_seed(0)
    config = CLIPVisionConfig(**TINY, hidden_act=activation, architectures=[architecture.__name__])
    model = architecture(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) * parameter[0].numel() ** -0.5
        else:
            parameter.data = 0.3 * torch.randn_like(parameter) + ("norm" in name and name.endswith("weight"))
    return model


def jax_model(reference):
    config = clip_vision_config(reference.config.to_dict())
    abstract = nnx.eval_shape(lambda: CLIPVision(config, nnx.Rngs(0)))
    tensors = {canonical_clip_vision_key(key): value.float().numpy() for key, value in reference.state_dict().items()}
    return assign(abstract, clip_vision_rows(config), tensors)


def pixels():
    return np.random.default_rng(1).standard_normal((2, TINY["image_size"], TINY["image_size"], 3), np.float32)


def run_torch(model, dtype=torch.float32):
    with torch.no_grad():
        out = model.to(dtype)(torch.tensor(pixels()).permute(0, 3, 1, 2).to(dtype), output_hidden_states=True)
    return out


def relative(a, b):
    b = b.float().numpy()
    return np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("architecture", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_equals_transformers(architecture, activation):
    reference = torch_model(architecture, activation)
    model, expected = jax_model(reference), run_torch(reference)
    features = jax.jit(CLIPVision.features)(model, pixels())
    assert relative(jax.jit(CLIPVision.__call__)(model, pixels()), expected.hidden_states[-2]) <= 1e-5
    assert relative(features.states, expected.last_hidden_state) <= 1e-5
    if architecture is CLIPVisionModel:
        assert relative(features.pooled, expected.pooler_output) <= 1e-5
        assert features.projected is None
    else:
        assert relative(features.projected, expected.image_embeds) <= 1e-5


def test_bf16_errs_no_more_than_torch():
    reference = torch_model()
    model, expected = jax_model(reference), run_torch(reference)
    half = run_torch(reference, torch.bfloat16)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    states, features = jax.jit(lambda model, x: (model(x), model.features(x)))(model, pixels())
    assert states.dtype == features.projected.dtype == jnp.bfloat16
    for ours, name in ((features.states, "last_hidden_state"), (features.projected, "image_embeds")):
        assert relative(ours, expected[name]) <= 1.2 * relative(half[name].float().numpy(), expected[name])
    before_last = expected.hidden_states[-2]
    assert relative(states, before_last) <= 1.2 * relative(half.hidden_states[-2].float().numpy(), before_last)


def test_gradients_reach_every_leaf():
    model = jax_model(torch_model())
    grads = jax.jit(jax.grad(lambda model: jnp.sum(jnp.square(model.features(pixels()).projected))))(model)
    for name, leaf in named_leaves(grads):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), name


def test_refuses_images_of_another_size():
    model = jax_model(torch_model())
    with pytest.raises(ValueError, match=r"expected images of shape \(23, 23, 3\), found \(24, 23, 3\)"):
        model(np.zeros((1, 24, 23, 3), np.float32))


@pytest.mark.parametrize(("height", "width"), [(300, 451), (97, 64), (224, 224), (31, 33), (225, 224)])
@pytest.mark.parametrize("size", [224, 45])
def test_preprocessing_equals_transformers(height, width, size):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    expected = processor(list(images), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    found = preprocess(images, size)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_preprocessing_refuses_floats():
    with pytest.raises(ValueError, match="expected uint8 images"):
        preprocess(np.zeros((1, 8, 8, 3), np.float32))


def test_every_leaf_has_logical_axes_and_every_row_a_leaf():
    used = set()
    for name, leaf in named_leaves(jax_model(torch_model())):
        assert len(logical_axes(name, AXES)) == leaf.ndim, name
        used |= {row for row in AXES if fnmatch.fnmatchcase(name, row)}
    assert used == set(AXES)


def test_preset_is_wans_image_encoder():
    assert PRESETS["clip-vit-h-14"].patches == 256
    model = nnx.eval_shape(lambda: CLIPVision(PRESETS["clip-vit-h-14"], nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == pytest.approx(630.8e6, rel=1e-3)
