"""What a recipe learns of the models that it trains, from their sizes alone."""

import jax
import pytest
from first_frames import text_or_image

from train.models import Source
from train.placement import training_mesh


@pytest.mark.parametrize(
    ("model", "holds"),
    [("wan2.2-ti2v-5b", True), ("wan2.1-t2v-14b", False), ("wan2.1-i2v-14b", False), ("flux.1-dev", False),
     ("demo-wan", False), ("demo-flux", False)],
)  # fmt: skip
def test_wan_2_2s_text_or_image_model_alone_holds_first_frames(model, holds):
    assert Source(model, training_mesh()).holds_first_frame == holds


def test_a_checkpoint_says_that_it_holds_first_frames(tmp_path):
    assert Source(text_or_image(tmp_path / "model"), training_mesh()).holds_first_frame


def test_what_is_kept_of_a_pruned_model():
    whole = Source("wan2.1-t2v-1.3b", training_mesh())
    pruned = Source("wan2.1-t2v-1.3b", training_mesh(), pruned=(0.25, 0.5))
    kept = pruned.kept_of(whole)
    assert (kept["kept_heads"], kept["kept_neurons"]) == (9 / 12, 4480 / 8960)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(each.transformer())) for each in (pruned, whole)]
    assert kept["kept_parameters"] == counts[0] / counts[1] < 0.75
    assert set(whole.kept_of(whole).values()) == {1.0}
