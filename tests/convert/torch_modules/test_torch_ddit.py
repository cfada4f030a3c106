"""DDiT in PyTorch against this project's own runs: the same sizes are chosen, and run alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch_models import ADAPTERS, relative

from convert.method_parts import WEIGHTS
from convert.torch_modules.ddit import PatchSizes, ThirdDifference, deviations, packed
from convert.torch_modules.pare import load_transformer
from dit_jax.methods import ddit as ours


def added(written, pipeline, choose, guided=True):
    """Wan's pipelines call the transformer once a branch, as FLUX's do."""
    return PatchSizes(pipeline.transformer, written.folder / "methods/ddit", choose, branches=2 if guided else 1)


@pytest.mark.parametrize(
    ("scale", "steps", "guided"),
    [
        (2, 3, True),
        (4, 1, False),
        pytest.param(2, 1, False, marks=pytest.mark.long),
        pytest.param(4, 3, True, marks=pytest.mark.long),
    ],
)
def test_a_larger_size_is_the_same(written, scale, steps, guided):
    pipeline = written.theirs()
    sizes = added(written, pipeline, lambda t, latents: scale if t > 900 else 1, guided)
    theirs = written.by_diffusers(pipeline, steps, 2, guided)
    large = sum(used > 1 for used in sizes.used) // (2 if guided else 1)
    assert sizes.used[0] == scale and large == (1 if steps == 1 else sizes.used.count(scale) // 2) and large
    ours_too = written.by_ours(f"ddit:{scale}p@0-{large - 1}", steps, 2, guided)
    assert relative(ours_too, theirs) <= 1e-4
    assert relative(theirs, written.by_diffusers(written.theirs(), steps, 2, guided)) > 1e-2


def test_adapters_without_low_rank_maps_are_the_same(written, tmp_path):
    bare = written.with_adapters(replace(ADAPTERS, rank=0), tmp_path)
    pipeline = bare.theirs()
    sizes = added(bare, pipeline, lambda t, latents: 2)
    assert not sizes.low_rank and not any("lora" in key for key in load_file(bare.folder / "methods/ddit" / WEIGHTS))
    theirs = bare.by_diffusers(pipeline, 1)
    assert set(sizes.used) == {2}
    assert relative(bare.by_ours("ddit:2p@0-0", 1), theirs) <= 1e-4


def test_sizes_are_chosen_alike(written):
    values, steps = [], 7

    def remember(step, scale, told):
        values.append((scale, *told))

    written.by_ours("ddit:tau=0", steps, chosen=remember)
    # A threshold between the values of the two sizes where they differ most.
    finite = np.asarray([told[1:] for told in values if np.isfinite(told[1])])
    tau = float(finite[np.argmax(np.abs(finite[:, 0] - finite[:, 1]) / finite.mean(1))].mean())
    values.clear()
    mine = written.by_ours(f"ddit:tau={tau!r}", steps, chosen=remember)
    pipeline = written.theirs()
    sizes = added(written, pipeline, ThirdDifference(threshold=tau, held=int(written.kind == "first-frame")))
    theirs = written.by_diffusers(pipeline, steps)
    assert sizes.used[::2] == sizes.used[1::2] == [scale for scale, *_ in values]
    assert max(sizes.used) > 1
    assert relative(mine, theirs) <= 1e-4
    # Another run begins anew.
    again = written.by_diffusers(pipeline, steps)
    assert sizes.used[: 2 * steps] == sizes.used[2 * steps :]
    np.testing.assert_array_equal(again, theirs)


def test_the_base_size_is_the_plain_model(written):
    pipeline = written.theirs()
    plain = written.by_diffusers(pipeline, 2)
    added(written, pipeline, lambda t, latents: 4 if t > 900 else 1)
    written.by_diffusers(pipeline, 1)
    pipeline = written.theirs()
    sizes = added(written, pipeline, lambda t, latents: 1)
    np.testing.assert_array_equal(written.by_diffusers(pipeline, 2), plain)
    assert set(sizes.used) == {1}


@pytest.mark.parametrize("shape", [(2, 4, 3, 10, 14), (1, 3, 1, 5, 9)])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_deviations_leave_out_what_lies_beyond_the_lattice(shape, scale):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = deviations(torch.tensor(x), (1, 2, 2), scale)
    expected = ours.deviations(np.moveaxis(x, 1, -1), (1, 2 * scale, 2 * scale))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_samples_choose_one_by_one():
    with pytest.raises(AssertionError, match="one by one"):
        ThirdDifference()(900.0, torch.zeros(2, 4, 1, 4, 4))


@pytest.mark.parametrize("frames", [1, 3])
def test_a_straight_path_has_no_third_difference_but_by_rounding(frames):
    random, steps = torch.Generator().manual_seed(0), 8
    noise, clean = (torch.randn(1, 16, frames, 16, 16, generator=random) for _ in range(2))
    path = [noise + (clean - noise) * step / steps for step in range(steps)]
    handed = [packed(x, 2) if frames == 1 else x for x in path[1:]]  # FLUX's pipeline packs its latents

    def chosen(threshold, dtype, hand=False):
        choose, sizes = ThirdDifference(threshold), []
        for _ in range(2):  # of the first run's last latents the second knows nothing
            for step, x in enumerate(path):
                sizes.append(choose(1000.0 - step, x.to(dtype)))
                if hand:
                    assert choose.after_step(None, step, None, {"latents": (handed + handed[:1])[step]}) == {}
        assert sizes[:steps] == sizes[steps:]
        return sizes[:steps]

    assert chosen(1e-6, torch.float32) == [1] * 3 + [4] * 5
    assert chosen(0.004, torch.bfloat16) == [1] * 8
    assert chosen(0.008, torch.bfloat16) == [1] * 3 + [4] * 5
    # The noise, which the fourth step's choice knows, comes with the transformer's input alone.
    assert chosen(1e-6, torch.bfloat16, hand=True) == [1] * 4 + [4] * 4
    assert chosen(0.002, torch.bfloat16, hand=True) == [1] * 3 + [4] * 5


@pytest.mark.parametrize("written", ["text-to-video", "flux"], indirect=True)
def test_a_pipeline_hands_its_latents_over(written):
    pipeline = written.theirs()
    pipeline.transformer = load_transformer(written.folder / "transformer", torch.bfloat16)
    if written.kind == "flux":
        pipeline.to(torch.bfloat16)
    choose, latents = ThirdDifference(threshold=0), []

    def after_step(pipe, step, t, told):
        latents.append(told["latents"])
        return choose.after_step(pipe, step, t, told)

    added(written, pipeline, choose)
    written.by_diffusers(pipeline, 5, callback_on_step_end=after_step)
    of_pipeline = latents[:4]
    assert {x.dtype for x in of_pipeline} == {torch.bfloat16 if written.kind == "flux" else torch.float32}
    found = [packed(x, 2) if written.kind == "flux" else x for x in choose.last]
    for x, expected in zip(found, of_pipeline, strict=True):
        assert torch.equal(x, expected.float())
