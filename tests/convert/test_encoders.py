"""The encoders' tables: every row in both layouts, there and back, and configs there and back."""

import jax
import numpy as np
import pytest
from flax import nnx
from transformers import CLIPVisionConfig as TheirCLIPConfig
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection, T5EncoderModel, UMT5EncoderModel
from transformers import T5Config as TheirT5Config
from transformers import UMT5Config as TheirUMT5Config

from convert.encoders import (
    ORIGINAL_CLIP,
    canonical_clip_vision_key,
    canonical_t5_key,
    clip_vision_config,
    clip_vision_prefixed,
    clip_vision_rows,
    clip_vision_settings,
    t5_config,
    t5_rows,
    t5_settings,
)
from convert.tables import assign
from dit_jax.config import UserError
from dit_jax.models.clip import CLIPVision, CLIPVisionConfig
from dit_jax.models.t5 import T5Config, T5Encoder
from dit_jax.parameters import named_leaves

UMT5 = T5Config(
    vocab_size=13, width=8, heads=3, head_width=2, mlp_width=5, blocks=2, relative_buckets=6, relative_distance=9
)
T5 = T5Config(vocab_size=13, width=8, heads=3, head_width=2, mlp_width=5, blocks=2, per_block_bias=False)
PLAIN = CLIPVisionConfig(blocks=2, width=6, heads=2, mlp_width=7, patch=2, image_size=5)
PROJECTING = CLIPVisionConfig(
    blocks=2, width=6, heads=2, mlp_width=7, patch=2, image_size=5, projection=4, activation="quick_gelu"
)
CASES = {
    "umt5": (T5Encoder, UMT5, t5_rows),
    "t5": (T5Encoder, T5, t5_rows),
    "clip": (CLIPVision, PLAIN, clip_vision_rows),
    "clip-projecting": (CLIPVision, PROJECTING, clip_vision_rows),
}


