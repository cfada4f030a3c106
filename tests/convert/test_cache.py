"""The cache of converted weights: exact, converted once, noticed when source or entry change, bounded, shared."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.cache import MANIFEST, Cache, with_cached_weights
from convert.checkpoint import Checkpoint, checkpoint_hash, open_checkpoint
from convert.transfer import convert
from dit_jax.config import UserError

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
COMPONENTS = ("text_encoder", "transformer", "vae")


@dataclass(frozen=True, kw_only=True)
class Watched(Cache):
    """A cache that remembers what it was busy with: `hashing`, `converting`."""

    stages: list[str] = field(default_factory=list)

    def tell(self, stage, size):
        self.stages.append(stage.split()[0])


def settled(folder):
    """A folder whose files were last changed a minute ago."""
    for file in filter(Path.is_file, folder.rglob("*")):
        os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns - 60 * 10**9))
    return folder


@pytest.fixture
def source(text_pipeline, tmp_path):
    return settled(shutil.copytree(text_pipeline, tmp_path / "source"))


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def opened(source, folder, **options):
    """(the checkpoint through the cache, what the cache was busy with)."""
    cache = Watched(folder=folder, **options)
    return with_cached_weights(open_checkpoint(source), cache), cache.stages


def values(checkpoint, name="transformer"):
    return {key: leaf.block(None) for key, leaf in checkpoint.leaves(name).items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and value.tobytes() == other[key].tobytes(), key


def entries(folder):
    return sorted((folder / "weights").iterdir())


def test_weights_are_converted_once_and_bit_for_bit(source, tmp_path, monkeypatch):
    _, stages = opened(source, tmp_path / "cache")
    assert stages == ["hashing", "converting"] * 3
    expected = {name: values(open_checkpoint(source), name) for name in COMPONENTS}
    monkeypatch.setattr(Checkpoint, "tensors", lambda *_: pytest.fail("the source's weights were opened"))
    again, stages = opened(source, tmp_path / "cache")
    assert stages == []
    for name in COMPONENTS:
        assert_same(values(again, name), expected[name])
    assert checkpoint_hash(again) == checkpoint_hash(source)


def test_native_checkpoints_are_not_cached(source, tmp_path):
    convert(open_checkpoint(source), tmp_path / "native", "native")
    checkpoint, stages = opened(tmp_path / "native", tmp_path / "cache")
    assert stages == [] and not checkpoint.converted and not (tmp_path / "cache").exists()


def test_the_same_files_elsewhere_are_hashed_and_not_converted(source, tmp_path):
    opened(source, tmp_path / "cache")
    shutil.copytree(source, tmp_path / "copy")
    _, stages = opened(tmp_path / "copy", tmp_path / "cache")
    assert stages == ["hashing"] * 3


def test_an_original_checkpoint_is_cached_too(source, tmp_path):
    convert(open_checkpoint(source), tmp_path / "original", "original")
    opened(settled(tmp_path / "original"), tmp_path / "cache")
    checkpoint, stages = opened(tmp_path / "original", tmp_path / "cache")
    assert stages == []
    assert_same(values(checkpoint), values(open_checkpoint(source)))


def test_a_source_changed_in_place_is_noticed(source, tmp_path):
    opened(source, tmp_path / "cache")
    with open(source / TRANSFORMER, "r+b") as file:  # the lowest bit of the last number
        file.seek(-2, os.SEEK_END)
        low = file.read(1)[0]
        file.seek(-2, os.SEEK_END)
        file.write(bytes([low ^ 1]))
    changed, stages = opened(source, tmp_path / "cache")
    assert stages == ["hashing", "converting"]
    assert_same(values(changed), values(open_checkpoint(source)))


def test_another_config_is_another_entry(source, tmp_path):
    opened(source, tmp_path / "cache")
    place = source / "transformer" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"eps": 1e-5}))
    _, stages = opened(source, tmp_path / "cache")
    assert stages == ["converting"] and len(entries(tmp_path / "cache")) == 4


def test_a_file_that_has_just_changed_is_not_remembered(source, tmp_path):
    os.utime(source / TRANSFORMER)
    opened(source, tmp_path / "cache")
    _, stages = opened(source, tmp_path / "cache")
    assert stages == ["hashing"]


def a_chunk(entry):
    return max((file for file in entry.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def edited(file):
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a file is missing": lambda entry: a_chunk(entry).unlink(),
    "a file is truncated": lambda entry: a_chunk(entry).write_bytes(b"short"),
    "a file was edited": lambda entry: edited(a_chunk(entry)),
    "the list of files is missing": lambda entry: (entry / MANIFEST).unlink(),
    "the list of files is damaged": lambda entry: (entry / MANIFEST).write_text("[]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_made_again_with_a_warning(kind, source, tmp_path):
    checkpoint, _ = opened(source, tmp_path / "cache")
    DAMAGE[kind](checkpoint.converted["transformer"].parent)
    with pytest.warns(UserWarning, match="cached weights in .* are damaged: they are converted again") as caught:
        again, stages = opened(source, tmp_path / "cache")
    told = [str(each.message) for each in caught if "damaged" in str(each.message)]
    assert len(told) == 1 and "\n" not in told[0]
    assert stages == ["converting"]
    assert_same(values(again), values(open_checkpoint(source)))
    assert len(entries(tmp_path / "cache")) == 3
    assert opened(source, tmp_path / "cache")[1] == []


def one_of(source, folder, number):
    """A lone transformer with weights of its own."""
    shutil.copytree(source / "transformer", folder)
    file = folder / Path(TRANSFORMER).name
    save_file({key: tensor + tensor.dtype.type(number) for key, tensor in load_file(file).items()}, file)
    return settled(folder)


def test_the_least_recently_used_are_removed_for_room(source, tmp_path):
    folders = [one_of(source, tmp_path / f"model{number}", number) for number in range(3)]
    cache = tmp_path / "cache"
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in open_checkpoint(folders[0]).leaves("").values())
    limit = 3 * size  # room for two with their metadata
    opened(folders[0], cache, limit=limit)
    opened(folders[1], cache, limit=limit)
    assert opened(folders[0], cache, limit=limit)[1] == []  # used again: now the other is the oldest
    assert opened(folders[2], cache, limit=limit)[1] == ["hashing", "converting"]
    assert len(entries(cache)) == 2
    assert opened(folders[0], cache, limit=limit)[1] == []
    assert opened(folders[1], cache, limit=limit)[1] == ["converting"]


def test_an_entry_in_use_is_not_removed(source, tmp_path):
    folders = [one_of(source, tmp_path / f"model{number}", number) for number in range(2)]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in open_checkpoint(folders[0]).leaves("").values())
    used, _ = opened(folders[0], tmp_path / "cache", limit=2 * size)
    with pytest.warns(UserWarning, match=r"the model needs .* more than is free or unused .*from .*model1"):
        other, _ = opened(folders[1], tmp_path / "cache", limit=2 * size)
    assert_same(values(other, ""), values(open_checkpoint(folders[1]), ""))
    assert_same(values(used, ""), values(open_checkpoint(folders[0]), ""))
    del used
    assert opened(folders[1], tmp_path / "cache", limit=2 * size)[0].converted
    assert len(entries(tmp_path / "cache")) == 1


def test_what_exceeds_the_limit_is_read_from_the_source(source, tmp_path):
    with pytest.warns(UserWarning, match="needs .* more than is free or unused") as caught:
        checkpoint, _ = opened(source, tmp_path / "cache", limit=1000)
    assert sum("needs" in str(each.message) for each in caught) == 3 and not entries(tmp_path / "cache")
    assert_same(values(checkpoint), values(open_checkpoint(source)))


def test_a_full_disk_leaves_nothing_and_stops_nobody(source, tmp_path, largest_file):
    lone = one_of(source, tmp_path / "model", 0)
    with (
        pytest.warns(UserWarning, match="the model cannot be kept in .*: it is read from its source"),
        largest_file(2000),
    ):
        checkpoint, _ = opened(lone, tmp_path / "cache")
    assert not entries(tmp_path / "cache")
    assert_same(values(checkpoint, ""), values(open_checkpoint(lone), ""))


def test_damage_in_the_source_is_an_error_and_no_entry(source, tmp_path):
    lone = one_of(source, tmp_path / "model", 0)
    tensors = load_file(lone / Path(TRANSFORMER).name)
    tensors["proj_out.bias"][0] = np.nan
    save_file(tensors, lone / Path(TRANSFORMER).name)
    with pytest.raises(UserError, match=r"proj_out\.bias holds NaN"):
        opened(lone, tmp_path / "cache")
    assert not entries(tmp_path / "cache")


def test_a_cache_that_cannot_be_made_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file cannot be a cache \(.*\); expected a folder to write in"):
        opened(source, tmp_path / "file")


def test_what_killed_processes_left_is_removed(source, tmp_path):
    lone = one_of(source, tmp_path / "model", 0)
    (entry,) = (checkpoint.converted[""].parent for checkpoint in [opened(lone, tmp_path / "cache")[0]])
    shutil.copytree(entry, entry.with_name(f"{entry.name}.partial-99999"))
    (lone / Path(TRANSFORMER).name).rename(tmp_path / "away.safetensors")
    opened(one_of(source, tmp_path / "other", 1), tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 2 and entry in entries(tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "hashes").iterdir())) == 1


AT_ONCE = """
import sys, time
from pathlib import Path
from convert.cache import Cache, with_cached_weights
from convert.checkpoint import open_checkpoint

class Told(Cache):
    def tell(self, stage, size):
        print(stage.split()[0], flush=True)
        time.sleep(0.5)

checkpoint = open_checkpoint(sys.argv[1])
while not Path(sys.argv[3]).exists():
    time.sleep(0.01)
cached = with_cached_weights(checkpoint, Told(folder=Path(sys.argv[2])))
read = {name: {k: leaf.block(None) for k, leaf in cached.leaves(name).items()} for name in cached.settings}
own = {name: {k: leaf.block(None) for k, leaf in checkpoint.leaves(name).items()} for name in cached.settings}
assert len(cached.converted) == 3
assert all(read[name][k].tobytes() == v.tobytes() for name, leaves in own.items() for k, v in leaves.items())
"""


def test_two_processes_at_once_convert_once(source, tmp_path):
    command = [sys.executable, "-c", AT_ONCE, str(source), str(tmp_path / "cache"), str(tmp_path / "go")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    (tmp_path / "go").touch()
    told = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    stages = [line for out, _ in told for line in out.split()]
    assert stages.count("converting") == 3
    assert len(entries(tmp_path / "cache")) == 3 and opened(source, tmp_path / "cache")[1] == []
