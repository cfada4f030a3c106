"""What a transformer is trained on is what its pipeline makes and tells it."""

import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from convert.checkpoint import open_checkpoint
from convert.transfer import convert
from dit_jax.config import UserError
from infer import load_pipeline
from infer.request import Job
from train import encoders
from train.buckets import Bucket
from train.encoders import encoder_hashes, load_encoders

BUCKET = Bucket(width=32, height=48, frames=5)
CAPTIONS = ["a red cat runs", "the dog sleeps on the moon"]


@pytest.fixture(scope="module")
def tiny_wan():
    """Small random pipelines of every kind."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "infer"))
    import tiny_wan

    yield tiny_wan
    sys.path.pop(0)


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(0).integers(0, 256, (2, 5, 48, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["image_to_video", "first_and_last", "two_experts", "text_or_image"])
def test_a_wan_is_told_what_its_pipeline_tells_it(kind, tiny_wan, video, tmp_path):
    made = {
        "image_to_video": tiny_wan.image_to_video,
        "first_and_last": lambda: tiny_wan.image_to_video(first_and_last=True),
        "two_experts": lambda: tiny_wan.two_experts(image=True),
        "text_or_image": tiny_wan.text_or_image,
    }[kind]()
    made.save_pretrained(tmp_path / kind)
    made_of, pipe = load_encoders(tmp_path / kind), load_pipeline(tmp_path / kind)
    # Its latents are 16 pixels wide and high, and two of them a patch.
    bucket = Bucket(width=32, height=32, frames=5) if kind == "text_or_image" else BUCKET
    video = video[:, :, : bucket.height]
    found = made_of.encode(CAPTIONS, bucket, video)
    first, last = ([Image.fromarray(frame) for frame in video[:, place]] for place in (0, -1))
    job = Job(
        prompts=CAPTIONS, negative_prompts=[""] * 2, seeds=[0] * 2, size=bucket.size, frames=5, steps=4, guidance=1.0,
        true_cfg=1.0,
        solver="unipc", images=first if pipe.limits.image == "always" else None,
        last_images=last if kind == "first_and_last" else None,
    )  # fmt: skip
    told = pipe.stages(job, pipe.schedule(job))[-1].denoiser()
    np.testing.assert_allclose(found["text"], told.conditioning.text, atol=1e-6)
    np.testing.assert_allclose(found["text"], pipe.encode_text(CAPTIONS), atol=1e-6)
    with_tower = kind in ("image_to_video", "first_and_last")
    assert ("image" in found, "first_frame" in found) == (with_tower, kind != "text_or_image")
    if with_tower:
        np.testing.assert_allclose(found["image"], told.conditioning.image, atol=1e-5)
    if "first_frame" in found:
        np.testing.assert_allclose(found["first_frame"], told.extra, atol=1e-5)
        assert found["first_frame"].shape == (2, 2, 6, 4, 8)
    assert found["latents"].shape == (2, *pipe.latents_shape(bucket.size, 5))


def test_latents_are_the_pipeline_s_own(tiny_wan, video, tmp_path):
    """Against diffusers: the mean of the latents, normalised as its pipelines do."""
    import torch

    made = tiny_wan.text_to_video()
    made.save_pretrained(tmp_path / "t2v")
    found = load_encoders(tmp_path / "t2v").encode(CAPTIONS, BUCKET, video)["latents"]
    pixels = torch.from_numpy(video).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        mean = made.vae.encode(pixels).latent_dist.mode().permute(0, 2, 3, 4, 1).numpy()
    config = made.vae.config
    expected = (mean - np.array(config.latents_mean)) / np.array(config.latents_std)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5


def test_transformers_stay_on_disk():
    loaded = load_encoders("demo-wan")
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(loaded.transformer))
    assert not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(loaded.vae))


def test_hashes_tell_weights_and_not_layouts(tmp_path):
    source = open_checkpoint("demo-flux")
    found = encoder_hashes(source)
    assert list(found) == ["vae", "text_encoder", "text_encoder_2"] and len(set(found.values())) == 3
    convert(source, tmp_path / "native", "native")
    assert encoder_hashes(open_checkpoint(tmp_path / "native")) == found
    assert encoder_hashes(open_checkpoint("demo-wan"))["vae"] != found["vae"]


def test_a_single_changed_weight_is_another_vae(tmp_path):
    shutil.copytree(open_checkpoint("demo-flux").folder, tmp_path / "other")
    file = tmp_path / "other/vae/diffusion_pytorch_model.safetensors"
    found, weights = encoder_hashes(open_checkpoint(tmp_path / "other")), load_file(file)
    name = sorted(weights)[-1]
    weights[name].reshape(-1).view(np.uint16)[-1] ^= 1
    save_file(weights, file)
    again = encoder_hashes(open_checkpoint(tmp_path / "other"))
    assert again["vae"] != found["vae"] and again["text_encoder"] == found["text_encoder"]


def test_a_large_component_is_known_by_its_first_blocks(monkeypatch):
    whole = encoder_hashes(open_checkpoint("demo-flux"))
    monkeypatch.setattr(encoders, "_WHOLE", 1000)
    assert encoder_hashes(open_checkpoint("demo-flux"))["vae"] != whole["vae"]


def test_a_lone_model_is_refused():
    with pytest.raises(UserError, match="is a lone model: expected a whole pipeline"):
        load_encoders(open_checkpoint("demo-flux").folder / "vae")
