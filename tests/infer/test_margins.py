"""Margins of scores against the error of a mean, and what is resampled."""

import numpy as np
import pytest

from infer.margins import margins


def test_margins_of_a_mean_are_those_of_its_standard_error():
    values = np.random.default_rng(3).normal(size=400)
    found = margins(lambda drawn: {"mean": float(values[drawn].mean()), "count": len(drawn)}, 400)
    assert found == {"mean": pytest.approx(1.96 * values.std() / 20, rel=0.15)}


def test_all_seeds_of_a_prompt_are_drawn_together():
    of_prompts = np.random.default_rng(4).normal(size=100)
    values = np.tile(of_prompts, 3)  # seeds add nothing: a prompt's samples are all alike
    thrice = margins(lambda drawn: {"mean": float(values[drawn].mean())}, 100, seeds=3)
    assert thrice["mean"] == pytest.approx(1.96 * of_prompts.std() / 10, rel=0.2)


def test_a_score_that_some_draws_lack_has_the_margin_of_the_others():
    def of_draw(drawn):
        return {"share": None if drawn[0] == 0 else float(drawn[0])}

    found = margins(of_draw, 3)
    assert found == {"share": pytest.approx(1.96 * np.std([1, 2]), rel=0.1)}