def random_model(model, config):
    abstract = nnx.eval_shape(lambda: model(config, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract)


def written(model, rows, layout):
    """The model's tensors in a layout, fused ones joined."""
    leaves, pieces = dict(named_leaves(model)), {}
    for row in rows:
        blocks = range(len(leaves[row.ours])) if row.stacked(layout) else [None]
        for block in blocks:
            leaf = leaves[row.ours] if block is None else leaves[row.ours][block]
            start = row.parts[layout].start if layout in row.parts else 0
            pieces.setdefault(row.key(layout, block), []).append((start, row.to_outside(np.asarray(leaf), layout)))
    return {
        key: np.concatenate([array for _, array in sorted(found, key=lambda x: x[0])]) for key, found in pieces.items()
    }


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_bit_for_bit(case, layout):
    build, config, rows = CASES[case]
    model = random_model(build, config)
    tensors = written(model, rows(config), layout)
    again = dict(named_leaves(assign(model, rows(config), tensors, layout)))
    for name, leaf in named_leaves(model):
        np.testing.assert_array_equal(again[name], leaf, err_msg=name)


@pytest.mark.parametrize(
    ("case", "config", "reference"),
    [
        ("umt5", TheirUMT5Config, UMT5EncoderModel),
        ("t5", TheirT5Config, T5EncoderModel),
        ("clip", TheirCLIPConfig, CLIPVisionModel),
        ("clip-projecting", TheirCLIPConfig, CLIPVisionModelWithProjection),
    ],
)
def test_transformers_has_the_same_keys_and_shapes(case, config, reference):
    build, ours, rows = CASES[case]
    settings = t5_settings(ours) if isinstance(ours, T5Config) else clip_vision_settings(ours)
    theirs = reference(config(**settings))
    canonical = canonical_t5_key if isinstance(ours, T5Config) else canonical_clip_vision_key
    expected = {canonical(key): tuple(value.shape) for key, value in theirs.state_dict().items()}
    found = {key: array.shape for key, array in written(random_model(build, ours), rows(ours), "diffusers").items()}
    assert found == expected


def test_original_umt5_keys():
    tensors = written(random_model(T5Encoder, UMT5), t5_rows(UMT5), "original")
    in_block = {
        "norm1.weight": (8,), "pos_embedding.embedding.weight": (6, 3), "norm2.weight": (8,),
        "attn.q.weight": (6, 8), "attn.k.weight": (6, 8), "attn.v.weight": (6, 8), "attn.o.weight": (8, 6),
        "ffn.gate.0.weight": (5, 8), "ffn.fc1.weight": (5, 8), "ffn.fc2.weight": (8, 5),
    }  # fmt: skip
    expected = {"token_embedding.weight": (13, 8), "norm.weight": (8,)}
    expected |= {f"blocks.{block}.{key}": shape for block in range(2) for key, shape in in_block.items()}
    assert {key: array.shape for key, array in tensors.items()} == expected


def test_original_clip_keys():
    model = random_model(CLIPVision, PROJECTING)
    tensors = written(model, clip_vision_rows(PROJECTING), "original")
    in_block = {
        "norm1.weight": (6,), "norm1.bias": (6,), "attn.to_qkv.weight": (18, 6), "attn.to_qkv.bias": (18,),
        "attn.proj.weight": (6, 6), "attn.proj.bias": (6,), "norm2.weight": (6,), "norm2.bias": (6,),
        "mlp.0.weight": (7, 6), "mlp.0.bias": (7,), "mlp.2.weight": (6, 7), "mlp.2.bias": (6,),
    }  # fmt: skip
    expected = {
        "visual.cls_embedding": (1, 1, 6), "visual.pos_embedding": (1, 5, 6),
        "visual.patch_embedding.weight": (6, 3, 2, 2), "visual.head": (6, 4),
        "visual.pre_norm.weight": (6,), "visual.pre_norm.bias": (6,),
        "visual.post_norm.weight": (6,), "visual.post_norm.bias": (6,),
    }  # fmt: skip
    expected |= {f"visual.transformer.{block}.{key}": shape for block in range(2) for key, shape in in_block.items()}
    assert {key: array.shape for key, array in tensors.items()} == expected
    # The same model in the other layout holds the fused tensor in three, and the head transposed.
    theirs = written(model, clip_vision_rows(PROJECTING), "diffusers")
    separate = [theirs[f"vision_model.encoder.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    np.testing.assert_array_equal(tensors["visual.transformer.1.attn.to_qkv.weight"], np.concatenate(separate))
    np.testing.assert_array_equal(tensors["visual.head"], theirs["visual_projection.weight"].T)


def test_keys_on_disk():
    assert canonical_t5_key("encoder.embed_tokens.weight") == canonical_t5_key("shared.weight") == "shared.weight"
    prefixed = "vision_model.embeddings.class_embedding"
    assert canonical_clip_vision_key(prefixed) == canonical_clip_vision_key("embeddings.class_embedding") == prefixed
    assert canonical_clip_vision_key("visual_projection.weight") == "visual_projection.weight"
    assert canonical_clip_vision_key("visual.transformer.3.mlp.0.bias") == "visual.transformer.3.mlp.0.bias"
    for key in ("vision_model.embeddings.position_ids", "textual.token_embedding.weight", "log_scale"):
        assert canonical_clip_vision_key(key) is None


@pytest.mark.parametrize("architecture", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_prefix_is_that_of_the_installed_transformers(architecture, tmp_path):
    settings = clip_vision_settings(PROJECTING if architecture is CLIPVisionModelWithProjection else PLAIN)
    model = architecture(TheirCLIPConfig(**settings))
    model.save_pretrained(tmp_path)
    settings = TheirCLIPConfig.from_pretrained(tmp_path).to_dict()
    rows = clip_vision_rows(clip_vision_config(settings), prefixed=clip_vision_prefixed(settings))
    keys = {row.key("diffusers", block) for row in rows for block in (range(2) if row.stacked("diffusers") else [None])}
    assert keys == set(model.state_dict())
    assert clip_vision_prefixed(settings | {"transformers_version": "4.57.1"})


@pytest.mark.parametrize("config", [UMT5, T5])
def test_t5_config_survives_both_directions(config):
    assert t5_config(t5_settings(config)) == config


@pytest.mark.parametrize("config", [PLAIN, PROJECTING, ORIGINAL_CLIP])
def test_clip_config_survives_both_directions(config):
    assert clip_vision_config(clip_vision_settings(config)) == config


@pytest.mark.parametrize("theirs", [TheirUMT5Config, TheirT5Config])
def test_t5_defaults_are_those_of_transformers(theirs):
    gated = {"feed_forward_proj": "gated-gelu"}
    assert t5_config({"model_type": theirs.model_type} | gated) == t5_config(theirs(**gated).to_dict())


def test_clip_defaults_are_those_of_transformers():
    assert clip_vision_config({}) == clip_vision_config(TheirCLIPConfig().to_dict())


@pytest.mark.parametrize(
    ("read", "settings", "message"),
    [
        (t5_config, {"model_type": "bert"}, "model_type: expected umt5 or t5, found 'bert'"),
        (t5_config, {"model_type": "t5"}, "feed_forward_proj: expected gated-gelu, found 'relu'"),
        (clip_vision_config, {"model_type": "siglip"}, "model_type: expected clip_vision_model, found 'siglip'"),
        (clip_vision_config, {"hidden_act": "relu"}, "hidden_act: expected gelu or quick_gelu, found 'relu'"),
        (clip_vision_config, {"image_size": [224, 112]}, r"image_size: expected one integer, found \[224, 112\]"),
    ],
)
def test_refuses_other_models(read, settings, message):
    with pytest.raises(UserError, match=message):
        read(settings)
