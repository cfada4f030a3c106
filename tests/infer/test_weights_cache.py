"""`dit-generate --cache-dir`: the same video, converted once, with one line for what is wrong with the cache."""

import pytest

from convert import cache
from infer import generate
from infer.media import read_metadata

ARGUMENTS = ["--prompt", "a red cat runs", "--size", "48x32", "--frames", "5", "--steps", "2"]


def run(folder, out, *arguments):
    assert generate.main(["--model", str(folder), *ARGUMENTS, "--out", str(out), *arguments]) == 0
    return out.read_bytes(), read_metadata(out)["checkpoint"]


@pytest.fixture
def model(text_to_video):
    return text_to_video[0]


def test_a_cached_model_draws_the_same(model, tmp_path, monkeypatch, capsys):
    plain = run(model, tmp_path / "plain.gif")
    cached = ["--cache-dir", str(tmp_path / "cache"), "--cache-limit", "50MB"]
    assert run(model, tmp_path / "first.gif", *cached) == plain
    monkeypatch.setattr(cache, "_build", lambda *_: pytest.fail("converted again"))
    assert run(model, tmp_path / "second.gif", *cached) == plain
    assert "warning" not in capsys.readouterr().err


def test_damage_is_one_line(model, tmp_path, capsys):
    cached = ["--cache-dir", str(tmp_path / "cache")]
    run(model, tmp_path / "first.gif", *cached)
    (next((tmp_path / "cache" / "weights").iterdir()) / cache.MANIFEST).unlink()
    capsys.readouterr()
    run(model, tmp_path / "second.gif", *cached)
    told = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(told) == 1 and told[0].startswith("warning: the cached weights in ")


def test_a_folder_that_cannot_be_and_a_size_that_is_none_are_refused(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--model", str(model), *ARGUMENTS, "--out", str(tmp_path / "out.gif")]
    assert generate.main([*arguments, "--cache-dir", str(tmp_path / "file")]) == 2
    assert "cannot be a cache" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        generate.main([*arguments, "--cache-limit", "5XB"])
    assert "'5XB' is no size" in capsys.readouterr().err
    assert not (tmp_path / "out.gif").exists()
