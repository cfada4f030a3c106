"""Batches of two kinds: which comes when, every example once a pass, blank captions, and embedding in groups."""

import numpy as np
import pytest

from train.batches import Batches, Course, Kind, in_groups
from train.data import LatentSet


def latents(count, side):
    values = np.arange(count, dtype=np.float32)[:, None, None, None, None] * np.ones((1, 1, side, side, 1))
    return LatentSet(values, [f"{side} {index}" for index in range(count)])


def embed(captions):
    numbers = np.array([[float(text.split()[1]) if text else -1] for text in captions])
    return {"text": np.repeat(numbers[:, None], 2, axis=1), "pooled": numbers}


def batches(small_every=3, dropout=0.0):
    course = Course(small_steps=4, small_every=small_every, caption_dropout=dropout, seed=1)
    small, large = Kind(load=lambda: latents(8, 2), batch=4), Kind(load=lambda: latents(6, 5), batch=3)
    return Batches(small, large, course, embed)


def test_small_batches_come_first_and_every_so_often():
    sides = [batches()(position)["latents"].shape for position in range(12)]
    small, large = (4, 1, 2, 2, 1), (3, 1, 5, 5, 1)
    assert sides == [small] * 4 + [large, large, small] * 2 + [large, large]


def test_every_example_comes_once_a_pass_with_its_caption():
    made = [batches()(position) for position in range(4, 22)]
    large = [batch for batch in made if batch["latents"].shape[2] == 5]
    for first in range(0, len(large), 2):
        seen = np.concatenate([batch["latents"][:, 0, 0, 0, 0] for batch in large[first : first + 2]])
        assert sorted(seen) == [0, 1, 2, 3, 4, 5]
    for batch in made:
        np.testing.assert_array_equal(batch["pooled"][:, 0], batch["latents"][:, 0, 0, 0, 0])
        np.testing.assert_array_equal(batch["text"][:, 1], batch["pooled"])


def test_some_captions_are_blank_in_all_that_is_told():
    made = [batches(dropout=0.5)(position) for position in range(40)]
    blank = np.concatenate([batch["pooled"][:, 0] == -1 for batch in made])
    assert 0.3 < blank.mean() < 0.7
    for batch in made:
        np.testing.assert_array_equal(batch["text"][:, 0], batch["pooled"])


@pytest.mark.parametrize("count", [1, 16, 100])
def test_embedding_in_groups_is_embedding(count):
    groups = []

    def counted(captions):
        groups.append(len(captions))
        return embed(captions)

    captions = [f"x {index}" for index in range(count)]
    np.testing.assert_array_equal(in_groups(counted)(captions)["text"], embed(captions)["text"])
    assert set(groups) <= {16, 256}
