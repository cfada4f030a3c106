"""Selection of heads and neurons against the rules written out one by one."""

import numpy as np
import pytest
from small_models import FLUX, WAN

from dit_jax.config import UserError
from dit_jax.methods.pruning import (
    best_heads,
    best_neurons,
    check_ratio,
    head_types,
    heads_to_keep,
    neurons_to_keep,
    output_norms,
    protected,
    scored_heads,
)


def one_by_one(up, down, count, similar=0.9):
    """The rule for neurons with no blocks and no matrices."""
    vectors = np.concatenate([up.T, down], axis=1).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    scores = [np.linalg.norm(up[:, k]) * np.linalg.norm(down[k]) for k in range(up.shape[1])]
    waiting, chosen = sorted(range(len(scores)), key=lambda k: -scores[k]), []
    while len(chosen) < count:
        skipped = []
        for k in waiting:
            if len(chosen) == count:
                break
            if chosen and cosines[k, chosen].max() > similar:
                skipped.append(k)
            else:
                chosen.append(k)
        waiting, similar = skipped, similar + 0.02
    return sorted(chosen)


@pytest.mark.parametrize(("neurons", "count"), [(37, 20), (37, 30), (1100, 640), (1100, 850)])
def test_neurons_are_chosen_by_norm_and_difference(neurons, count):
    """Half of them are near copies of others, at cosines on both sides of every threshold; of the larger numbers some
    are found only when what counts as a copy has been relaxed."""
    rng = np.random.default_rng(neurons)
    up, down = rng.standard_normal((9, neurons)), rng.standard_normal((neurons, 9))
    for copy in range(neurons // 2, neurons):
        source, noise = rng.integers(neurons // 2), rng.uniform(0.02, 0.6)
        up[:, copy] = up[:, source] + noise * rng.standard_normal(9)
        down[copy] = down[source] + noise * rng.standard_normal(9)
    found = best_neurons(up, down, count)
    assert list(found) == one_by_one(up.astype(np.float32), down.astype(np.float32), count)
    norms = np.argsort(-np.linalg.norm(up, axis=0) * np.linalg.norm(down, axis=1))[:count]
    assert set(found) != set(norms)


def test_copies_are_kept_when_nothing_else_is_left():
    up, down = np.ones((3, 6)), np.ones((6, 3))
    assert list(best_neurons(up, down, 4)) == [0, 1, 2, 3]
    assert list(best_neurons(up, down, 6)) == [0, 1, 2, 3, 4, 5]


def test_heads_are_kept_by_score_and_temporal_ones_protected():
    scores = np.array([[1.0, 2, 3, 4, 5], [5, 4, 3.5, 3, 1]])
    types = np.array([["mixed"] * 5, ["spatial", "mixed", "mixed", "temporal", "temporal"]])
    assert best_heads(scores, 3).tolist() == [[2, 3, 4], [0, 1, 2]]
    assert best_heads(protected(scores, types), 3).tolist() == [[2, 3, 4], [0, 1, 3]]
    assert best_heads(protected(scores, types, 1.0), 3).tolist() == [[2, 3, 4], [0, 1, 2]]
    np.testing.assert_array_equal(protected(scores, types)[1], [5, 4, 3.5, 4.5, 1.5])
    assert protected(scores, None) is scores


def test_types_follow_the_ratio():
    assert head_types(np.array([[0.71, 0.7, 0.3, 0.29]])).tolist() == [["spatial", "mixed", "mixed", "temporal"]]


@pytest.mark.parametrize(
    ("heads", "ratio", "kept"), [(40, 0.3, 28), (40, 0.9, 8), (12, 0.3, 9), (24, 0.3, 17), (8, 0, 8), (20, 0.85, 4)]
)
def test_the_number_of_heads(heads, ratio, kept):
    assert heads_to_keep(heads, ratio) == kept


@pytest.mark.parametrize(
    ("neurons", "ratio", "kept"),
    [(13824, 0.3, 9728), (8960, 0.3, 6272), (12288, 0.3, 8576), (432, 0.3, 297), (13825, 0, 13825), (20, 0.99, 1)],
)
def test_the_number_of_neurons(neurons, ratio, kept):
    assert neurons_to_keep(neurons, ratio) == kept


@pytest.mark.parametrize("ratio", [-0.1, 1, float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(UserError, match=r"--heads is .*: expected a share from 0 to below 1"):
        check_ratio("--heads", ratio)


def test_scores_are_norms_times_norms():
    rng = np.random.default_rng(0)
    names = ("tokens", "context", "joint", "cross_text", "cross_image")
    kernel = rng.standard_normal((4, 8, 32))
    expected = [np.linalg.norm(kernel[head]) for head in range(4)]
    np.testing.assert_allclose(output_norms(kernel), expected, rtol=1e-6)
    sums = {name: rng.random((3, 4)) for name in names}
    norms = {name: rng.random((3, 4)) for name in ("blocks.attn1", "blocks.attn2")}
    found = scored_heads(WAN, sums, norms.__getitem__)
    np.testing.assert_array_equal(found[("blocks.attn1",)], sums["tokens"] * norms["blocks.attn1"])
    crossed = (sums["cross_text"] + sums["cross_image"]) * norms["blocks.attn2"]
    np.testing.assert_array_equal(found[("blocks.attn2",)], crossed)
    sums = {name: rng.random((5, 4)) for name in names}
    stacks = {"double.image.attn": 2, "double.text.attn": 2, "single.attn": 3}
    norms = {name: rng.random((blocks, 4)) for name, blocks in stacks.items()}
    found = scored_heads(FLUX, sums, norms.__getitem__)
    double = sums["tokens"][:2] * norms["double.image.attn"] + sums["context"][:2] * norms["double.text.attn"]
    np.testing.assert_array_equal(found[("double.image.attn", "double.text.attn")], double)
    np.testing.assert_array_equal(found[("single.attn",)], sums["joint"][2:] * norms["single.attn"])
