"""The exported demo-flux: complete, readable by our own pipeline, and replaced as a whole or not at all."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.checkpoint import load_model, open_checkpoint
from dit_jax.config import UserError
from dit_jax.models.clip_text import CLIPText
from dit_jax.models.flux import Flux
from dit_jax.models.t5 import T5Encoder
from dit_jax.models.vae_kl import AutoencoderKL
from dit_jax.parameters import named_leaves
from infer.digit_grammar import PICTURES, all_picture_captions_sample
from infer.loading import load_pipeline
from train import export_demo_flux
from train.demo_tokenizer import token_ids, train_clip_tokenizer, train_tokenizer
from train.export_demo_flux import export_pipeline
from train.recipes import demo_flux, demo_flux_text, demo_flux_vae
from train.recipes.demo_flux_text import CLIP_TOKENS, T5_TOKENS, TextEncoders


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    corpus = all_picture_captions_sample(2000, 0)
    t5 = train_tokenizer(corpus, demo_flux_text.T5.vocab_size, folder / "tokenizer_2", tokens=T5_TOKENS)
    clip = train_clip_tokenizer(corpus, demo_flux_text.CLIP.vocab_size, folder / "tokenizer", tokens=CLIP_TOKENS)
    return folder, t5, clip


@pytest.fixture(scope="module")
def models(tokenizers):
    rngs = nnx.Rngs(0)
    text = TextEncoders(
        T5Encoder(demo_flux_text.T5, rngs=rngs), CLIPText(demo_flux_text.CLIP, rngs=rngs), *tokenizers[1:]
    )
    return Flux(demo_flux.SHIPPED, rngs=rngs), AutoencoderKL(demo_flux_vae.SHIPPED, rngs=rngs), text


@pytest.fixture(scope="module")
def exported(models, tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "demo"
    size = export_pipeline(folder, *models, tokenizers[0])
    assert size == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 12e6
    return folder


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_every_model_is_kept_in_bf16(models, exported, name):
    flux, vae, text = models
    sent = {"transformer": flux, "vae": vae, "text_encoder": text.clip, "text_encoder_2": text.t5}[name]
    back = dict(named_leaves(load_model(open_checkpoint(exported), name)))
    for path, leaf in named_leaves(sent):
        assert back[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(back[path], leaf.astype(jnp.bfloat16))


def test_the_pipeline_opens_with_the_demos_defaults(exported):
    pipe = load_pipeline(exported)
    assert (pipe.defaults.size, pipe.defaults.true_cfg, pipe.defaults.grammar) == ((128, 128), 3.0, "digits")
    assert pipe.shift.constant == export_demo_flux.SHIFT == demo_flux.Config().shift
    assert pipe.tokens((128, 128), 1) == 256


def test_pipeline_and_recipe_tell_the_transformer_the_same(models, exported):
    captions = ["two green 4s left of a white 9", "a red 7"]
    told = demo_flux._embed(models[2], captions)
    text, pooled = load_pipeline(exported, dtype=jnp.float32).encode_text(captions)
    np.testing.assert_allclose(told["text"], text, rtol=0.1, atol=0.05)
    np.testing.assert_allclose(told["pooled"], pooled, rtol=0.1, atol=0.05)


def test_every_word_is_one_piece_and_the_longest_caption_fits(tokenizers):
    _, t5, clip = tokenizers
    for word in PICTURES.words:
        assert len(t5(f"a {word}", add_special_tokens=False).input_ids) == 2
        # CLIP cuts round digits: "4s" is two pieces.
        assert len(clip(word, add_special_tokens=False).input_ids) == (2 if word[:-1].isdigit() else 1)
    longest = "two purple 4s right of two yellow 9s on a checkered background"
    for tokenizer in (t5, clip):
        ids, valid = token_ids(tokenizer, [longest])
        assert len(tokenizer(longest).input_ids) == valid.sum() <= ids.shape[1]


def test_the_same_captions_give_the_same_clip_tokenizer(tokenizers, tmp_path):
    train_clip_tokenizer(all_picture_captions_sample(2000, 0), demo_flux_text.CLIP.vocab_size, tmp_path, CLIP_TOKENS)
    for file in (tokenizers[0] / "tokenizer").iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match="vocab_size"):
        train_clip_tokenizer(["a red 7"], 20, tmp_path, CLIP_TOKENS)
    assert not list(tmp_path.iterdir())


def test_too_large_a_pipeline_leaves_the_old_one(models, tokenizers, exported, monkeypatch):
    before = (exported / "transformer" / "config.json").stat().st_mtime_ns
    monkeypatch.setattr(export_demo_flux, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="expected at most 1,000"):
        export_pipeline(exported, *models, tokenizers[0])
    assert (exported / "transformer" / "config.json").stat().st_mtime_ns == before


def test_a_run_without_checkpoints_is_told(tmp_path, capsys):
    assert export_demo_flux.main(["--flux", str(tmp_path), "--vae", str(tmp_path), "--text", str(tmp_path)]) == 2
    assert "is no checkpoint" in capsys.readouterr().err
