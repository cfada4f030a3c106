"""Captions files: JSON lines and CSV, and the line that is neither."""

import pytest

from dit_jax.config import UserError
from train.captions_file import Caption, read_captions

EXPECTED = [Caption("a.mp4", 'a red 7, "moving" left\u2028or so'), Caption("in/b.mp4", "ein blaues Ö")]


def written(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path / name


def test_json_lines(tmp_path):
    lines = (
        '{"file_name": "a.mp4", "text": "a red 7, \\"moving\\" left\u2028or so", "seed": 3}\n\n'
        '{"text": "ein blaues Ö", "file_name": "in/b.mp4"}'
    )
    assert read_captions(written(tmp_path, "metadata.jsonl", lines)) == EXPECTED


def test_csv(tmp_path):
    rows = '\ufeffseed,text,file_name\n3,"a red 7, ""moving"" left\u2028or so",a.mp4\n4,ein blaues Ö,in/b.mp4\n'
    assert read_captions(written(tmp_path, "captions.CSV", rows)) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("c.jsonl", '{"file_name": "a.mp4", "text": "x"}\n{"file_name": \n', r"c.jsonl, line 2 is no JSON"),
        ("c.jsonl", '{"file_name": "a.mp4", "caption": "x"}', r"c.jsonl, line 1 lacks file_name or text"),
        ("c.jsonl", '["a.mp4", "x"]', r"line 1 lacks"),
        ("c.jsonl", '{"file_name": "", "text": "x"}', r"line 1 lacks"),
        ("c.jsonl", "\n\n", "holds no caption"),
        ("c.csv", "file,text\na,b\n", "has the columns file, text: expected file_name and text"),
        ("c.csv", "", "has the columns none"),
        ("c.csv", 'file_name,text\n"a\nb",x\nc\n', "line 4 lacks"),
    ],
)
def test_bad_input_is_one_sentence(name, content, told, tmp_path):
    with pytest.raises(UserError, match=told):
        read_captions(written(tmp_path, name, content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read the captions"):
        read_captions(tmp_path / "nowhere.jsonl")
