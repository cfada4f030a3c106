"""Caches are a help, never a condition."""

import jax
import pytest

from infer import caches


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")


@pytest.mark.usefixtures("no_cache")
def test_programs_are_not_kept_where_there_is_no_folder(capsys):
    before = jax.config.jax_compilation_cache_dir
    caches.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == before
    assert capsys.readouterr().err.count("\n") == 1


def test_a_user_without_a_home(monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(caches.Path, "home", homeless)
    caches.keep_compiled_programs()
    assert "no home folder" in capsys.readouterr().err
