"""The scores: real clips near 1, each single fault seen by its own score, the Fréchet distance against its formula."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import linalg

from infer import digit_reader
from infer.digit_grammar import Digit, Scene
from infer.digit_reader import load_reader, read, train_reader
from infer.digit_scores import frechet_distance, read_clip, real_clips, summary
from infer.moving_digits import load_digits
from infer.suites import SUITES, Exam


@pytest.fixture(scope="session")
def reader():
    """A classifier after a few seconds of training: good enough to tell right from wrong."""
    return train_reader(variants=8, epochs=3)


@pytest.fixture(scope="module")
def scenes():
    return SUITES["moving-digits"].prompts(16)[0]


@pytest.fixture(scope="module")
def real(scenes):
    return list(real_clips(scenes, 0))


@pytest.fixture(scope="module")
def reference(scenes, reader):
    return _readings(real_clips(scenes, 1), scenes, reader)


def _readings(clips, scenes, reader):
    return [read_clip(clip, scene, reader) for clip, scene in zip(clips, scenes, strict=True)]


def _scores(clips, scenes, reader, reference):
    return summary(_readings(clips, scenes, reader), reference)


@pytest.fixture(scope="module")
def ceiling(real, scenes, reader, reference):
    return _scores(real, scenes, reader, reference)


def test_real_clips_score_high(ceiling):
    assert ceiling["colour"] == ceiling["direction"] == ceiling["count"] == ceiling["relation"] == 1
    assert ceiling["digit"] >= 0.75 and ceiling["digit_each"] >= 0.85
    assert ceiling["videos"] == 16


def test_an_exam_makes_its_own_reference_and_is_reproducible(real, scenes, reader, ceiling):
    exam = Exam(SUITES["moving-digits"], 16, 1, reader)
    assert exam.ceiling == exam.summary(exam.readings(iter(real))) == ceiling
    with pytest.raises(ValueError, match="zip"):
        exam.readings(real[:3])


def test_an_exam_asks_every_prompt_once_for_each_seed(reader):
    once, thrice = (Exam(SUITES["moving-digits"], 2, seeds, reader) for seeds in (1, 3))
    assert thrice.captions == once.captions * 3 and len(thrice.reference) == 6
    assert thrice.ceiling["videos"] == 6
    features = [reading.features for reading in thrice.reference]
    assert not np.array_equal(features[0], features[2]), "other glyphs for every seed"


def _changed(scene, **fault):
    return replace(scene, digits=(replace(scene.digits[0], **fault), *scene.digits[1:]))


@pytest.mark.parametrize(
    ("score", "field", "others"),
    [
        ("digit", "value", ("colour", "direction")),
        ("colour", "colour", ("digit", "direction")),
        ("direction", "motion", ("digit", "colour")),
    ],
)
def test_a_fault_shows_in_its_own_score(real, scenes, reader, reference, ceiling, score, field, others):
    wrong = {"value": lambda v: (v + 3) % 10, "colour": lambda c: "red" if c != "red" else "blue"}
    wrong["motion"] = lambda m: "moving left" if m != "moving left" else "standing still"
    told = [_changed(scene, **{field: wrong[field](getattr(scene.digits[0], field))}) for scene in scenes]
    scores = _scores(real, told, reader, reference)
    assert scores[score] <= 0.1
    for other in others:
        assert scores[other] == ceiling[other]


def test_digits_in_the_wrong_order_are_wrong(reader):
    scene = Scene(
        digits=(Digit(value=1, colour="red"), Digit(value=0, colour="green", motion="moving left")), relation="above"
    )
    (clip,) = real_clips([scene], 0)
    assert read_clip(clip, scene, reader).right.all()
    assert read_clip(clip, replace(scene, digits=scene.digits[::-1], relation="below"), reader).right.all()
    assert not read_clip(clip, replace(scene, relation="below"), reader).right.any()
    aside = read_clip(clip, replace(scene, relation="left of"), reader)
    assert aside.relation is False and aside.count


def test_missing_and_surplus_digits(reader):
    pair = Scene(digits=(Digit(value=1, colour="red"), Digit(value=0, colour="green")), relation="above")
    lone = Scene(digits=(Digit(value=0, colour="green"),))
    (of_pair,), (of_lone,) = real_clips([pair], 0), real_clips([lone], 0)
    missing = read_clip(of_lone, pair, reader)
    assert not missing.count and not missing.relation and missing.right[:, 1].sum() == 0
    assert not read_clip(of_pair, lone, reader).count


def test_blank_clips_score_nothing(scenes, real, reader, reference, ceiling):
    scores = _scores([np.full_like(clip, 40) for clip in real], scenes, reader, reference)
    assert scores["digit"] == scores["colour"] == scores["direction"] == scores["count"] == scores["all"] == 0
    assert scores["frechet"] > 10 * ceiling["frechet"]


def test_worse_looking_digits_are_further_from_real(scenes, real, reader, reference, ceiling):
    smeared = [np.maximum(clip, np.maximum(np.roll(clip, 5, 2), np.roll(clip, -5, 1))) for clip in real]
    assert _scores(smeared, scenes, reader, reference)["frechet"] > 1.5 * ceiling["frechet"]


def test_halves_of_the_held_out_glyphs_are_disjoint(scenes, monkeypatch):
    from infer import digit_scores

    seen = {0: set(), 1: set()}
    for half in seen:
        keep = lambda scene, glyphs, rng, half=half: seen[half].update(glyph.tobytes() for glyph in glyphs)  # noqa: E731
        monkeypatch.setattr(digit_scores, "render", keep)
        list(real_clips(scenes * 4, half))
    held_out = {image.tobytes() for image in load_digits("held-out").images}
    assert seen[0] and seen[1] and not seen[0] & seen[1] and seen[0] | seen[1] <= held_out


def test_frechet_distance_is_the_formula():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 1
    b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 2) == pytest.approx(24, rel=1e-6)


def test_reading_does_not_depend_on_the_batch(reader):
    glyphs = load_digits("held-out").images[:45]
    logits, features = read(reader, glyphs)
    assert logits.shape == (45, 10) and features.shape == (45, digit_reader.FEATURES)
    for part in (slice(0, 7), slice(7, 45)):
        np.testing.assert_array_equal(read(reader, glyphs[part])[0], logits[part])


def test_what_ships_reads_digits_that_it_has_not_seen():
    digits = load_digits("held-out")
    logits, _ = read(load_reader(), digits.images)
    assert (logits.argmax(1) == digits.labels).mean() > 0.96


def test_a_classifier_is_written_and_read(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(digit_reader, "train_reader", lambda progress: reader)
    monkeypatch.setattr("sys.argv", ["digit_reader", str(tmp_path / "reader.safetensors")])
    digit_reader.main()
    monkeypatch.setattr(digit_reader, "SHIPPED", tmp_path / "reader.safetensors")
    load_reader.cache_clear()
    glyphs = load_digits("held-out").images[:9]
    np.testing.assert_array_equal(read(load_reader(), glyphs)[0], read(reader, glyphs)[0])
    load_reader.cache_clear()


@pytest.mark.long
def test_real_clips_score_near_one_with_the_whole_classifier():
    ceiling = Exam(SUITES["moving-digits"], 200, 1, load_reader()).ceiling
    print(ceiling)
    assert ceiling["digit"] >= 0.95 and ceiling["colour"] >= 0.99 and ceiling["direction"] >= 0.98
    assert ceiling["count"] >= 0.99 and ceiling["relation"] >= 0.99
