"""Pictures of digits: as many as asked, in the right colours and places, apart from each other, and reproducible."""

import random

import numpy as np
import pytest

from infer.digit_grammar import RELATIONS, Digit, Scene, parse, random_picture
from infer.digit_pictures import CLOSE_UP, choose_glyphs, each_digit, make_pictures, render_picture
from infer.digit_tracks import find_tracks


def drawn(scene, seed, size=128):
    rng = np.random.default_rng(seed)
    return render_picture(scene, choose_glyphs(scene, "train", rng), rng, size)


def test_every_digit_is_found_in_its_colour():
    rng = random.Random(1)
    for index in range(60):
        scene = random_picture(rng)
        found = find_tracks(drawn(scene, index)[None])
        assert sorted(track.colour for track in found) == sorted(digit.colour for digit in each_digit(scene))
        for track in found:
            left, top, right, bottom = track.boxes[0]
            assert left >= 1 and top >= 1 and right <= 127 and bottom <= 127


@pytest.mark.parametrize("relation", RELATIONS)
def test_kinds_lie_as_the_relation_says(relation):
    scene = Scene(
        digits=(Digit(value=4, colour="green", count=2), Digit(value=9, colour="white", count=2)), relation=relation
    )
    axis, first = {"left of": (0, "green"), "above": (1, "green")}.get(
        relation, (0 if relation == "right of" else 1, "white")
    )
    for seed in range(12):
        boxes = {"green": [], "white": []}
        for track in find_tracks(drawn(scene, seed)[None]):
            boxes[track.colour].append(track.boxes[0])
        second = "white" if first == "green" else "green"
        assert len(boxes[first]) == len(boxes[second]) == 2
        assert max(box[axis + 2] for box in boxes[first]) <= min(box[axis] for box in boxes[second])


def test_a_close_up_holds_one_digit_at_the_size_of_whole_pictures():
    pictures, captions, scenes = make_pictures(3, range(24), "train", CLOSE_UP)
    assert pictures.shape == (24, 64, 64, 3)
    for picture, text, scene in zip(pictures, captions, scenes, strict=True):
        assert parse(text) == scene and len(each_digit(scene)) == 1
        canvas = np.full((1, 128, 128, 3), 30, np.uint8)
        canvas[0, 32:96, 32:96] = picture
        (track,) = find_tracks(canvas)
        height = max(track.boxes[0][2] - track.boxes[0][0], track.boxes[0][3] - track.boxes[0][1])
        assert 38 <= height <= 56


def test_pictures_depend_on_seed_and_index_alone():
    first, texts, _ = make_pictures(5, [3, 8], "train")
    second, again, _ = make_pictures(5, [8], "train")
    np.testing.assert_array_equal(first[1], second[0])
    assert texts[1] == again[0]
    assert not np.array_equal(make_pictures(6, [8], "train")[0], second)


def test_halves_of_a_split_share_no_glyph():
    scene = Scene(digits=(Digit(value=3, colour="red"),))
    halves = [
        {choose_glyphs(scene, "held-out", np.random.default_rng(seed), half)[0].tobytes() for seed in range(80)}
        for half in (0, 1)
    ]
    assert not halves[0] & halves[1] and min(map(len, halves)) > 10
