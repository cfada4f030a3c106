"""The exported pipeline: complete, readable by our own pipeline, and replaced as a whole or not at all."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.checkpoint import load_model, open_checkpoint
from dit_jax.config import UserError
from dit_jax.models.t5 import T5Config, T5Encoder
from dit_jax.models.vae_wan import WanVAE, WanVAEConfig
from dit_jax.models.wan import FP32_LEAVES, Wan, WanConfig
from dit_jax.parameters import named_leaves
from infer.digit_grammar import all_captions_sample
from infer.loading import load_pipeline
from train import export_demo
from train.demo_tokenizer import train_tokenizer
from train.export_demo import DEFAULTS, export_pipeline


@pytest.fixture(scope="module")
def models():
    wan = WanConfig(blocks=2, width=24, heads=2, head_width=12, mlp_width=32, text_width=16)
    vae = WanVAEConfig(
        base_dim=4, dim_mult=(1, 1, 1), temporal_downsample=(True, True), num_res_blocks=1,
        in_channels=12, out_channels=12, patch=2,
    )  # fmt: skip
    text = T5Config(vocab_size=128, width=16, heads=2, head_width=8, mlp_width=16, blocks=1)
    rngs = nnx.Rngs(0)
    return Wan(wan, rngs), WanVAE(vae, rngs=rngs), T5Encoder(text, rngs=rngs)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(all_captions_sample(500, 0), 128, folder)
    return folder


@pytest.fixture(scope="module")
def exported(models, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "demo"
    size = export_pipeline(folder, *models, tokenizer)
    assert size == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return folder


def test_the_text_encoder_comes_back_bit_for_bit(models, exported):
    back = dict(named_leaves(load_model(open_checkpoint(exported), "text_encoder")))
    for path, leaf in named_leaves(models[2]):
        np.testing.assert_array_equal(back[path], leaf)


def test_the_vae_is_kept_in_bf16(models, exported):
    back = dict(named_leaves(load_model(open_checkpoint(exported), "vae")))
    for path, leaf in named_leaves(models[1]):
        assert back[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(back[path], leaf.astype(jnp.bfloat16))


def test_the_transformer_is_kept_in_bf16_but_for_what_must_not_be(models, exported):
    back = dict(named_leaves(load_model(open_checkpoint(exported), "transformer")))
    for path, leaf in named_leaves(models[0]):
        exact = path.startswith(FP32_LEAVES)
        assert back[path].dtype == (jnp.float32 if exact else jnp.bfloat16)
        np.testing.assert_array_equal(back[path], leaf if exact else leaf.astype(jnp.bfloat16))


def test_the_pipeline_opens_with_the_demos_defaults(exported):
    pipe = load_pipeline(exported)
    assert (list(pipe.defaults.size), pipe.defaults.frames) == (DEFAULTS["size"], DEFAULTS["frames"])
    assert (pipe.defaults.steps, pipe.defaults.guidance) == (DEFAULTS["steps"], DEFAULTS["guidance"])
    assert pipe.shift.constant == export_demo.SHIFT
    assert pipe.text_tokens == 32
    assert pipe.latents_shape((128, 128), 17) == (5, 16, 16, 16)


def test_too_large_a_pipeline_leaves_the_old_one(models, tokenizer, exported, monkeypatch):
    before = (exported / "transformer" / "config.json").stat().st_mtime_ns
    monkeypatch.setattr(export_demo, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="expected at most 1,000"):
        export_pipeline(exported, *models, tokenizer)
    assert (exported / "transformer" / "config.json").stat().st_mtime_ns == before
    assert [entry.name for entry in exported.parent.iterdir()] == [exported.name]


def test_exporting_again_replaces(models, tokenizer, exported):
    export_pipeline(exported, *models, tokenizer)
    assert (exported / "model_index.json").is_file()


def test_a_run_without_checkpoints_is_told(tmp_path, capsys):
    assert export_demo.main(["--wan", str(tmp_path), "--vae", str(tmp_path), "--text", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
