"""How soon the ramp of CoReDiT's recipe takes its turns, and what it says of one that did not reach its ratio."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from dit_jax.config import UserError
from train.models import Source
from train.placement import training_mesh
from train.recipe import POSITION
from train.recipes import coredit
from train.recipes.coredit import RAMP, Config


def source():
    return Source("demo-wan", training_mesh("fsdp=1"))


@pytest.mark.parametrize("blocks", [10, 28, 40, 57])
@pytest.mark.parametrize("steps", [600, 10000, 30000])
def test_the_ramp_ends_within_two_thirds_of_the_steps_and_is_no_slower_than_the_papers(blocks, steps):
    config = Config(steps=steps)
    every, turns = config.every(blocks), config.ratio * blocks * 64
    assert 1 <= every <= 15
    assert every * turns <= 2 * steps / 3 or every == 1
    assert every == 15 or (every + 1) * turns > 2 * steps / 3 - every - 1
    assert replace(config, ramp_every=7).every(blocks) == 7


def test_a_short_run_reaches_its_ratio(tmp_path):
    """As `variant=demo` has it, on a lattice whose tokens 64 divides."""
    config = Config(**coredit.VARIANTS["demo"], adaptive=False, out=str(tmp_path))
    ramp = coredit.Ramp(config=config, source=source(), driven=lambda state, batch, key: batch["skipped"])
    latents = np.zeros((2, 1, 16, 16, 16), np.float16)
    told = [ramp(None, {"latents": latents, POSITION: step}, jax.random.key(0)) for step in range(400)]
    assert told[-1].sum() == round(0.45 * 64 * 10) and told[200].sum() < told[-1].sum()


def test_batches_of_several_shapes_go_on_from_each_others_shares(tmp_path):
    """Lattices of 4x4, 8x8 and 4x6 tokens, where shares round and the cap of 0.6 falls differently."""
    config = Config(**coredit.VARIANTS["demo"] | {"ramp_every": 1}, adaptive=False, ratio=0.55, out=str(tmp_path))
    ramp = coredit.Ramp(config=config, source=source(), driven=lambda state, batch, key: batch["skipped"])
    shapes = {16: (8, 8), 64: (16, 16), 24: (8, 12)}
    before = np.zeros(10)
    for step in range(400):
        tokens = list(shapes)[step % 3]
        latents = np.zeros((2, 1, *shapes[tokens], 16), np.float16)
        told = ramp(None, {"latents": latents, POSITION: step}, jax.random.key(0))
        assert told.shape == (10,) and told.max() <= 0.6 * tokens
        np.testing.assert_allclose(told / tokens, ramp.shares, atol=0.5 / tokens + 0.04, err_msg="the cap, rounded")
        gained = ramp.shares - before
        assert (gained >= 0).all() and gained.sum() <= max(tokens // 64, 1) / tokens + 1e-9
        before = ramp.shares
    assert ramp.full and ramp.shares.mean() == pytest.approx(0.55, abs=0.02)
    resumed = replace(ramp, shares=None, changes=[])
    resumed(None, {"latents": latents, POSITION: 400}, jax.random.key(0))
    np.testing.assert_array_equal(resumed.shares, ramp.shares)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reached", [0.1, 0.44])
def test_a_ramp_that_did_not_end_is_said(tmp_path, reached):
    config = Config(out=str(tmp_path))
    made = coredit.training(config, source())
    (tmp_path / RAMP).write_text(json.dumps([[3, [reached] * 10]]))
    weights = {
        "student": {name: leaf.rectangle(None) for name, leaf in made.target.checkpoint.leaves("transformer").items()}
    }
    if reached < 0.4:
        with pytest.raises(UserWarning, match=r"blocks skip 0\.100 of the tokens on average, expected 0\.45"):
            made.result(made.target.checkpoint, weights)
    else:
        made.result(made.target.checkpoint, weights)


def test_turns_without_a_step_between_them_are_refused():
    with pytest.raises(UserError, match="ramp_every is 0, expected at least 1"):
        coredit.training(Config(ramp_every=0), source())
