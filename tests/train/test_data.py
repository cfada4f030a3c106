"""Crops and the cache of latents: what they hold, and that they depend on seed and position alone."""

import numpy as np
import pytest

from infer.moving_digits import ClipSpec, make_clips
from train import data
from train.data import (
    CropSettings,
    LatentSet,
    LatentSource,
    cached_latents,
    clip_maker,
    clip_pool,
    random_crops,
)

SPEC = CropSettings(frames=5, side=32, batch=6)


@pytest.fixture(scope="module")
def pool():
    return clip_pool(0, 3)


def test_crops_are_parts_of_clips():
    noise = np.random.default_rng(0).integers(0, 256, (2, 7, 40, 44, 3), dtype=np.uint8)
    crops = random_crops(noise, SPEC, 0, 7)
    assert crops.shape == (6, 5, 32, 32, 3) and crops.dtype == np.uint8
    for crop in crops:
        starts = np.argwhere((noise == crop[0, 0, 0]).all(-1))
        parts = [noise[n, t : t + 5, y : y + 32, x : x + 32] for n, t, y, x in starts]
        assert any(np.array_equal(part, crop) for part in parts)


def test_crops_repeat_and_differ(pool):
    again = random_crops(pool, SPEC, 0, 7)
    np.testing.assert_array_equal(random_crops(pool, SPEC, 0, 7), again)
    assert not np.array_equal(random_crops(pool, SPEC, 0, 8), again)
    assert not np.array_equal(random_crops(pool, SPEC, 1, 7), again)


def test_crops_look_at_digits(pool):
    def share(on_digits):
        crops = random_crops(pool, CropSettings(frames=1, side=32, batch=64, on_digits=on_digits), 0, 0)
        return np.mean([(crop.max(-1) > data.BRIGHT).any() for crop in crops])

    assert share(1.0) > share(0.0) + 0.2


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 32)
    return LatentSource(folder=tmp_path / "latents", make=clip_maker(3, frames=1))


def brightness(clips):
    return clips.astype(np.float32).mean(axis=(2, 3), keepdims=True)


def test_cached_latents_are_the_clips_in_order(source):
    found = cached_latents(source, 40, brightness)
    clips, captions, _ = make_clips(3, range(40), "train", ClipSpec(frames=2))
    assert found.captions == captions
    np.testing.assert_allclose(found.latents, brightness(clips[:, :1]), rtol=1e-3)


def test_the_cache_is_used_and_grows(source):
    first = cached_latents(source, 30, brightness)
    encoded = []
    again = cached_latents(source, 60, lambda clips: encoded.append(len(clips)) or brightness(clips))
    assert sum(encoded) == 32
    np.testing.assert_array_equal(again.latents[:30], first.latents)
    cached_latents(source, 60, lambda clips: pytest.fail("everything is in the cache"))


def test_a_killed_encoder_leaves_no_half_shard(source):
    def killed(clips):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_latents(source, 30, killed)
    assert not list(source.folder.iterdir())
    assert len(cached_latents(source, 30, brightness)) == 30


def test_every_pass_has_everything_once_in_its_own_order():
    latents = LatentSet(np.zeros((12, 1)), [str(i) for i in range(12)])
    passes = [[latents.indices(4, 0, 3 * epoch + i) for i in range(3)] for epoch in range(2)]
    orders = [[index for batch in batches for index in batch] for batches in passes]
    assert [sorted(order) for order in orders] == [list(range(12))] * 2
    assert orders[0] != orders[1]
    assert latents.indices(4, 0, 1) == passes[0][1]
