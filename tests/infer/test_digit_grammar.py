"""The grammar: captions and scenes are each other's inverse, and every misuse names its word."""

import random
import re
import subprocess
import sys

import pytest

from dit_jax.config import UserError
from infer import digit_grammar as grammar
from infer.digit_grammar import (
    MOVING,
    PICTURES,
    Digit,
    Scene,
    caption,
    parse,
    random_picture,
    random_scene,
    unknown_words,
)


def test_example_reads_as_written():
    scene = parse("a red 7 moving left above a blue 2 on a striped background")
    assert scene == Scene(
        digits=(Digit(value=7, colour="red", motion="moving left"), Digit(value=2, colour="blue")),
        relation="above",
        background="striped",
    )


def test_parse_inverts_caption_over_the_grammar():
    rng = random.Random(3)
    for _ in range(3000):
        scene = random_scene(rng)
        assert parse(caption(scene)) == scene
        assert parse(caption(scene, rng)) == scene
        picture = random_picture(rng)
        assert parse(caption(picture, rng, of_picture=True)) == picture


def test_what_goes_unsaid():
    scene = Scene(digits=(Digit(value=4, colour="white"),))
    assert caption(scene) == "a white 4 standing still on a plain background"
    written = {caption(scene, random.Random(seed)) for seed in range(40)}
    assert written == {
        "a white 4",
        "a white 4 standing still",
        "a white 4 on a plain background",
        "a white 4 standing still on a plain background",
    }


def test_direction_is_not_taken_for_a_relation():
    scene = parse("A green 1 moving left left of a white 3 moving up and left, on a dotted background.")
    assert scene.relation == "left of"
    assert [digit.motion for digit in scene.digits] == ["moving left", "moving up and left"]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a pink 7 moving left", "'pink'"),
        ("a red seven", "'seven'"),
        ("a red 7 running left", "'running'"),
        ("a red 12", "'12'"),
        ("red 7", "'red'"),
        ("a red 7 moving", "a direction"),
        ("a red 7 moving left of a blue 2", "'of'"),
        ("a red 7 standing", "'still'"),
        ("a red 7 above", "'a'"),
        ("a red 7 on a red background", "'red'"),
        ("a red 7 a blue 2", "'a' at word 4"),
        ("a red 7 above a blue 2 below a white 1", "'below'"),
        ("", "the end"),
        ("two red 7", "a digit 0s to 9s"),
        ("a red 7s", "a digit 0 to 9"),
        ("three red 7s", "'three'"),
    ],
)
def test_misuse_names_the_word(prompt, named):
    with pytest.raises(UserError, match=re.escape(named)):
        parse(prompt)


def test_unknown_words_once_each_in_order():
    assert unknown_words("a pink 7 flying, above a pink Cat", MOVING) == ["pink", "flying", "cat"]
    assert unknown_words("A red 7, moving left.", MOVING) == []
    assert unknown_words("two red 7s, moving left.", PICTURES) == ["moving"]
    assert unknown_words("two red 7s", MOVING) == ["two", "7s"]


def test_scenes_are_uniform():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(6000)]
    digits = [digit for scene in scenes for digit in scene.digits]
    assert abs(sum(len(scene.digits) == 2 for scene in scenes) / 6000 - 0.5) < 0.03
    for values, choices in (
        ([digit.value for digit in digits], range(10)),
        ([digit.colour for digit in digits], grammar.COLOURS),
        ([digit.motion for digit in digits], grammar.MOTIONS),
        ([scene.background for scene in scenes], grammar.BACKGROUNDS),
        ([scene.relation for scene in scenes if scene.relation], grammar.RELATIONS),
    ):
        for choice in choices:
            assert values.count(choice) / len(values) == pytest.approx(1 / len(choices), rel=0.2)


@pytest.mark.parametrize(
    ("sample", "known"), [(grammar.all_captions_sample, MOVING), (grammar.all_picture_captions_sample, PICTURES)]
)
def test_sample_of_captions_has_every_word_and_is_short(sample, known):
    captions = sample(2000, seed=1)
    assert captions == sample(2000, seed=1)
    assert {word for text in captions for word in text.split()} == known.words
    assert max(len(text.split()) for text in captions) < 30


@pytest.mark.parametrize("words", [grammar.COLOURS, grammar.MOTIONS, grammar.BACKGROUNDS])
def test_help_text_shows_the_grammar(words):
    for phrase in words:
        for word in phrase.split():
            assert word in MOVING.text
    for shown in grammar.GRAMMARS.values():
        for line in shown.text.splitlines()[-3:]:
            parse(line.removeprefix("examples").strip())


def test_scene_refuses_what_has_no_meaning():
    with pytest.raises(UserError, match="relation"):
        Scene(digits=(Digit(value=1, colour="red"),), relation="above")
    with pytest.raises(UserError, match="relation"):
        Scene(digits=(Digit(value=1, colour="red"),) * 2)
    with pytest.raises(UserError, match="colour"):
        Digit(value=1, colour="orange")


def test_grammar_imports_nothing_heavy():
    code = "import sys, infer.digit_grammar; sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'mlxtend')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
