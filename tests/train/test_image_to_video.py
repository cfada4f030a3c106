"""Training an image-to-video model: what its shards tell of first frames and images reaches the recipes, in buckets of
several shapes."""

import json

import numpy as np
import pytest
from small_wan import latents_shape, tiny_wan, write_data

from convert.checkpoint import open_checkpoint
from train.buckets import Bucket
from train.cli import main as train
from train.demo_media import main as demo_media
from train.encode import main as encode
from train.recipe import prepared
from train.recipes import finetune

BUCKETS = (Bucket(width=48, height=32, frames=5), Bucket(width=32, height=32, frames=9))
SHORT = ["steps=4", "save_every=4", "log_every=1", "batch=2", "mesh=fsdp=1", "warmup=1", "dtype=float32", "remat=none"]
RECIPES = {"finetune": ["learning_rate=0.01"], "coredit": ["ramp_every=1", "ratio=0.1", "learning_rate=0.01"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i2v") / "model"
    tiny_wan().image_to_video().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    def more(latents):
        return {"image": (5, 20), "first_frame": (*latents[:-1], 8)}

    return write_data(tmp_path_factory.mktemp("encoded") / "data", model, BUCKETS, more)


def run(recipe, model, data, out, *more):
    words = [*SHORT, f"model={model}", f"data={data}", f"out={out}", f"export={out}-model", *more]
    return train([recipe, *(word for each in words for word in ("--set", each))])


def weights(model):
    return {name: leaf.rectangle(None) for name, leaf in open_checkpoint(model).leaves("transformer").items()}


@pytest.mark.parametrize("recipe", [pytest.param("finetune", marks=pytest.mark.long), "coredit"])
def test_a_recipe_trains_on_buckets_of_several_shapes(model, data, tmp_path, recipe):
    out = tmp_path / "run"
    assert run(recipe, model, data, out, *RECIPES[recipe]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    before, after = weights(model), weights(f"{out}-model")
    # What is made of images is learnt too: they are told.
    told = [name for name in before if "image" in name]
    assert told and all(not np.array_equal(before[name], after[name]) for name in told if name.endswith("kernel"))


def test_batches_have_what_the_shards_tell(model, data, tmp_path):
    config = finetune.Config(
        model=model, data=data, out=str(tmp_path), batch=2, mesh="fsdp=1", dtype="float32", caption_dropout=1.0
    )
    ready = prepared(config, finetune.training)
    found = [ready.batch_at(position) for position in range(4)]
    shapes = {batch["latents"].shape[1:] for batch in found}
    assert shapes == {latents_shape(bucket) for bucket in BUCKETS}
    for batch in found:
        assert batch["extra"].shape == (*batch["latents"].shape[:-1], 8) and "first_frame" not in batch
        assert batch["image"].shape == (2, 5, 20)
        assert all(batch[name].std() > 0.5 for name in ("latents", "extra", "image"))
        np.testing.assert_array_equal(batch["text"], np.stack([np.eye(6, 24) * (np.arange(6) == 0)[:, None]] * 2))


def test_clips_are_encoded_with_their_first_frames(model, tmp_path):
    clips, out = tmp_path / "clips", tmp_path / "data"
    assert demo_media(["--clips", "3", "--out", str(clips)]) == 0
    words = ["--videos", str(clips), "--captions", str(clips / "metadata.jsonl"), "--buckets", "32x32x5"]
    assert encode(["--model", model, *words, "--out", str(out)]) == 0
    assert run("finetune", model, out, tmp_path / "run") == 0
