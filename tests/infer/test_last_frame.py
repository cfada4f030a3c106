"""Videos between a first and a last frame: Wan 2.1's FLF2V and Wan 2.2's image experts, against diffusers."""

import numpy as np
import pytest
from beside_diffusers import PROMPT, SIZE, by_diffusers, by_ours, relative, starting_noise
from PIL import Image
from tiny_wan import image_to_video, two_experts

from dit_jax.config import UserError
from infer import generate, load_pipeline

FIRST, LAST = (Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 70, 3), np.uint8)) for seed in (3, 4))
PAIR = dict(image=FIRST, last_image=LAST)


@pytest.fixture(scope="module", params=["FLF2V", "experts"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = image_to_video(first_and_last=True) if request.param == "FLF2V" else two_experts(image=True)
    theirs.save_pretrained(folder)
    return load_pipeline(folder), theirs


def test_two_frames_equal_diffusers(both):
    pipe, theirs = both
    latents, video = by_diffusers(theirs, "unipc", starting_noise(), **PAIR)
    ours = by_ours(pipe, "unipc", starting_noise(), **PAIR)
    assert relative(ours.latents, latents) <= 1e-4
    assert np.abs(ours.frames - np.round(video * 255)).max() <= 1
    other = by_ours(pipe, "unipc", starting_noise(), image=FIRST, last_image=FIRST)
    assert relative(other.latents, latents) > 1e-3, "the last frame matters"


def test_a_pair_of_images_stays_together_in_a_batch(both):
    told = dict(size=SIZE, frames=5, steps=1, guidance=3.0, seed=7)
    images = dict(image=[FIRST, LAST], last_image=[LAST, FIRST])
    together = both[0](["a dog", PROMPT], **images, **told)
    alone = both[0](PROMPT, image=LAST, last_image=FIRST, **told | dict(seed=8))
    assert np.abs(alone.frames[0].astype(int) - together.frames[1]).max() <= 1


def test_a_missing_or_needless_last_frame_is_told(both, image_to_video):
    pipe, theirs = both
    if theirs.image_encoder is not None:
        with pytest.raises(UserError, match="as last_image"):
            pipe(PROMPT, image=FIRST, size=SIZE, frames=5, steps=1)
    with pytest.raises(UserError, match="ask for more frames"):
        pipe(PROMPT, **PAIR, size=SIZE, frames=1, steps=1)
    with pytest.raises(UserError, match="leave it out, ask"):
        load_pipeline(image_to_video[0])(PROMPT, **PAIR, size=SIZE, frames=5, steps=1)


def test_the_command_takes_both_frames(both, tmp_path):
    for name, image in (("first.png", FIRST), ("last.png", LAST)):
        image.save(tmp_path / name)
    told = ["--model", str(both[0].checkpoint.folder), "--prompt", PROMPT, "--out", str(tmp_path / "cat.mp4")]
    told += ["--image", str(tmp_path / "first.png"), "--last-image", str(tmp_path / "last.png")]
    assert generate.main([*told, "--size", f"{SIZE[0]}x{SIZE[1]}", "--frames", "5", "--steps", "1"]) == 0
    assert (tmp_path / "cat.mp4").is_file()
