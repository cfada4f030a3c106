"""`dit-encode` from end to end on the models that ship, with media that this project makes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from convert.checkpoint import open_checkpoint
from dit_jax.config import UserError
from infer import load_pipeline, media
from infer.digit_pictures import make_pictures
from infer.moving_digits import ClipSpec, make_clips
from infer.similarity import psnr
from train.encode import main
from train.encoders import encoder_hashes
from train.loader import BatchSettings, batches
from train.shards import MANIFEST, open_shards

BUCKETS = ["64x64x9", "64x64x5", "96x64x9", "96x64x5"]


@pytest.fixture(scope="module", autouse=True)
def _programs(tmp_path_factory):
    """Compiled programs are kept, for these tests alone."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """(folder, file -> frames, file -> caption) of clips of two ratios and two lengths, and of some that are no use."""
    folder = tmp_path_factory.mktemp("clips")
    videos, captions, _ = make_clips(5, range(6), "train", ClipSpec(frames=13, size=96))
    parts = np.s_[:, :64, :64], np.s_[:7, 16:80, 16:80], np.s_[:, :64], np.s_[:8, 16:80], np.s_[:, :64, 32:], np.s_[:9]
    frames = {f"{i}.mp4": video[part] for i, (video, part) in enumerate(zip(videos, parts, strict=True))}
    for name, video in frames.items():
        media.save(folder / name, video, 8, {})
    told = dict(zip(frames, captions, strict=True))
    content = (folder / "0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (folder / "text.mp4").write_text("this is no video")
    media.save(folder / "short.mp4", videos[0][:4], 8, {})
    media.save(folder / "untold.mp4", videos[0][:9], 8, {})
    lines = told | dict.fromkeys(("cut.mp4", "text.mp4", "short.mp4", "gone.mp4"), "a red 7")
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in lines.items())
    )
    return folder, frames, told


@pytest.fixture(scope="module")
def encoded(clips, tmp_path_factory):
    """The folder that the command made of the clips."""
    out = tmp_path_factory.mktemp("data") / "data"
    assert main([*command(clips), "--out", str(out)]) == 0
    return out


def command(clips):
    options = ["--videos", str(clips[0]), "--captions", str(clips[0] / "metadata.jsonl"), "--shard-size", "4"]
    return ["--model", "demo-wan", *options, "--buckets", ",".join(BUCKETS)]


@pytest.fixture(scope="module")
def wan():
    return load_pipeline("demo-wan")


@jax.jit
def _decode(vae, latents):
    return vae.decode(vae.denormalise(latents))


def decoded(vae, latents):
    """uint8 frames of one example's latents."""
    return np.round((np.asarray(_decode(vae, latents[None]))[0] + 1) * 127.5).astype(np.uint8)


def cropped(video, bucket):
    """The middle of the frames that are larger than the bucket, at the size that they have."""
    top, left = (video.shape[1] - bucket.height) // 2, (video.shape[2] - bucket.width) // 2
    return video[: bucket.frames, top : top + bucket.height, left : left + bucket.width]


def test_the_latents_of_clips_are_the_clips(clips, encoded, wan):
    shards = open_shards(encoded)
    assert {bucket.name for bucket in shards.buckets} == set(BUCKETS)
    seen = {}
    for bucket in shards.buckets:
        for one in shards.read(bucket, range(shards.count(bucket))):
            assert one.caption == clips[2][one.file]
            latents = one.arrays["latents"].astype(np.float32)
            assert latents.shape == shards.manifest.latents[bucket.name]
            seen[one.file] = bucket.name
            if one.file == "5.mp4":
                continue  # a square of 96, which has been made smaller
            shown = decoded(wan.vae, latents)
            assert psnr(shown, cropped(clips[1][one.file], bucket)) > 22, one.file
    assert seen == dict(zip([f"{i}.mp4" for i in range(6)], [*BUCKETS, "64x64x9", "64x64x9"], strict=True))


def test_a_record_s_text_is_the_pipeline_s_own(encoded, wan):
    shards = open_shards(encoded)
    for bucket in shards.buckets:
        examples = shards.read(bucket, range(shards.count(bucket)))
        expected = np.asarray(wan.encode_text([one.caption for one in examples]))
        for one, text in zip(examples, expected, strict=True):
            stored = one.arrays["text"]
            assert 0 < len(stored) < shards.manifest.text[0] == text.shape[0]
            np.testing.assert_allclose(stored, text[: len(stored)], rtol=1e-3, atol=1e-3)
            assert not text[len(stored) :].any()
    np.testing.assert_allclose(shards.empty["text"], np.asarray(wan.encode_text([""]))[0, :1], rtol=1e-3, atol=1e-3)


def test_batches_of_what_was_encoded(encoded):
    loader = batches(open_shards(encoded), BatchSettings(batch=2))
    for position in range(3):
        batch = loader(position)
        assert batch["latents"].shape[0] == 2 and batch["text"].shape == (2, 32, 128)
        assert batch.keys() == {"latents", "text"}


