"""Batches: they follow from seed, step and batch size alone, and nothing is left out or preferred."""

from collections import Counter
from itertools import islice, pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_data import BUCKETS, COUNTS, TEXT, example, write_data

from dit_jax.config import UserError
from train.loader import BatchSettings, batches
from train.loop import RunConfig, train
from train.optimizers import adam
from train.placement import training_mesh
from train.shards import open_shards
from train.step import TrainStep, alone


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return open_shards(write_data(tmp_path_factory.mktemp("data")))


def made(shards, **settings):
    return batches(shards, BatchSettings(**{"batch": 4, "seed": 1, "caption_dropout": 0.3} | settings))


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name])


def test_a_batch_holds_the_examples_that_it_says(shards):
    batch = made(shards, caption_dropout=0.0)
    for position in range(8):
        bucket, picked = batch.picks(position)
        arrays = batch(position)
        assert arrays["text"].shape == (4, *TEXT) and all(array.dtype == np.float16 for array in arrays.values())
        for row, index in enumerate(picked):
            for name, array in example(bucket, index).arrays.items():
                np.testing.assert_array_equal(arrays[name][row], array.astype(np.float16))
        assert [one.file for one in batch.examples(position)] == [f"{index}.mp4" for index in picked]


def test_the_rows_of_the_hosts_are_those_of_the_batch_of_one(shards):
    whole = made(shards)
    shares = ((2, 0), (1, 3))
    hosts = [made(shards, own=own) for own in shares]
    for position in range(12):
        of_all = whole(position)
        for host, own in zip(hosts, shares, strict=True):
            assert_equal(host(position), {name: rows[list(own)] for name, rows in of_all.items()})


def test_a_step_is_the_same_whenever_it_is_asked_for(shards):
    """After a restart, out of order, read ahead or not, by few threads or many."""
    first = made(shards)
    straight = [first(position) for position in range(10)]
    again = made(shards, ahead=1)
    for position in (7, 8, 9, 3, 4, 0, 9):
        assert_equal(again(position), straight[position])
        assert_equal(first.at(position), straight[position])
    many = made(shards, ahead=16).starting(5)
    for position in range(5, 10):
        assert_equal(next(many), straight[position])
    assert first(10**9)["latents"].shape[0] == 4


def test_another_seed_is_another_order(shards):
    def files(seed):
        return [made(shards, seed=seed).picks(position) for position in range(8)]

    assert files(1) == files(1) != files(2)


@pytest.mark.parametrize("batch", [1, 3, 4, 16, 64])
def test_in_the_long_run_every_example_comes_equally_often(batch, shards):
    """Of batches smaller and larger than a bucket, and than all of them."""
    loader = made(shards, batch=batch)
    epochs = 4 * batch  # after so many no bucket has anything left over
    seen = Counter()
    for position in range(epochs * sum(COUNTS) // batch):
        bucket, picked = loader.picks(position)
        seen.update((bucket.name, index) for index in picked)
    assert set(seen.values()) == {epochs} and len(seen) == sum(COUNTS)


def test_a_bucket_is_gone_through_before_anything_comes_again(shards):
    loader = made(shards, batch=3)
    of_bucket = {bucket: [] for bucket in BUCKETS}
    epoch = sum(COUNTS) // 3
    for position in range(6 * epoch):
        bucket, picked = loader.picks(position)
        of_bucket[bucket].append(picked)
    for bucket, count in zip(BUCKETS, COUNTS, strict=True):
        picked = Counter(index for rows in of_bucket[bucket] for index in rows)
        assert max(picked.values()) - min(picked.get(index, 0) for index in range(count)) <= 2
    rows = [index for rows in of_bucket[BUCKETS[0]][:8] for index in rows]
    orders = rows[:12], rows[12:]
    assert [sorted(order) for order in orders] == [list(range(12))] * 2 and orders[0] != orders[1]


def test_an_epoch_mixes_the_buckets(shards):
    loader = made(shards, batch=1)
    order = [loader.picks(position)[0].name for position in range(52)]
    assert Counter(order[:26]) == Counter({b.name: n for b, n in zip(BUCKETS, COUNTS, strict=True)})
    assert sum(one != other for one, other in pairwise(order[:26])) > 10 and order[:26] != order[26:]


def test_dropped_captions_are_the_empty_one(shards):
    loader, kept = made(shards, batch=8), made(shards, batch=8, caption_dropout=0.0)
    empty = np.zeros(TEXT)
    empty[0, 0] = 1
    dropped = []
    for position in range(100):
        batch, whole = loader.at(position), kept.at(position)
        np.testing.assert_array_equal(batch["latents"], whole["latents"])
        blank = (batch["pooled"] == 7).all(-1)
        np.testing.assert_array_equal(batch["text"][blank], np.broadcast_to(empty, (blank.sum(), *TEXT)))
        np.testing.assert_array_equal(batch["text"][~blank], whole["text"][~blank])
        dropped.append(blank)
    assert 0.25 < np.mean(dropped) < 0.35 and len({tuple(blank) for blank in dropped}) > 50
    assert (made(shards, caption_dropout=1.0).at(0)["pooled"] == 7).all()


def test_a_shard_that_is_damaged_stops_the_run_with_its_name(tmp_path):
    folder = write_data(tmp_path / "data")
    file = folder / f"000000-{BUCKETS[1].name}.array_record"
    content = bytearray(file.read_bytes())
    content[300] ^= 1
    file.write_bytes(content)
    loader = made(open_shards(folder, checksums=False))
    with pytest.raises(UserError, match=f"{file.name} is damaged"):
        list(islice(loader.starting(0), 20))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch": 0}, "the batch is of 0 rows"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"ahead": 0}, "0 batches are to be read ahead"),
    ],
)
def test_bad_input_is_one_sentence(settings, told, shards):
    with pytest.raises(UserError, match=told):
        made(shards, **settings)


def test_data_without_examples(tmp_path):
    with pytest.raises(UserError, match="holds no example"):
        made(open_shards(write_data(tmp_path / "data", counts=(0, 0, 0, 0))))


class Scale(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 1)))


def squares(model, batch, key):
    return jnp.mean(jnp.square(batch["latents"].astype(jnp.float32) @ model.kernel[...])), {}


def test_a_training_run_that_was_stopped_goes_on_exactly(shards, tmp_path):
    def run(out, steps):
        config = RunConfig(out=str(tmp_path / out), steps=steps, log_every=1, save_every=3)
        step = TrainStep(Scale(), alone(squares, adam(0.05)), training_mesh())
        return train(config, step.init(Scale()), step, made(shards)).state

    straight = run("straight", 7)
    run("stopped", 3)
    np.testing.assert_array_equal(straight.params["kernel"], run("stopped", 7).params["kernel"])
