"""What a recipe learns of the models that it trains, from their sizes alone."""

from dataclasses import replace

import jax
import pytest
from first_frames import text_or_image

from dit_jax.config import UserError
from infer.random_pipeline import PRESETS
from train.models import Source, check_student
from train.placement import training_mesh
from train.recipes import pare_stage1


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


@pytest.mark.parametrize(
    ("student", "model", "expected"),
    [
        ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "its width is 1536, expected 5120; choose another student"),
        ("wan2.1-i2v-14b", "wan2.1-t2v-14b", "its in_channels is 36, expected 16; choose another student"),
        ("flux.1-dev", "wan2.1-t2v-14b", "expected a Wan, found a Flux; choose another student"),
    ],
)
def test_a_student_of_another_model_is_refused(student, model, expected):
    mesh = training_mesh()
    with pytest.raises(UserError, match=f"{student} is no student of {model}: {expected}"):
        pare_stage1.student_of(student, Source(model, mesh, planned=True))
    with pytest.raises(UserError, match=r"is no student of wan2\.1-t2v-14b: its width"):
        check_student(Source("wan2.1-t2v-1.3b", mesh), Source("wan2.1-t2v-14b", mesh), ("width",))


def test_a_student_of_fewer_blocks_is_refused(monkeypatch):
    monkeypatch.setitem(PRESETS, "short", replace(PRESETS["flux.1-dev"], double_blocks=5))
    with pytest.raises(
        UserError, match=r"short is no student of flux\.1-dev: it has 5 \+ 38 blocks, expected 19 \+ 38;"
    ):
        pare_stage1.student_of("short", Source("flux.1-dev", training_mesh(), planned=True))