def test_unusable_media_are_listed_and_warned_of(clips, tmp_path, capsys, encoded):
    shutil.copytree(encoded, tmp_path / "data")
    (tmp_path / "data/portions/000001.json").unlink()
    (tmp_path / "data/portions/000002.json").unlink()
    assert main([*command(clips), "--out", str(tmp_path / "data"), "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert (report["examples"], report["skipped"], report["finished"]) == (6, 5, True)
    skipped = {one["file"]: one["reason"] for one in json.loads((tmp_path / "data" / MANIFEST).read_text())["skipped"]}
    assert skipped.keys() == {"cut.mp4", "text.mp4", "short.mp4", "gone.mp4", "untold.mp4"}
    assert "4 frames at 8 a second are too few: the shortest bucket has 5" in skipped["short.mp4"]
    for name, reason in skipped.items():
        assert f"warning: {name} is left out: {reason}" in printed.err
    assert (tmp_path / "data" / MANIFEST).read_bytes() == (encoded / MANIFEST).read_bytes()


def test_the_data_are_for_their_model_alone(encoded):
    shards = open_shards(encoded)
    shards.check_matches(encoder_hashes(open_checkpoint("demo-wan")), "demo-wan")
    with pytest.raises(UserError, match=r"is for the vae \w{10} \(of demo-wan\), demo-flux has the vae \w{10}"):
        shards.check_matches(encoder_hashes(open_checkpoint("demo-flux")), "demo-flux")


def test_pictures(tmp_path):
    """demo-flux, captions from a .csv, both encoders' embeddings, a last group that is not full."""
    pictures, captions, _ = make_pictures(3, range(5), "train")
    (tmp_path / "in").mkdir()
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            media.save(tmp_path / f"in/{number}.png", (picture if number else picture[:, 16:112])[None], 8, {})
            rows.writerow([f"{number}.png", caption])
    options = ["--images", str(tmp_path / "in"), "--captions", str(tmp_path / "captions.csv"), "--batch", "3"]
    out = tmp_path / "data"
    assert main(["--model", "demo-flux", *options, "--buckets", "128x128,96x128", "--out", str(out)]) == 0
    shards, pipe = open_shards(out), load_pipeline("demo-flux")
    assert [shards.count(bucket) for bucket in shards.manifest.buckets] == [4, 1] and shards.manifest.fps == 0
    square, tall = shards.manifest.buckets
    examples = shards.read(square, range(4))
    assert [one.file for one in examples] == ["1.png", "2.png", "3.png", "4.png"]
    text, pooled = map(np.asarray, pipe.encode_text([one.caption for one in examples]))
    for row, one in enumerate(examples):
        # What FLUX is told of the padding are states like any: all of them are kept.
        np.testing.assert_allclose(one.arrays["text"], text[row], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(one.arrays["pooled"], pooled[row], rtol=1e-3, atol=1e-3)
        latents = one.arrays["latents"].astype(np.float32)
        assert latents.shape == (1, 32, 32, 4) and psnr(decoded(pipe.vae, latents)[0], pictures[row + 1]) > 29
    assert shards.read(tall, [0])[0].arrays["latents"].shape == (1, 32, 24, 4)
    batch = batches(shards, BatchSettings(batch=4)).at(0)
    assert batch["text"].shape == (4, 16, 96) and batch["pooled"].shape == (4, 64)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"--videos": "nowhere"}, "there is no folder nowhere"),
        ({"--captions": "nowhere.jsonl"}, "cannot read the captions in 'nowhere.jsonl'"),
        ({"--part": "3/2"}, "--part '3/2' is not understood"),
        ({"--batch": "0"}, "--batch is 0: expected a number above 0"),
        ({"--fps": "nan"}, "--fps is nan"),
        ({"--model": "demo-flux"}, "demo-flux makes pictures, found --videos"),
        ({"--buckets": "60x64x9"}, "bucket 60x64x9 does not fit the model: expected sides that 16 divides"),
        ({"--model": "nothing"}, "there is no nothing"),
    ],
)
def test_bad_input_is_one_sentence(options, told, clips, tmp_path, capsys):
    given = ["--model", "demo-wan", "--videos", str(clips[0]), "--captions", str(clips[0] / "metadata.jsonl")]
    given += ["--out", str(tmp_path / "data")]
    for name, value in options.items():
        given += [name, value]
    assert main(given) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("dit-encode: ") and told in message and not (tmp_path / "data").exists()


@pytest.mark.long
def test_the_command_killed_ends_like_one_that_is_not(clips, encoded, tmp_path):
    """SIGKILL to the real command, whenever another file has appeared."""
    call = [sys.executable, "-m", "train.encode", *command(clips), "--out", str(tmp_path / "data")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for count in (1, 3):
        running = subprocess.Popen(call, env=environment, stderr=subprocess.DEVNULL)
        while running.poll() is None and len(list((tmp_path / "data").rglob("0*"))) < count:
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        assert not (tmp_path / "data" / MANIFEST).exists()
    assert subprocess.run(call, env=environment, capture_output=True).returncode == 0
    for file in encoded.rglob("*"):
        if file.is_file():
            assert (tmp_path / "data" / file.relative_to(encoded)).read_bytes() == file.read_bytes(), file
