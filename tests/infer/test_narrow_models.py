"""Narrow models that are made in memory."""

import numpy as np
import pytest
from tiny_flux import pipeline as flux_pipeline

from convert.checkpoint import open_checkpoint
from infer.narrow_models import narrow_model, random_widths, scored_widths


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux") / "tiny-flux"
    flux_pipeline(dev=True).save_pretrained(folder)
    return open_checkpoint(folder)


def test_lots_keep_as_many_as_scores_do_and_differ_by_block_and_seed(text_to_video):
    checkpoint = open_checkpoint(text_to_video[0])
    scored, one, other = (
        scored_widths(checkpoint, None, 0.3, 1.0),
        random_widths(checkpoint, 0.5, 0.3, seed=1),
        random_widths(checkpoint, 0.5, 0.3, seed=2),
    )
    assert one.kept_neurons == scored.kept_neurons and (one.kept_heads, scored.kept_heads) == (1, 2)
    kept = one.neurons["blocks.mlp"]
    assert kept.shape == scored.neurons["blocks.mlp"].shape == (3, 28)
    assert (np.diff(kept, axis=1) > 0).all() and len(np.unique(kept, axis=0)) == 3
    assert (kept != other.neurons["blocks.mlp"]).any()
    assert set(one.heads) == set(scored.heads)


def test_both_streams_of_flux_lose_the_same_heads(flux):
    widths = random_widths(flux, 0.5, 0.0, seed=0)
    assert widths.heads["double.image.attn"] is widths.heads["double.text.attn"]
    assert widths.kept_neurons == flux.component("transformer").config.mlp_width


def test_a_narrow_model_has_the_weights_that_are_kept(text_to_video):
    checkpoint = open_checkpoint(text_to_video[0])
    widths = random_widths(checkpoint, 0.5, 0.3, seed=4)
    model = narrow_model(checkpoint, widths)
    full = checkpoint.leaves("transformer")["blocks.mlp.up.kernel"]
    found = np.asarray(model.blocks.mlp.up.kernel[...])
    for block in range(3):
        np.testing.assert_array_equal(found[block], full.block(block)[:, widths.neurons["blocks.mlp"][block]])
    assert (model.config.heads, model.config.mlp_width, model.config.norm_counts_pruned) == (1, 28, True)
