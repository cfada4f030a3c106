"""Scores of pictures: real ones near 1, and each single fault seen by its own score."""

import random
from dataclasses import replace

import numpy as np
import pytest

from infer import digit_reader
from infer.digit_grammar import Digit, Scene, random_picture
from infer.picture_scores import read_picture, real_pictures, summary


@pytest.fixture(scope="module")
def reader():
    return digit_reader.train_reader(variants=8, epochs=2)


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(11)
    return [random_picture(rng) for _ in range(40)]


@pytest.fixture(scope="module")
def real(scenes):
    return list(real_pictures(scenes, 0))


@pytest.fixture(scope="module")
def reference(scenes, reader):
    return _readings(real_pictures(scenes, 1), scenes, reader)


def _readings(pictures, scenes, reader):
    return [read_picture(picture, scene, reader) for picture, scene in zip(pictures, scenes, strict=True)]


def _scores(pictures, scenes, reader, reference):
    return summary(_readings(pictures, scenes, reader), reference)


@pytest.fixture(scope="module")
def ceiling(real, scenes, reader, reference):
    return _scores(real, scenes, reader, reference)


def test_real_pictures_score_high(ceiling):
    assert ceiling["colour"] == ceiling["count"] == ceiling["relation"] == 1
    assert ceiling["digit_each"] >= 0.9 and ceiling["all"] == ceiling["digit"] >= 0.8
    assert ceiling["pictures"] == 40


def _with_fault(scene, field):
    """The scene with another first digit, or first colour, or number of the first kind."""
    first = scene.digits[0]
    other = {"value": (first.value + 1) % 10, "colour": "red" if first.colour != "red" else "blue"}
    changed = replace(first, **{field: other.get(field, 3 - first.count)})
    return replace(scene, digits=(changed, *scene.digits[1:]))


@pytest.mark.parametrize(("score", "field"), [("digit", "value"), ("colour", "colour"), ("count", "count")])
def test_a_fault_shows_in_its_own_score(real, scenes, reader, reference, ceiling, score, field):
    told = [_with_fault(scene, field) for scene in scenes]
    scores = _scores(real, told, reader, reference)
    assert scores[score] <= 0.1 and scores["all"] == 0
    kept = {"digit", "colour", "count", "relation"} - {score}
    if score != "count":
        assert all(scores[name] == ceiling[name] for name in kept)


def test_kinds_in_each_other_s_place_are_no_relation(reader):
    scene = Scene(digits=(Digit(value=1, colour="red", count=2), Digit(value=8, colour="green")), relation="left of")
    (picture,) = real_pictures([scene], 0)
    assert read_picture(picture, scene, reader).relation
    assert read_picture(picture, replace(scene, relation="right of"), reader).relation is False
    # Mirrored, two digits lie left and one right: the kinds are told by count, so their colours are wrong.
    swapped = read_picture(picture[:, ::-1], scene, reader)
    assert not swapped.everything and not swapped.right[:, 1].all()


def test_blank_pictures_score_nothing(scenes, real, reader, reference, ceiling):
    scores = _scores([np.full_like(picture, 40) for picture in real], scenes, reader, reference)
    assert scores["all"] == scores["digit"] == scores["colour"] == scores["count"] == scores["relation"] == 0
    assert scores["frechet"] > 5 * ceiling["frechet"]
