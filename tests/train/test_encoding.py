"""The work of dit-encode without any model: portions, several hosts, stops, and what is told of bad media."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fake_encoders
import numpy as np
import pytest
from PIL import Image

from dit_jax.config import UserError
from train import encoding
from train.buckets import Bucket
from train.captions_file import Caption
from train.encoding import Encoding, Job
from train.shards import MANIFEST, open_shards

SQUARE, WIDE = (Bucket(width=w, height=32, frames=1) for w in (32, 48))


@pytest.fixture(autouse=True)
def _without_weights(monkeypatch):
    monkeypatch.setattr(encoding, "encoder_hashes", fake_encoders.hashes)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Eight pictures of two ratios; two are damaged, one is missing, one has no caption."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for number in range(8):
        size = (32, 48, 3) if number % 3 == 1 else (40, 40, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:700])
    (folder / "5.png").write_bytes(b"")
    lines = [{"file_name": f"{number}.png", "text": f"picture {number}"} for number in (0, 1, 2, 3, 4, 5, 6, 9)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def job(media, tmp_path):
    captions = [Caption(f"{number}.png", f"picture {number}") for number in (0, 1, 2, 3, 4, 5, 6, 9)]
    return Job(
        out=tmp_path / "data", media=media, captions=captions, buckets=(SQUARE, WIDE), batch=2, portion=3, fps=0.0
    )


def run(job, portions=None):
    encoders = fake_encoders.FakeEncoders()
    with pytest.warns(UserWarning, match="left out") if portions is None else pytest.warns():
        manifest = Encoding(job, encoders).run(job.portions if portions is None else portions)
    return manifest, encoders.encoded


def test_examples_are_in_their_buckets_with_their_captions(job):
    manifest, _ = run(job)
    shards = open_shards(job.out)
    assert shards.manifest == manifest
    files = {
        bucket: [one.file for one in shards.read(bucket, range(shards.count(bucket)))] for bucket in shards.buckets
    }
    assert files == {SQUARE: ["0.png", "3.png", "6.png"], WIDE: ["1.png", "4.png"]}
    with Image.open(job.media / "4.png") as image:
        expected = np.asarray(image)[::8, ::8] / np.float32(256)
    found = shards.read(WIDE, [1])[0]
    np.testing.assert_array_equal(found.arrays["latents"][0], expected.astype(np.float16))
    assert found.caption == "picture 4" and found.arrays["text"][8 - 1, 0] == ord(" ")
    assert manifest.text == (8, 2) and shards.empty["text"].tolist() == [[1, 0]]


def test_unusable_media_are_told_and_listed(job):
    job = replace(job, captions=[*job.captions, Caption("../0.png", "x"), Caption("0.png", "  ")])
    manifest, _ = run(job)
    told = {one["file"]: one["reason"] for one in manifest.skipped if one["file"] not in ("0.png", "../0.png")}
    assert told.keys() == {"2.png", "5.png", "9.png", "7.png"}
    assert "cannot be read" in told["2.png"] and "cannot be read" in told["5.png"]
    assert told["9.png"] == "there is no such file" and told["7.png"] == "it has no caption"
    assert {"file": "0.png", "reason": "its caption is empty"} in manifest.skipped
    assert any(one["file"] == "../0.png" and "outside" in one["reason"] for one in manifest.skipped)
    assert manifest.examples == 5


def test_a_run_that_is_killed_anywhere_ends_like_one_that_is_not(media, tmp_path):
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tests / "killed_encoder.py"), str(media), str(tmp_path)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parents[1]), str(tests)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 20


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_hosts_make_parts_and_the_last_writes_the_manifest(job, tmp_path):
    run(job)
    parted = replace(job, out=tmp_path / "parted")
    first, encoded = run(parted, parted.of_part(1, 2))
    assert first is None and encoded == 4 and not (parted.out / MANIFEST).exists()
    second, _ = run(parted, parted.of_part(0, 2))
    assert second is not None and contents(parted.out) == contents(job.out)


def test_hosts_may_end_at_the_same_time(job, monkeypatch):
    """Two containers, whose processes have one number: the second does all its last work while the first is about to
    give the manifest, and then a file of a portion, its name."""
    host = "first"
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    run(job)
    before = contents(job.out)
    portion = job.out / "portions" / "000001.json"
    replace_file = Path.replace

    def overtaken(self, target):
        nonlocal host
        if host == "first" and target == awaited:
            host = "second"
            run(job)
            host = "first"
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", overtaken)
    for awaited in (job.out / MANIFEST, portion):
        awaited.unlink()
        run(job)
        assert contents(job.out) == before


def test_what_is_half_written_goes_when_it_is_ones_own_or_old(job, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "one")
    run(job)
    before = contents(job.out)
    names = (f"one.{os.getpid()}", f"two.{os.getpid()}", f"one.{os.getpid()}0")
    files = [folder / f".x.json.{name}.partial" for folder in (job.out, job.out / "portions") for name in names]
    for file in files:
        file.write_text("half")
    run(job)
    assert contents(job.out).keys() - before.keys() == {
        file.relative_to(job.out) for file in files if f"one.{os.getpid()}." not in file.name
    }
    for file in files:
        if file.exists():
            os.utime(file, (time.time() - 3700,) * 2)
    run(job)
    assert contents(job.out) == before


def test_what_is_done_is_not_done_again(job):
    run(job)
    before = contents(job.out)
    _, encoded = run(job)
    assert encoded == 0 and contents(job.out) == before


def test_a_shard_that_was_removed_is_made_again(job):
    manifest, _ = run(job)
    before = contents(job.out)
    (job.out / manifest.shards[1].file).unlink()
    _, encoded = run(job)
    assert encoded == 4 and contents(job.out) == before


def test_captions_may_be_added_and_changed(job, tmp_path):
    run(job)
    grown = replace(job, captions=[*job.captions, Caption("7.png", "seven")])
    manifest, encoded = run(grown)
    assert encoded == 4 and manifest.examples == 6 and "7.png" not in {one["file"] for one in manifest.skipped}
    straight = replace(grown, out=tmp_path / "straight")
    run(straight)
    assert contents(grown.out) == contents(straight.out)
    manifest, _ = run(replace(job, captions=job.captions[:3]))
    assert manifest.examples == 2 and len(list(job.out.glob("*.array_record"))) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"buckets": (SQUARE,)}, 'holds data of buckets ["32x32x1", "48x32x1"], this run has ["32x32x1"]'),
        ({"portion": 4}, "holds data of portion 3, this run has 4"),
        ({"fps": 8.0}, "holds data of fps 0.0, this run has 8.0"),
    ],
)
def test_a_folder_holds_data_of_one_setting(change, told, job):
    run(job)
    before = contents(job.out)
    with pytest.raises(UserError) as raised:
        Encoding(replace(job, **change), fake_encoders.FakeEncoders()).run(job.portions)
    assert told in str(raised.value) and "name another --out" in str(raised.value)
    assert contents(job.out) == before


def test_another_vae_is_refused(job, monkeypatch):
    run(job)
    monkeypatch.setattr(encoding, "encoder_hashes", lambda _: fake_encoders.hashes(_) | {"vae": "cccccccccc"})
    with pytest.raises(UserError, match=r'holds data of encoders .*aaaaaaaaaa.*, this run has .*"vae": "cccccccccc"'):
        Encoding(job, fake_encoders.FakeEncoders()).run(job.portions)


def test_no_usable_medium_at_all(job):
    useless = replace(job, captions=job.captions[2:3])
    with pytest.raises(UserError, match=r"none of the 8 media .*\(2.png: the image cannot be read"), pytest.warns():
        Encoding(useless, fake_encoders.FakeEncoders()).run(useless.portions)
    assert not (job.out / MANIFEST).exists()


def test_a_failure_leaves_no_half_shard(job, monkeypatch):
    def broken(self, captions, bucket, video):
        if bucket == WIDE:
            raise RuntimeError("out of memory")
        return encode(self, captions, bucket, video)

    encode = fake_encoders.FakeEncoders.encode
    monkeypatch.setattr(fake_encoders.FakeEncoders, "encode", broken)
    with pytest.raises(RuntimeError, match="out of memory"), pytest.warns():
        Encoding(job, fake_encoders.FakeEncoders()).run(job.portions)
    assert not [file for file in job.out.rglob("*") if file.is_file()]


def test_no_manifest_tells_of_shards_that_are_being_replaced(job, monkeypatch):
    run(job)
    changed = replace(job, captions=[Caption("1.png", "another"), *job.captions[1:]])
    monkeypatch.setattr(fake_encoders.FakeEncoders, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Encoding(changed, fake_encoders.FakeEncoders()).run(changed.portions)
    assert not (job.out / MANIFEST).exists()
