"""What a load test asks for, and when."""

import json
import random
import statistics
from collections import Counter

import numpy as np
import pytest
from load_target import MODELS

from dit_jax.config import UserError
from infer.digit_grammar import GRAMMARS, unknown_words
from infer.load_bad import BAD, bad_call
from infer.load_mix import Shares, read_mix


def test_arrivals_are_a_poisson_process_from_a_seed():
    mix = read_mix({"data": MODELS}, None, None, 0)
    shares = Shares(cancels=0.1, bad=0.2)
    drawn = mix.arrivals(random.Random(0), 2.0, 2000.0, shares)
    assert drawn == mix.arrivals(random.Random(0), 2.0, 2000.0, shares)
    assert len(drawn) == pytest.approx(4000, rel=0.05)
    gaps = np.diff([one.due for one in drawn])
    assert gaps.mean() == pytest.approx(0.5, rel=0.05) and gaps.std() == pytest.approx(0.5, rel=0.1)
    assert statistics.mean(one.bad is not None for one in drawn) == pytest.approx(0.2, abs=0.02)
    assert statistics.mean(one.patience is not None for one in drawn) == pytest.approx(0.1, abs=0.02)
    counts = Counter(one.kind for one in drawn)
    assert len(counts) == 5 and max(counts.values()) < 1.2 * min(counts.values())


def test_a_mix_with_weights():
    mix = read_mix({"data": MODELS}, "films=1, films:64x64x17:high=3,films:64x32x9=0", None, 0)
    assert {str(kind): weight for kind, weight in zip(mix.kinds, mix.weights, strict=True)} == {
        "films 64x64x17 high": 3.0,
        "films 64x64x17 fast": 1.0,
    }
    assert mix.kinds[0].size == "64x64" and mix.kinds[0].frames == 17


def test_built_in_prompts_fit_the_models():
    mix = read_mix({"data": MODELS}, None, None, 0)
    assert not any(unknown_words(prompt, GRAMMARS["moving-digits"]) for prompt in mix.video_prompts)
    assert not any(unknown_words(prompt, GRAMMARS["digits"]) for prompt in mix.image_prompts)


def test_malformed_requests_differ_from_the_sound_one():
    sound = read_mix({"data": MODELS}, "pictures=1", None, 0).draw(random.Random(0)).body()
    for name in BAD:
        assert bad_call(name, sound, False).get("content") != json.dumps(sound).encode(), name


@pytest.mark.parametrize(
    ("models", "weights", "sentence"),
    [
        ({"data": [{"id": "gpt"}]}, None, "expected one of dit-serve"),
        ({"data": []}, None, "lists no model"),
        ({"data": MODELS}, "film=1", "names nothing that is served"),
        ({"data": MODELS}, "films:64x64x17:high:more=1", "names nothing that is served"),
        ({"data": MODELS}, "films=many", "has no weight"),
        ({"data": MODELS}, "films=-1", "has no weight"),
        ({"data": MODELS}, "films=0", "leaves nothing to ask for"),
    ],
)
def test_a_bad_mix(models, weights, sentence):
    with pytest.raises(UserError, match=sentence):
        read_mix(models, weights, None, 0)
