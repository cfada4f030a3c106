"""What tests of uploads look at."""

import os
from pathlib import Path

import numpy as np
import pytest
from upload_files import CORNERS

from dit_jax.config import UserError
from infer import uploads
from infer.uploads import UploadLimits, read_reference

LIMITS = UploadLimits()
CLOSE = 12  # levels of 255, of lossy formats


def seen(picture):
    """The colours in the middle of a picture's quarters, by (column, row)."""
    assert picture.mode == "RGB"
    width, height = picture.size
    return {(x, y): picture.getpixel(((1 + 2 * x) * width // 4, (1 + 2 * y) * height // 4)) for x, y in CORNERS}


def like(picture, expected=CORNERS, close=CLOSE):
    found = seen(picture)
    return all(np.abs(np.subtract(found[place], colour)).max() <= close for place, colour in expected.items())


def refused(data, *words, limits=LIMITS):
    with pytest.raises(UserError) as error:
        read_reference(data, limits)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def picture_or_sentence(data, read=read_reference):
    """The picture's pixels, or None for one that is refused as it must be."""
    try:
        picture = read(data, LIMITS)
    except UserError as error:
        sentence = str(error)
    else:
        assert picture.mode == "RGB"
        return picture.tobytes()
    assert "\n" not in sentence and "upload" in sentence
    return None


def environment():
    return os.environ | {"PYTHONPATH": str(Path(uploads.__file__).parents[1])}
