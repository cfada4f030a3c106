"""CoReDiT in PyTorch against this project's own runs: the same tokens are skipped and rebuilt."""

import json

import numpy as np
import pytest
import torch
from torch_models import RATIOS, relative

from convert.torch_modules.coredit import add_coredit, bucketed, cell_sides, cells_of, coherence, protected
from dit_jax.methods import coherence as ours
from dit_jax.methods import coredit_ratios


def timesteps(written, steps):
    """Of a run, as this project has them; diffusers' are the same."""
    from infer.request import Request

    frames = 1 if written.kind == "flux" else 9
    solver = "unipc" if written.kind != "flux" and steps > 1 else "euler"
    request = Request(prompt="a", size=(112, 80), frames=frames, steps=steps, solver=solver, image=written.image)
    if written.kind != "image-to-video":
        request = Request(prompt="a", size=(112, 80), frames=frames, steps=steps, solver=solver)
    return list(written.pipe.schedule(written.pipe.prepare(request)).timesteps)


@pytest.mark.parametrize(("steps", "guided", "count"), [(1, False, 2), (4, True, 2)])
def test_equals_this_project(written, steps, guided, count):
    pipeline = written.theirs()
    ratios = json.loads((written.folder / "methods/coredit/config.json").read_text())
    assert ratios == RATIOS
    plain = written.by_diffusers(pipeline, steps, count, guided)
    add_coredit(pipeline.transformer, ratios, timesteps(written, steps))
    theirs = written.by_diffusers(pipeline, steps, count, guided)
    assert relative(written.by_ours("coredit", steps, count, guided), theirs) <= 1e-4
    assert relative(theirs, plain) > 1e-3


def test_late_steps_skip_less_and_fewer_buckets_round(written):
    pipeline = written.theirs()
    state = add_coredit(pipeline.transformer, RATIOS, timesteps(written, 4), buckets=2, late=0.5)
    skipped = []
    pipeline.transformer.register_forward_hook(lambda *_: skipped.append([state.skipped(block) for block in range(5)]))
    theirs = written.by_diffusers(pipeline, 4, guided=False)
    assert relative(written.by_ours("coredit:buckets=2:late=0.5", 4, guided=False), theirs) <= 1e-4
    assert skipped[:3] == skipped[:1] * 3 and sum(skipped[3]) < sum(skipped[0])
    assert len(set(skipped[0])) == 2


def test_no_ratio_is_the_plain_model(written):
    pipeline = written.theirs()
    plain = written.by_diffusers(pipeline, 1)
    add_coredit(pipeline.transformer, {"ratios": [0.0]}, timesteps(written, 1))
    np.testing.assert_array_equal(written.by_diffusers(pipeline, 1), plain)


@pytest.mark.parametrize("grid", [(1, 5, 7), (3, 4, 6), (2, 64, 64), (1, 1, 2)])
@pytest.mark.parametrize("stride", [3, 4])
def test_lattices_are_cut_and_protected_alike(grid, stride):
    lattice = ours.Lattice(grid=grid, cells=ours.cell_sizes(grid), stride=stride)
    assert cell_sides(grid) == lattice.cells
    for block in range(stride):
        np.testing.assert_array_equal(protected(grid, stride, block).numpy(), ours.protected(lattice)[block % stride])
    x = np.random.default_rng(0).standard_normal((2, lattice.tokens, 6)).astype(np.float32)
    for block, side in enumerate(lattice.cells):
        found = coherence(torch.tensor(x), *cells_of(grid, side))
        np.testing.assert_allclose(found, lattice.coherence(x, np.int32(block)), rtol=1e-5, atol=1e-6)


def test_ratios_are_rounded_alike():
    rng = np.random.default_rng(0)
    for count, buckets in ((5, 2), (40, 4), (7, 7), (3, 1), (30, 5)):
        ratios = rng.integers(0, 60, count) / 100
        assert bucketed(ratios.tolist(), buckets) == list(coredit_ratios.bucketed(tuple(ratios.tolist()), buckets))
