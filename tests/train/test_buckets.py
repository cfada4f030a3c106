"""Buckets: the usual ones of a model, those of the command line, and which of them a medium falls into."""

import pytest

from dit_jax.config import UserError
from infer.request import Defaults, Limits
from train.buckets import RATIOS, Bucket, choose_bucket, parse_buckets, usual_buckets

WAN, FLUX = Limits(space=16, time=4), Limits(space=16, time=1, video=False)


def bucket(text):
    width, height, frames = map(int, text.split("x"))
    return Bucket(width=width, height=height, frames=frames)


@pytest.mark.parametrize(("size", "frames"), [((832, 480), 81), ((128, 128), 17), ((1280, 704), 121)])
def test_usual_buckets_fit_the_model_and_have_its_area(size, frames):
    buckets = usual_buckets(Defaults(size=size, frames=frames), WAN, video=True)
    assert len(buckets) == len(set(buckets)) == 2 * len(RATIOS)
    assert {Bucket(width=w, height=h, frames=frames) for w, h in (size, size[::-1])} <= set(buckets)
    for one in buckets:
        assert one.width % 16 == one.height % 16 == 0 == (one.frames - 1) % 4
        assert 0.85 < one.width * one.height / (size[0] * size[1]) < 1.15
    assert {one.frames for one in buckets} == {frames, (frames - 1) // 8 * 4 + 1}


def test_pictures_have_one_frame_and_sets_have_another_area():
    defaults = Defaults(size=(1024, 1024))
    buckets = parse_buckets("480p", defaults, FLUX, video=False)
    assert Bucket(width=832, height=480, frames=1) in buckets and {one.frames for one in buckets} == {1}
    assert parse_buckets("model", defaults, FLUX, video=False)[2].size == (1024, 1024)


def test_shapes_of_the_command_line():
    assert parse_buckets("128x128x17, 160X96x9", Defaults(), WAN, video=True) == (
        bucket("128x128x17"),
        bucket("160x96x9"),
    )
    assert parse_buckets("128x96", Defaults(), WAN, video=False) == (bucket("128x96x1"),)


@pytest.mark.parametrize(
    ("text", "video", "told"),
    [
        ("130x128x17", True, "expected sides that 16 divides"),
        ("128x128x16", True, "expected 4·k + 1 frames"),
        ("128x128x0", True, "expected 4·k + 1 frames"),
        ("0x128x17", True, "expected sides that 16 divides"),
        ("128x128", True, "'128x128' is not understood: expected WIDTHxHEIGHTxFRAMES"),
        ("128x-128x17", True, "is not understood"),
        ("480q", True, "or one of model, 480p, 720p, 1024"),
        ("128x128x5", False, "expected one frame, for pictures"),
        ("128x128x5,128x128x5", True, "has a shape twice"),
    ],
)
def test_a_shape_that_does_not_fit_is_one_sentence(text, video, told):
    with pytest.raises(UserError, match="(?s).*" + told.replace("+", r"\+")):
        parse_buckets(text, Defaults(), WAN, video=video)


@pytest.mark.parametrize(
    ("size", "frames", "chosen"),
    [
        ((1920, 1080), 100, "160x96x17"),  # the nearest ratio
        ((1920, 1080), 16, "160x96x9"),  # the longest that it has frames for
        ((500, 500), 100, "128x128x17"),
        ((100, 100), 100, "64x64x17"),  # of one ratio the largest that enlarges nothing
        ((30, 30), 100, "64x64x17"),  # or the smallest
        ((500, 500), 10, "160x96x9"),  # another ratio where its own are all too long
        ((500, 500), 8, None),
    ],
)
def test_the_bucket_of_a_medium(size, frames, chosen):
    buckets = [bucket(text) for text in ("128x128x17", "160x96x9", "160x96x17", "64x64x17")]
    found = choose_bucket(buckets, size, frames)
    assert (found and found.name) == chosen
