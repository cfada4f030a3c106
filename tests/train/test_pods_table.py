"""The table of docs/pods.md: which slices the recipes need at full scale, and what grows with their chips."""

import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from dit_jax.sharding import parse_mesh
from infer.chips import CHIPS, GIB
from train import plan

MODELS = {"Wan 14b": "wan2.1-t2v-14b", "FLUX dev": "flux.1-dev"}
RECIPES = dict.fromkeys(("pare_stage1", "pare_stage2", "step_distill"), "Wan 14b")
RECIPES |= dict.fromkeys(("coredit", "ddit"), "FLUX dev")
TOKENS = {"Wan 14b": 21 * 30 * 52, "FLUX dev": 64 * 64}
UPDATES = {"step_distill": 6}  # of a step, each on rows of its own; one of the others
LARGEST = {"v5p": math.inf, "v6e": 256}  # chips of a slice


class Row(NamedTuple):
    """A line of the table; GiB a chip, seconds."""

    recipe: str
    model: str
    topology: str
    mesh: str
    batch: int
    memory: float
    flops: float
    sent: float
    compute: float
    network: float
    floor: float
    tokens_per_second: int

    @property
    def chip(self) -> str:
        return self.topology.partition(":")[0]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.partition(":")[2].split("x")))

    @property
    def tokens(self) -> int:
        """Of all rows of a step."""
        return self.batch * UPDATES.get(self.recipe, 1) * TOKENS[self.model]

    @property
    def fits(self) -> bool:
        return self.memory * GIB <= CHIPS[self.chip].capacity


def number(text):
    """NaN for a dash."""
    word = text.replace(",", "").split()[0]
    return math.nan if word == "–" else float(word)


def read_row(line):
    recipe, model, topology, chips, mesh, batch, memory, flops, sent, times, floor, speed = line.strip("| ").split(
        " | "
    )
    compute, network = map(number, times.split("/"))
    row = Row(
        recipe.strip("`"), model, topology, mesh, int(batch), number(memory), number(flops), number(sent), compute,
        network, number(floor), int(number(speed)),
    )  # fmt: skip
    assert int(chips) == row.chips == math.prod(parse_mesh(mesh).values())
    assert number(memory.split(" of ")[1].rstrip(",")) == pytest.approx(CHIPS[row.chip].capacity / GIB, abs=0.06)
    assert ("short by" in memory) != row.fits
    return row


def rows():
    """Of every recipe, slices from small to large."""
    lines = (Path(__file__).parents[2] / "docs" / "pods.md").read_text().splitlines()
    return [read_row(line) for line in lines if any(line.startswith(f"| `{recipe}` |") for recipe in RECIPES)]


def test_floors_are_the_longest_times():
    for row in rows():
        chip = CHIPS[row.chip]
        assert row.compute == pytest.approx(row.flops / chip.flops, rel=0.02)
        assert row.tokens_per_second * row.floor == pytest.approx(row.tokens, rel=0.02)
        assert row.batch % parse_mesh(row.mesh).get("data", 1) == 0
        if row.fits:
            assert row.network == pytest.approx(row.sent * GIB / chip.ici, rel=0.02, abs=0.006)
            assert row.floor == max(row.compute, row.network)


@pytest.mark.parametrize("chip", ["v5p", "v6e"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_sixteen_times_the_chips_take_no_more_of_each(recipe, chip):
    fitting = [row for row in rows() if (row.recipe, row.chip) == (recipe, chip) and row.fits]
    first = fitting[0]
    assert first.model == RECIPES[recipe]
    expected = [first.chips * times for times in (1, 4, 16) if first.chips * times <= LARGEST[chip]]
    assert [row.chips for row in fitting] == expected
    for row in fitting[1:]:
        assert row.batch / first.batch == row.chips / first.chips
        assert row.memory <= 1.01 * first.memory and row.floor == pytest.approx(first.floor, rel=0.01)
        assert row.sent <= 1.3 * first.sent, "the gradients' ring, of which n chips send 2(n - 1)/n"


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'dit-jax[dev]'")
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_steps_are_still_those_of_the_table(recipe, monkeypatch):
    """Traced, not compiled."""
    monkeypatch.setattr(plan, "report", lambda subject, target, mesh: subject)
    row = next(row for row in rows() if row.recipe == recipe)
    target = plan.Target(topology=row.topology, slices=1, mesh=row.mesh)
    subject = plan.of_recipe(recipe, [f"model={MODELS[row.model]}", f"batch={row.batch}"], target)
    assert subject.flops / row.chips == pytest.approx(row.flops, rel=0.005)
    assert subject.tokens == row.tokens
