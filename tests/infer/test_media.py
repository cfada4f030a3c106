"""Files of what was made."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from infer import media


@pytest.mark.long
def test_the_same_frames_make_the_same_file_however_busy_the_machine_is(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)

    def written(number):
        file = tmp_path / f"{number}.mp4"
        media.save(file, frames, 16, {"seed": 1})
        return file.read_bytes()

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(written, range(4000)))) == 1
