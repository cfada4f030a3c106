"""The tracker: sharp, blurred and noisy clips, broken strokes, close neighbours, blanks."""

import numpy as np
import pytest
from scipy import ndimage

from infer.digit_grammar import MOTIONS, Digit, Scene
from infer.digit_tracks import find_tracks, glyph_crops, nearest_colour
from infer.moving_digits import PALETTE, ClipSpec, draw_glyphs, make_clips, render


def _degraded(clip, rng):
    """As a small model may draw it: blurred, dimmed, with noise of its own in every frame and blotches of colour."""
    blurred = ndimage.gaussian_filter(clip.astype(np.float32), (0, 1.0, 1.0, 0))
    blotches = ndimage.gaussian_filter(rng.normal(0, 1, clip.shape), (0.7, 3, 3, 0))
    noisy = 0.92 * blurred + rng.normal(0, 6, clip.shape) + blotches * 8 / blotches.std()
    return noisy.clip(0, 255).astype(np.uint8)


def _seen(clip):
    tracks = find_tracks(clip)
    return sorted((track.colour, track.motion(len(clip), clip.shape[1])) for track in tracks)


def _said(scene):
    return sorted((digit.colour, digit.motion) for digit in scene.digits)


def test_real_clips_are_read_without_fault():
    for index in range(24):
        (clip,), (text,), (scene,) = make_clips(21, [index], "held-out")
        assert _seen(clip) == _said(scene), text


def test_blurred_noisy_clips_are_read_too():
    rng = np.random.default_rng(0)
    faults = []
    for index in range(24):
        (clip,), (text,), (scene,) = make_clips(22, [index], "held-out")
        seen = _seen(_degraded(clip, rng))
        if seen != _said(scene):
            faults.append((text, seen))
    assert len(faults) <= 1, faults


def test_other_sizes_and_lengths():
    for index in range(8):
        (clip,), (text,), (scene,) = make_clips(23, [index], "held-out", ClipSpec(frames=9, size=192))
        assert _seen(clip) == _said(scene), text


def test_boxes_and_centres_follow_the_digit():
    scene = Scene(digits=(Digit(value=0, colour="white", motion="moving right"),))
    rng = np.random.default_rng(1)
    clip = render(scene, draw_glyphs(scene, "train", rng), rng)
    (track,) = find_tracks(clip)
    ink = clip.max(-1) > 120
    for frame in (0, 16):
        y, x = np.argwhere(ink[frame]).T
        np.testing.assert_allclose(track.boxes[frame], [x.min(), y.min(), x.max() + 1, y.max() + 1])
        np.testing.assert_allclose(track.centres[frame], [x.mean() + 0.5, y.mean() + 0.5], atol=0.7)


@pytest.mark.parametrize("relation", ["above", "left of"])
def test_close_digits_of_one_colour_stay_two(relation):
    # These two meet: at the end only the smallest gap is left between them.
    meeting = ("moving down", "moving up") if relation == "above" else ("moving right", "moving left")
    digits = tuple(Digit(value=8, colour="blue", motion=motion) for motion in meeting)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        scene = Scene(digits=digits, relation=relation)
        clip = render(scene, draw_glyphs(scene, "train", rng), rng)
        assert _seen(clip) == _said(scene)


def test_broken_stroke_is_one_digit():
    scene = Scene(digits=(Digit(value=5, colour="green"),))
    for seed in range(6):
        rng = np.random.default_rng(seed)
        clip = render(scene, draw_glyphs(scene, "train", rng), rng)
        rows = np.flatnonzero((clip[0].max(-1) > 120).any(1))
        cut = rows[0] + len(rows) // 4
        clip[:, cut : cut + 3] = np.median(clip, axis=(0, 1, 2))
        assert _seen(clip) == _said(scene)


def test_what_is_no_lasting_digit_is_no_track():
    (clip,), _, _ = make_clips(5, [3], "train")
    assert find_tracks(np.full_like(clip, 40)) == []
    assert find_tracks(np.zeros_like(clip)) == []
    scene = Scene(digits=(Digit(value=3, colour="red", motion="moving up"),))
    rng = np.random.default_rng(0)
    clip = render(scene, draw_glyphs(scene, "train", rng), rng)
    clip[7:] = clip[0, 0, 0]
    assert find_tracks(clip) == []
    speck = np.full((17, 128, 128, 3), 40, np.uint8)
    speck[:, 60:66, 60:66] = 255
    assert find_tracks(speck) == []


def test_white_noise_ends():
    noise = np.random.default_rng(0).integers(0, 255, (17, 128, 128, 3), dtype=np.uint8)
    assert isinstance(find_tracks(noise), list)


@pytest.mark.parametrize("motion", MOTIONS)
def test_motion_survives_missing_frames(motion):
    scene = Scene(digits=(Digit(value=7, colour="yellow", motion=motion),))
    rng = np.random.default_rng(4)
    clip = render(scene, draw_glyphs(scene, "train", rng), rng)
    clip[[0, 5, 6, 11]] = clip[0, 0, 0]
    assert _seen(clip) == _said(scene)


def test_dim_and_mixed_colours_keep_their_names():
    backdrop = np.array([40.0, 45, 38])
    for index, colour in enumerate(PALETTE.values()):
        for share in (1.0, 0.7, 0.5):
            mixed = backdrop + share * (np.array(colour) - backdrop)
            assert nearest_colour(mixed, backdrop) == index


def test_glyph_crops_are_centred_and_of_one_size():
    ink = np.zeros((3, 90, 70), np.float32)
    ink[0, 10:60, 5:25] = 1
    ink[1, 80:90, 30:70] = 1
    crops = glyph_crops(ink)
    assert crops.shape == (3, 28, 28) and crops.dtype == np.float32
    # Ink is conserved: the box of 50 x 20 becomes 20 x 8.
    assert crops[0].sum() == pytest.approx(20 * 8, rel=0.01)
    assert crops[1].sum() == pytest.approx(20 * 5, rel=0.01)
    for crop in crops[:2]:
        np.testing.assert_allclose(crop, crop[::-1, ::-1], atol=1e-4)
    assert not crops[2].any()
