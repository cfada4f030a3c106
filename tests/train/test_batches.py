"""Batches of two kinds: which comes when, every example once a pass, blank captions, and embedding in groups."""

import numpy as np
import pytest

from train.batches import Batches, Kind, Stage, Window, in_groups
from train.data import LatentSet


def latents(count, side):
    values = np.arange(count, dtype=np.float32)[:, None, None, None, None] * np.ones((1, 1, side, side, 1))
    return LatentSet(values, [f"{side} {index}" for index in range(count)])


def embed(captions):
    numbers = np.array([[float(text.split()[1]) if text else -1] for text in captions])
    return {"text": np.repeat(numbers[:, None], 2, axis=1), "pooled": numbers}


def batches(dropout=0.0):
    kinds = {
        "small": Kind(load=lambda: latents(8, 2), batch=4),
        "middle": Kind(load=lambda: latents(10, 3), batch=2),
        "large": Kind(load=lambda: latents(6, 5), batch=3),
    }
    stages = (
        Stage(kind="small", steps=4),
        Stage(kind="middle", steps=5, beside="small", every=2),
        Stage(kind="large", beside="middle", every=3),
    )
    return Batches(kinds=kinds, stages=stages, embed=embed, caption_dropout=dropout, seed=1)


def sides(made):
    return [batch["latents"].shape[2] for batch in made]


def test_stages_follow_each_other_with_a_batch_of_an_earlier_kind_every_so_often():
    made = [batches()(position) for position in range(15)]
    assert sides(made) == [2] * 4 + [3, 2, 3, 2, 3] + [5, 5, 3, 5, 5, 3]
    assert [len(batch["latents"]) for batch in made[3:10]] == [4, 2, 4, 2, 4, 2, 3]


@pytest.mark.parametrize(("side", "a_pass"), [(2, 2), (3, 5), (5, 2)])
def test_every_example_of_a_kind_comes_once_a_pass_whatever_comes_between(side, a_pass):
    made = [batch for batch in map(batches(), range(24)) if batch["latents"].shape[2] == side]
    for first in range(0, len(made) // a_pass * a_pass, a_pass):
        seen = np.concatenate([batch["latents"][:, 0, 0, 0, 0] for batch in made[first : first + a_pass]])
        assert sorted(seen) == list(range(len(seen)))
    for batch in made:
        np.testing.assert_array_equal(batch["pooled"][:, 0], batch["latents"][:, 0, 0, 0, 0])
        np.testing.assert_array_equal(batch["text"][:, 1], batch["pooled"])


def test_windows_are_parts_of_the_latents_at_the_places_that_are_told():
    whole = np.arange(5 * 2 * 8 * 12 * 3, dtype=np.float32).reshape(5, 2, 8, 12, 3)
    kinds = {
        "windows": Kind(load=lambda: LatentSet(whole, [f"x {i}" for i in range(5)]), batch=4, window=Window(tokens=2))
    }
    made = Batches(kinds=kinds, stages=(Stage(kind="windows"),), embed=embed, caption_dropout=0.0, seed=3)
    seen = set()
    for position in range(60):
        batch = made(position)
        assert batch["latents"].shape == (4, 2, 4, 4, 3) and batch["origin"].dtype == np.int32
        for latents, (t, y, x), text in zip(batch["latents"], batch["origin"], batch["pooled"], strict=True):
            of = whole[int(text[0])]
            np.testing.assert_array_equal(latents, of[:, 2 * y : 2 * y + 4, 2 * x : 2 * x + 4])
            seen.add((t, y, x))
        np.testing.assert_array_equal(batch["origin"], made(position)["origin"])
    assert seen == {(0, y, x) for y in range(3) for x in range(5)}


@pytest.mark.parametrize(("on", "least", "most"), [(1.0, 1.0, 1.0), (0.5, 0.5, 0.75), (0.0, 0.02, 0.3)])
def test_windows_on_what_stands_out_hold_it(on, least, most):
    rng = np.random.default_rng(0)
    whole, places = rng.normal(0, 0.1, (6, 2, 24, 24, 3)), rng.integers(0, 19, (6, 2))
    for latents, (y, x) in zip(whole, places, strict=True):
        latents[:, y : y + 6, x : x + 6] += 3.0
    held = []
    for _ in range(50):
        windows, origin = Window(tokens=3, on=on).cut(whole, rng)
        assert (origin[:, 1:] >= 0).all() and (origin[:, 1:] <= 9).all()
        held += list((windows > 2).mean((1, 2, 3, 4)) > 0.2)
    assert least <= np.mean(held) <= most


def test_after_the_last_stage_there_is_nothing():
    ending = batches()
    ending.stages = ending.stages[:2]
    with pytest.raises(IndexError):
        ending(9)


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
