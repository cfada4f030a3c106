"""Every pair of methods that a plan allows, on a tiny model with all the parts that they need, and by `dit-generate` on
the shipped ones."""

import itertools
import json

import numpy as np
import pytest
from beside_diffusers import PROMPT, SIZE

from dit_jax.config import UserError
from dit_jax.methods.plan import METHODS, REFUSED, parse_plan
from infer import generate, load_pipeline
from infer.adapt import main

pytestmark = pytest.mark.long

STEPS = 4
WORDS = {
    "hsa": "hsa:groups=50@4/50@2:window=0:ranking=random",
    "coredit": "coredit:0.3",
    "routing": "routing:min=2:max=2",
    "ddit": "ddit:2p@1-2",
    "teacache": "teacache:10",
    "taylorseer": "taylorseer:n=2",
}
PAIRS = list(itertools.combinations(METHODS, 2))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    ratios = tmp_path_factory.mktemp("magcache") / "ratios.json"
    ratios.write_text(json.dumps({"ratios": [1.0, 0.9, 0.9, 0.9]}))
    return WORDS | {"magcache": f"magcache:1:ratios={ratios}"}


@pytest.fixture(scope="module")
def pipe(text_to_video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted") / "model"
    added = ["--add", "router", "--add", "ddit"]
    assert main(["--model", str(text_to_video[0]), *added, "--out", str(folder)]) == 0
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def adapted_demo(tmp_path_factory):
    """Folders of the shipped models with an untrained router and untrained adapters, by name."""
    folders = {name: tmp_path_factory.mktemp("demos") / name for name in ("demo-wan", "demo-flux")}
    for name, folder in folders.items():
        assert main(["--model", name, "--add", "router", "--add", "ddit", "--out", str(folder)]) == 0
    return folders


def latents(pipe, plan):
    return pipe(PROMPT, size=SIZE, frames=5, steps=STEPS, solver="euler", plan=plan).latents


ALLOWED = [pair for pair in PAIRS if frozenset(pair) not in REFUSED]


@pytest.mark.parametrize("names", [(name,) for name in METHODS] + ALLOWED, ids="+".join)
@pytest.mark.parametrize(("model", "prompt", "suffix"), [
    ("demo-wan", "a red 7 moving left", "mp4"), ("demo-flux", "a red 7", "png"),
])  # fmt: skip
def test_dit_generate_runs_them_on_the_shipped_models(adapted_demo, words, names, model, prompt, suffix, tmp_path):
    out = tmp_path / f"out.{suffix}"
    settings = ["--prompt", prompt, "--steps", str(STEPS), "--out", str(out)]
    plan = "+".join(words[name] for name in names)
    assert generate.main(["--model", str(adapted_demo[model]), "--plan", plan, *settings]) == 0
    assert out.stat().st_size > 1000


@pytest.mark.parametrize("pair", ALLOWED, ids="+".join)
def test_allowed_pairs_run_and_both_take_part(pipe, words, pair):
    both = latents(pipe, "+".join(words[name] for name in pair))
    assert np.isfinite(both).all()
    for name in pair:
        assert not np.array_equal(both, latents(pipe, words[name])), f"{name} alone gives the same"


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if frozenset(pair) in REFUSED], ids="+".join)
def test_other_pairs_are_refused_by_name(words, pair):
    with pytest.raises(UserError, match=f"{sorted(pair)[0]} and {sorted(pair)[1]} cannot share a plan"):
        parse_plan("+".join(words[name] for name in pair))
