"""Training data on disk: records, the manifest, and damage to either."""

import dataclasses
import json

import numpy as np
import pytest
from small_data import BUCKETS, COUNTS, ENCODERS, TEXT, example, write_data

from dit_jax.config import UserError
from train.shards import MANIFEST, Example, Manifest, ShardWriter, of_record, open_shards, to_record

WIDE = f"000000-{BUCKETS[1].name}.array_record"


@pytest.fixture
def folder(tmp_path):
    return write_data(tmp_path / "data")


def test_a_record_is_its_example():
    made = example(BUCKETS[1], 3)
    found = of_record(to_record(made))
    assert (found.caption, found.file) == ("caption 3", "3.mp4")
    assert found.arrays.keys() == made.arrays.keys()
    for name, array in found.arrays.items():
        expected = made.arrays[name][:5] if name == "text" else made.arrays[name]
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, expected.astype(np.float16))


def test_text_is_stored_up_to_its_last_row_that_is_not_zero():
    text = np.zeros(TEXT)
    assert of_record(to_record(Example({"text": text}, "", ""))).arrays["text"].shape == (0, 4)
    text[3, 1] = 1
    assert of_record(to_record(Example({"text": text}, "", ""))).arrays["text"].shape == (4, 4)
    text[5, 0] = 1
    np.testing.assert_array_equal(of_record(to_record(Example({"text": text}, "", ""))).arrays["text"], text)


def test_the_same_examples_are_the_same_bytes(folder, tmp_path):
    """Or a run that was stopped would end with other checksums."""
    again = write_data(tmp_path / "again")
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_values_that_are_no_numbers_are_refused(value, tmp_path):
    made = example(BUCKETS[0], 0)
    made.arrays["latents"][1, 2, 3, 0] = value
    with pytest.raises(UserError, match=r"the latents of 0.mp4 hold values that are no numbers"):
        to_record(made)


def test_a_shard_has_no_name_until_it_is_whole(tmp_path):
    writer = ShardWriter(tmp_path / "a.array_record", "32x32x9")
    writer.write(example(BUCKETS[0], 0))
    assert not (tmp_path / "a.array_record").exists()
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_what_was_written_is_read(folder):
    shards = open_shards(folder)
    assert shards.buckets == BUCKETS and [shards.count(bucket) for bucket in BUCKETS] == list(COUNTS)
    for found, index in zip(shards.read(BUCKETS[0], [11, 0, 5, 5]), (11, 0, 5, 5), strict=True):
        expected = example(BUCKETS[0], index).arrays["latents"]
        np.testing.assert_array_equal(found.arrays["latents"], expected.astype(np.float16))
        assert found.file == f"{index}.mp4"
    assert shards.empty["text"].shape == (1, 4) and (shards.empty["pooled"] == 7).all()
    assert shards.manifest.examples == 26 and shards.manifest.skipped[0]["file"] == "x.mp4"


def test_a_manifest_is_what_it_says(folder):
    manifest = open_shards(folder).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    told = json.loads((folder / MANIFEST).read_text())
    assert told["examples"] == 26 and told["encoders"] == ENCODERS and told["shards"][0]["sha256"]


def refused(folder, **options):
    with pytest.raises(UserError) as raised:
        open_shards(folder, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_no_manifest(tmp_path):
    assert "expected a folder made by dit-encode" in refused(tmp_path)


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"examples": 25}, {"shards": None}, {"buckets": [{"width": 3}]}, {"more": 1}]
)
def test_a_manifest_that_is_none(change, folder):
    told = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(told | change))
    assert f"cannot read {folder / MANIFEST}" in refused(folder)


def test_half_a_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:700])
    assert "expected a manifest of dit-encode, format 1" in refused(folder)


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_stops_the_run_with_the_name_of_the_shard(folder):
    flip(folder / WIDE, 300)
    assert f"{folder / WIDE} is damaged: expected the SHA-256" in refused(folder)


@pytest.mark.parametrize("place", [300, 500, 700])
def test_a_flipped_bit_is_found_without_checksums_when_it_is_read(place, folder):
    flip(folder / WIDE, place)
    shards = open_shards(folder, checksums=False)
    assert len(shards.read(BUCKETS[0], range(12))) == 12
    with pytest.raises(UserError, match=f"{WIDE} is damaged"):
        shards.read(BUCKETS[1], [6, 0, 1, 2, 3, 4])


def test_a_shard_that_is_gone_or_of_another_size(folder):
    content = (folder / WIDE).read_bytes()
    (folder / WIDE).write_bytes(content[:-1])
    assert f"{folder / WIDE} has {len(content) - 1} bytes: expected {len(content)}" in refused(folder, checksums=False)
    (folder / WIDE).unlink()
    assert f"{folder / WIDE} is missing" in refused(folder, checksums=False)


def test_a_shard_with_another_number_of_records(folder):
    manifest = open_shards(folder).manifest
    first = manifest.shards[0]
    wrong = (dataclasses.replace(first, records=4), *manifest.shards[1:])
    (folder / MANIFEST).write_text(dataclasses.replace(manifest, shards=wrong).to_json())
    assert f"{first.file} holds 5 examples: expected 4" in refused(folder)


def test_hosts_share_the_checking(folder):
    shards = open_shards(folder).manifest.shards
    flip(folder / shards[3].file, 300)
    open_shards(folder, process_index=0, process_count=2)
    assert shards[3].file in refused(folder, process_index=1, process_count=2)


def test_data_for_another_model_are_refused_by_the_names_of_both(folder):
    shards = open_shards(folder)
    shards.check_matches(ENCODERS, "other")
    for component in ENCODERS:
        with pytest.raises(UserError) as raised:
            shards.check_matches(ENCODERS | {component: "cccccccccc"}, "other")
        told = str(raised.value)
        assert f"is for the {component} {ENCODERS[component]} (of small), other has the {component} cccccccccc" in told
        assert "dit-encode --model other" in told and "\n" not in told
    with pytest.raises(UserError, match="other has the image_encoder dddddddddd"):
        shards.check_matches(ENCODERS | {"image_encoder": "dddddddddd"}, "other")
