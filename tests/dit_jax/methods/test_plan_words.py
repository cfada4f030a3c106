"""Plans as they are built: what cannot share one is refused, whoever builds it."""

import json
from functools import partial
from types import SimpleNamespace

import pytest

from dit_jax.config import UserError
from dit_jax.methods.coredit import Coredit
from dit_jax.methods.hsa import PRESETS
from dit_jax.methods.plan import Plan, parse_plan


@pytest.mark.parametrize(("steps", "ratios"), [(10, 20), (10, 6)])
def test_methods_for_other_numbers_of_steps_cannot_share_a_plan(tmp_path, steps, ratios):
    ddit, magcache = tmp_path / "d.json", tmp_path / "m.json"
    ddit.write_text(json.dumps({"tau": 0.02, "rho": 0.5, "steps": steps}))
    magcache.write_text(json.dumps({"ratios": [1.0] * ratios}))
    with pytest.raises(UserError, match=f"ddit is for {steps} steps and magcache for {ratios}"):
        parse_plan(f"magcache:0.3:ratios={magcache}+ddit:{ddit}")
    magcache.write_text(json.dumps({"ratios": [1.0] * steps}))
    assert parse_plan(f"ddit:{ddit}+magcache:0.3:ratios={magcache}").steps == steps


def test_a_plan_of_methods_says_so():
    with pytest.raises(UserError, match=r"a plan of coredit, hsa is called dense: .* make it with parse_plan"):
        Plan((Coredit(ratios=(0.3,)), PRESETS["50"]))
    assert str(Plan((PRESETS["50"],), "hsa:50")) == "hsa:50" and Plan() == parse_plan("dense")


def test_pairs_are_refused_however_the_plan_is_built():
    with pytest.raises(UserError, match="coredit and hsa cannot share a plan"):
        Plan((Coredit(ratios=(0.3,)), PRESETS["50"]), "coredit:0.3+hsa:50")


def test_methods_are_applied_in_one_order_however_they_are_written():
    """Patch sizes first, since the others count tokens; what chooses tokens after what chooses blocks."""
    text = "coredit:0.3+routing+teacache:0.1:model=flux.1+ddit"
    plan = parse_plan(text)
    assert [method.name for method in plan.methods] == ["ddit", "teacache", "routing", "coredit"] and str(plan) == text
    spies = [SimpleNamespace(name=name, solver=None, steps=None, applied=partial(_added, name)) for name in "abc"]
    assert Plan(tuple(spies), "a+b+c").applied("plain", SimpleNamespace(parts={})) == "plain, a, b, c"


def _added(name, denoiser, run):
    return f"{denoiser}, {name}"
