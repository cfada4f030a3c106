"""Names of videos as VBench looks for them."""

from pathlib import Path

import numpy as np
import pytest

from dit_jax.config import UserError
from infer import media
from infer.video_names import prompts_by_name, video_paths

LONG = "A tranquil tableau, " * 10  # 200 characters


def test_names_are_whole_prompts_or_the_beginnings_of_them():
    assert prompts_by_name("vbench", ["a cat.", LONG], ["a cat.", LONG], 5) == {"a cat.": "a cat.", LONG: LONG}
    assert list(prompts_by_name("vbench2", [LONG], [LONG], 3)) == [LONG[:180]]
    paths = video_paths(Path("out"), ["a cat.", "façade"], 2)
    assert [str(path) for path in paths] == [
        "out/a cat.-0.mp4", "out/a cat.-1.mp4", "out/façade-0.mp4", "out/façade-1.mp4",
    ]  # fmt: skip


def test_a_prompt_that_comes_twice_is_there_once():
    assert prompts_by_name("vbench", ["a", "b", "a"], ["a", "b", "a"], 1) == {"a": "a", "b": "b"}


def test_videos_may_be_named_after_other_prompts():
    assert prompts_by_name("vbench", ["a cat"], ["a very detailed cat / dog"], 5) == {
        "a cat": "a very detailed cat / dog"
    }


@pytest.mark.parametrize(
    ("kind", "titles", "prompts", "told"),
    [
        ("vbench", ["cats/dogs"], ["cats/dogs"], "'cats/dogs': expected a prompt without '/'"),
        ("vbench", ["x" * 250], ["x" * 250], "at most 255 bytes"),
        ("vbench", ["é" * 125], ["é" * 125], "at most 255 bytes"),
        ("vbench2", ["猫" * 90], ["猫" * 90], "at most 255 bytes"),
        ("vbench2", [LONG + "a", LONG + "b"], [LONG + "a", LONG + "b"], "would have one name"),
        ("vbench", ["a"], ["a", "b"], "1 lines for 2 prompts"),
    ],
)
def test_what_no_file_can_be_named_after_is_refused(kind, titles, prompts, told):
    with pytest.raises(UserError, match=told):
        prompts_by_name(kind, titles, prompts, 5)


def test_the_longest_name_fits_the_file_system(tmp_path):
    [name] = prompts_by_name("vbench", ["x" * 249], ["x" * 249], 5)
    [path] = video_paths(tmp_path, [name], 1)
    media.save(path, np.zeros((1, 16, 16, 3), np.uint8), 8, {})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UserError, match="at most 255 bytes"):
        prompts_by_name("vbench", ["x" * 249], ["x" * 249], 11)
