"""Files of what was made."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from infer import media
from infer.api_types import ImageRequest
from infer.image_requests import encoded
from infer.tickets import Sample

LONGEST = "\N{GRINNING FACE}" * 4000  # characters, as many as a request may have


@pytest.mark.long
def test_the_same_frames_make_the_same_file_however_busy_the_machine_is(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)

    def written(number):
        file = tmp_path / f"{number}.mp4"
        media.save(file, frames, 16, {"seed": 1})
        return file.read_bytes()

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(written, range(4000)))) == 1


def read_back(folder, kind, metadata):
    sample = Sample(frames=np.zeros((1, 8, 8, 3), np.uint8), metadata=metadata, fps=1, seconds={}, batch=1)
    file = folder / f"image.{kind}"
    file.write_bytes(encoded(sample.frames[0], ImageRequest(prompt="x", output_format=kind), sample))
    return media.read_metadata(file)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_image_holds_all_that_a_request_may_say(tmp_path, kind):
    for text in (LONGEST, "\x01" * 4000, 'ein grünes \ud800 "7"'):
        told = {"prompt": text, "negative_prompt": text, "seed": 1, "steps": 50}
        assert read_back(tmp_path, kind, told) == told


def test_a_jpeg_leaves_out_what_it_cannot_hold(tmp_path):
    told = {"prompt": "a" * 40_000, "negative_prompt": "b" * 40_000, "loras": ["c" * 10_000], "seed": 1}
    assert read_back(tmp_path, "jpeg", told) == {name: told[name] for name in ("prompt", "loras", "seed")}
    told["prompt"] *= 2
    assert read_back(tmp_path, "jpeg", told) == {name: told[name] for name in ("loras", "seed")}
    told["loras"] *= 7
    assert read_back(tmp_path, "jpeg", told) == {"seed": 1}
    assert read_back(tmp_path, "webp", told) == told


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp"])
def test_a_file_holds_what_made_it(tmp_path, suffix):
    told = {"prompt": LONGEST, "seed": 1}
    media.save(tmp_path / f"x{suffix}", np.zeros((1, 8, 8, 3), np.uint8), 16, told)
    assert media.read_metadata(tmp_path / f"x{suffix}") == told
