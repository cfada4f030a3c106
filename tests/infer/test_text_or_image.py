"""Wan 2.2's TI2V pipeline, with and without a first frame, against diffusers."""

import numpy as np
import pytest
from beside_diffusers import PROMPT, by_diffusers, by_ours, relative, starting_noise
from diffusers import WanImageToVideoPipeline
from PIL import Image

from infer import load_pipeline
from infer.buckets import Frame, ModelBuckets
from infer.engine_batch import Batch
from infer.request import Request
from infer.tickets import Ticket

SIZE = (96, 64)  # 6x4 latent cells of 16x16 pixels
IMAGE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8))


@pytest.fixture(scope="module")
def pipe(text_or_image):
    return load_pipeline(text_or_image[0])


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_without_a_frame_equals_diffusers(text_or_image, pipe, solver):
    latents, video = by_diffusers(text_or_image[1], solver, starting_noise(), size=SIZE)
    ours = by_ours(pipe, solver, starting_noise(), size=SIZE)
    assert relative(ours.latents, latents) <= 1e-4
    assert np.abs(ours.frames - np.round(video * 255)).max() <= 1
    assert ours.frames.std() > 10


@pytest.mark.parametrize("guidance", [3.5, 1.0])
def test_with_a_first_frame_equals_diffusers(text_or_image, pipe, guidance):
    theirs = WanImageToVideoPipeline(**text_or_image[1].components, expand_timesteps=True)
    latents, video = by_diffusers(theirs, "unipc", starting_noise(), guidance, SIZE, image=IMAGE)
    ours = by_ours(pipe, "unipc", starting_noise(), guidance, SIZE, image=IMAGE)
    assert relative(ours.latents, latents) <= 1e-4
    assert np.abs(ours.frames - np.round(video * 255)).max() <= 1


def test_the_first_frame_stays_and_the_rest_follows_it(pipe):
    other = Image.fromarray(255 - np.asarray(IMAGE))
    told = dict(size=SIZE, frames=9, steps=2, seed=1)
    videos = [pipe(PROMPT, image=image, **told).latents for image in (IMAGE, other, IMAGE)]
    np.testing.assert_array_equal(videos[0], videos[2])
    assert all(relative(videos[1][:, frame], videos[0][:, frame]) > 1e-3 for frame in range(3))
    again = pipe("a blue fish", image=IMAGE, **told | dict(seed=5)).latents
    np.testing.assert_array_equal(again[:, 0], videos[0][:, 0])


def test_defaults_are_the_authors(pipe):
    assert (pipe.defaults.size, pipe.defaults.frames, pipe.defaults.fps) == ((1280, 704), 121, 24)


@pytest.mark.parametrize(("image", "frames", "shown"), [(None, 9, 0), (IMAGE, 9, 1), (IMAGE, 1, 0)])
def test_previews_show_a_frame_that_is_being_made(pipe, monkeypatch, image, frames, shown):
    seen = []
    monkeypatch.setattr(type(pipe), "preview", lambda _, latents: seen.append(latents))
    job = pipe.prepare(Request(prompt=PROMPT, image=image, size=SIZE, frames=frames, steps=8, seed=1))
    buckets = ModelBuckets(shapes=(Frame(*SIZE, frames),), offers={}, batches=(1,))
    batch = Batch.of([Ticket(model="tiny", job=job, previews=True)], pipe, buckets)
    before = batch.seen()
    batch.run.advance()
    batch.tell(before)
    clean = np.asarray(batch.run.carry.solver.clean)
    if image is not None:
        clean = np.concatenate([batch.run.final()[:, :1], clean[:, 1:]], axis=1)
    np.testing.assert_array_equal(seen, [clean[0, shown]])
