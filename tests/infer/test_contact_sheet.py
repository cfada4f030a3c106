"""The contact sheet: every frame at its place and size, the caption above."""

import numpy as np
import pytest
from PIL import Image

from infer.contact_sheet import _wrapped, contact_sheet


def _frames(count, height, width):
    """Frames of one colour each."""
    colours = np.random.default_rng(0).integers(60, 200, (count, 3), dtype=np.uint8)
    return np.broadcast_to(colours[:, None, None], (count, height, width, 3))


def _shown(path, frames):
    """How often each frame's colour occurs in the picture."""
    picture = np.asarray(Image.open(path)).reshape(-1, 3)
    return [int((picture == frame[0, 0]).all(-1).sum()) for frame in frames]


def test_small_frames_are_doubled_and_all_there(tmp_path):
    frames = _frames(17, 128, 128)
    path = contact_sheet(frames, "a red 7 moving left above a blue 2 on a striped background", tmp_path / "sheet.png")
    assert _shown(path, frames) == [256 * 256] * 17


@pytest.mark.parametrize(("columns", "expected"), [(1, 1), (3, 3), (9, 5), (None, 5)])
def test_columns(tmp_path, columns, expected):
    path = contact_sheet(_frames(5, 128, 128), "caption", tmp_path / "new folder" / "sheet.png", columns)
    width = Image.open(path).width
    assert width == max(expected * 264 - 8, 480) + 48


def test_large_frames_are_shrunk_and_thinned_out(tmp_path):
    frames = _frames(81, 480, 832)
    path = contact_sheet(frames, "a cat surfing at dusk", tmp_path / "sheet.png")
    counts = _shown(path, frames)
    assert sum(count > 0 for count in counts) == 24
    assert counts[0] == counts[80] == 256 * 148


def test_caption_is_drawn_and_wrapped(tmp_path):
    frames = _frames(1, 128, 128)
    with_text, without = (
        np.asarray(Image.open(contact_sheet(frames, text, tmp_path / "sheet.png"))) for text in ("seven " * 40, "")
    )
    assert (with_text < 100).any() and with_text.shape[0] > without.shape[0] + 100
    assert (with_text[:, -20:] > 200).all()


def test_long_word_stands_alone():
    from PIL import ImageFont

    assert _wrapped("a incomprehensibilities b", ImageFont.load_default(size=26), 60) == [
        "a",
        "incomprehensibilities",
        "b",
    ]


def test_one_still(tmp_path):
    path = contact_sheet(_frames(1, 64, 64), "a white 0", tmp_path / "sheet.png")
    assert _shown(path, _frames(1, 64, 64)) == [256 * 256]
