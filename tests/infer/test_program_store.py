"""A folder of compiled programs: what is damaged or not this user's own is ignored, and the folder is kept small."""

import hashlib
import logging
import os
import pickle
import stat
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import program_keys, program_store
from infer.program_store import HEADER, MAGIC, UNFINISHED, Lowered, ProgramStore
from infer.programs import Programs

LIMIT = 1 << 30
KEY, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Functions of this file are of a known version."""
    monkeypatch.setattr(program_keys, "SOURCES", (*program_keys.SOURCES, __name__))
    monkeypatch.setattr(program_keys, "_sources", lambda: "sources")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def run(folder):
    """Runs a program as a new process would; whether it was loaded."""

    def run(by=1):
        def function(x):
            return x * 2 + by

        programs = Programs(ProgramStore(folder, limit_bytes=LIMIT))
        np.testing.assert_array_equal(programs.run("name", function, jnp.ones(3)), np.full(3, 2 + by))
        return programs.loaded_count == 1

    return run


def files(folder, kind=".program"):
    return sorted(path for path in folder.iterdir() if path.suffix == kind)


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def rewritten(path, change):
    path.write_bytes(change(path.read_bytes()))


def with_content(content):
    """A change of a file that makes it whole, with this content."""

    def change(file):
        _, key, _, _ = HEADER.unpack(file[: HEADER.size])
        return HEADER.pack(MAGIC, key, len(content), hashlib.sha256(content).digest()) + content

    return change


DAMAGE = {
    "empty": lambda file: b"",
    "short": lambda file: file[:50],
    "cut off": lambda file: file[:-1],
    "longer": lambda file: file + b"\0",
    "another byte": lambda file: file[:-9] + bytes([file[-9] ^ 1]) + file[-8:],
    "another key": lambda file: file.replace(file[16:48], bytes(32), 1),
    "another kind of file": lambda file: b"\x89PNG" + file[4:],
    "no program": with_content(pickle.dumps({"a": 1})),
    "no pickle": with_content(b"no pickle"),
    "nothing": with_content(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", [".program", ".call"])
def test_what_is_damaged_is_said_once_and_compiled_again(folder, run, caplog, kind, damage):
    assert not run()
    (path,) = files(folder, kind)
    rewritten(path, DAMAGE[damage])
    assert run() == (kind == ".call")  # whose program is found once it is lowered
    assert len(warned(caplog)) == 1 and str(path) in warned(caplog)[0]
    caplog.clear()
    assert run() and warned(caplog) == []


def test_a_program_of_another_name_is_ignored(folder, run, caplog):
    run(1)
    (first,) = files(folder)
    run(2)
    (second,) = set(files(folder)) - {first}
    first.replace(second)
    assert not run(2)
    assert "not what its name says" in warned(caplog)[0]


def test_a_program_of_another_compiler_is_not_looked_at(folder, run, monkeypatch, caplog):
    assert not run()
    monkeypatch.setattr(program_keys, "_compiler_versions", lambda: [("jax", "99")])
    assert not run() and run()
    assert len(files(folder)) == 2 and warned(caplog) == []


def test_a_program_for_other_devices_than_its_arguments_is_not_kept(folder, caplog):
    store = ProgramStore(folder, limit_bytes=LIMIT)
    compiled = jax.jit(lambda x: x).lower(1.0).compile()
    assert not store.save(KEY, compiled, []) and files(folder) == []
    assert "for devices [0]" in warned(caplog)[0]


@pytest.mark.parametrize("kind", [".program", ".call"])
def test_files_that_others_could_have_written_are_refused(folder, run, caplog, kind):
    run()
    (path,) = files(folder, kind)
    path.chmod(0o620)
    run()
    assert "others may write to it" in warned(caplog)[0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # written anew


def test_links_are_not_followed(folder, run, caplog, tmp_path):
    run()
    (path,) = files(folder)
    elsewhere = tmp_path / "elsewhere"
    path.replace(elsewhere)
    path.symlink_to(elsewhere)
    assert not run()
    assert len(warned(caplog)) == 1 and not path.is_symlink()


@pytest.mark.parametrize("mode", [0o770, 0o757])
def test_a_folder_that_others_may_write_to_is_not_used(folder, run, caplog, mode):
    run()
    folder.chmod(mode)
    before = folder.stat().st_mtime_ns
    assert not run()
    assert len(warned(caplog)) == 1 and "chmod go-w" in warned(caplog)[0]
    assert folder.stat().st_mtime_ns == before


def test_a_folder_of_another_user_is_not_used(folder, run, monkeypatch, caplog):
    run()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert not run()
    assert len(warned(caplog)) == 1 and "belongs to user" in warned(caplog)[0]


def test_a_folder_that_cannot_be_made_is_said(folder, run, caplog):
    folder.write_text("a file")
    assert not run()
    assert len(warned(caplog)) == 1 and str(folder) in warned(caplog)[0]


def test_folder_and_files_are_this_users_alone(folder, run):
    run()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_nothing_behind(folder, run, monkeypatch, caplog, step):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(program_store.os, step, full)
        assert not run()
    assert list(folder.iterdir()) == []
    assert len(warned(caplog)) == 1 and "No space left" in warned(caplog)[0]
    assert not run() and run()


def trees(store, count):
    """Keeps calls that are used one after the other; their keys."""
    keys = [f"{index:064x}" for index in range(count)]
    for index, key in enumerate(keys):
        store.remember(key, Lowered(OTHER, jax.tree.structure(1)))
        os.utime(store._path(key, ".call"), (index, index))
    return keys


def test_what_was_unused_for_longest_goes_first(folder):
    one = ProgramStore(folder, limit_bytes=LIMIT)
    first, second, third = trees(one, 3)
    size = one._path(first, ".call").stat().st_size
    assert one.recall(first) == Lowered(OTHER, jax.tree.structure(1))
    small = ProgramStore(folder, limit_bytes=3 * size)
    small.remember(KEY, Lowered(OTHER, jax.tree.structure(1)))
    assert small.recall(second) is None
    assert all(small.recall(key) for key in (first, third, KEY))


def test_what_alone_is_over_the_limit_is_not_kept(folder, caplog):
    one = ProgramStore(folder, limit_bytes=LIMIT)
    (key,) = trees(one, 1)
    small = ProgramStore(folder, limit_bytes=one._path(key, ".call").stat().st_size - 1)
    small.remember(KEY, Lowered(OTHER, jax.tree.structure(1)))
    assert small.recall(KEY) is None and small.recall(key)
    assert len(warned(caplog)) == 1


def test_what_was_never_finished_goes_after_a_while(folder):
    store = ProgramStore(folder, limit_bytes=LIMIT)
    old, new = (folder / f"{name}{UNFINISHED}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    before = time.time() - program_store.ABANDONED - 60
    os.utime(old, (before, before))
    trees(store, 1)
    assert not old.exists() and new.exists()


def test_what_is_no_tree_any_more_is_ignored(folder, caplog):
    """A class of the structure is gone."""
    store = ProgramStore(folder, limit_bytes=LIMIT)
    (key,) = trees(store, 1)
    rewritten(store._path(key, ".call"), with_content(b"cnowhere\nNothing\n."))
    assert store.recall(key) is None
    assert len(warned(caplog)) == 1
