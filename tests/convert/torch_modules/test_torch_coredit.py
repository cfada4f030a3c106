"""CoReDiT in PyTorch against this project's own runs: the same tokens are skipped and rebuilt."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch_models import FRAMES, RATIOS, relative

from convert.torch_modules.coredit import (
    CoherentAttention,
    add_coredit,
    bucketed,
    cell_sides,
    cells_of,
    coherence,
    protected,
)
from convert.torch_modules.pare import load_transformer
from dit_jax.methods import coherence as ours
from dit_jax.methods import coredit_ratios
from dit_jax.methods.coredit import Coredit
from infer import load_pipeline
from infer.request import Request

# 8x6 tokens. The two tokens of a cell that has no more are equally coherent, and rounding alone would choose between
# them; this lattice has no such cell, whichever of its sizes cells have.
EVEN = (128, 96)


def timesteps(written, steps):
    """Of a run, as this project has them; diffusers' are the same."""
    options = {} if written.kind == "flux" else dict(frames=FRAMES, solver="unipc" if steps > 1 else "euler")
    if written.has_image:
        options["image"] = written.image
    request = Request(prompt="a", size=written.size, steps=steps, **options)
    return list(written.pipe.schedule(written.pipe.prepare(request)).timesteps)


@pytest.mark.parametrize(("steps", "guided", "count"), [(1, False, 2), (4, True, 2)])
def test_equals_this_project(written, steps, guided, count):
    written = written.with_size(EVEN)
    pipeline = written.theirs()
    ratios = json.loads((written.folder / "methods/coredit/config.json").read_text())
    assert ratios == RATIOS
    plain = written.by_diffusers(pipeline, steps, count, guided)
    add_coredit(pipeline.transformer, ratios, timesteps(written, steps))
    theirs = written.by_diffusers(pipeline, steps, count, guided)
    assert relative(written.by_ours("coredit", steps, count, guided), theirs) <= 1e-4
    assert relative(theirs, plain) > 1e-3


@pytest.mark.parametrize("written", ["text-to-video", "flux"], indirect=True)
def test_late_steps_skip_less_and_fewer_buckets_round(written):
    written = written.with_size(EVEN)
    pipeline = written.theirs()
    state = add_coredit(pipeline.transformer, RATIOS, timesteps(written, 4), buckets=2, late=0.5)
    skipped = []
    pipeline.transformer.register_forward_hook(lambda *_: skipped.append([state.skipped(block) for block in range(5)]))
    theirs = written.by_diffusers(pipeline, 4, guided=False)
    assert relative(written.by_ours("coredit:buckets=2:late=0.5", 4, guided=False), theirs) <= 1e-4
    assert skipped[:3] == skipped[:1] * 3 and sum(skipped[3]) < sum(skipped[0])
    assert len(set(skipped[0])) == 2


def test_experts_have_ratios_of_their_own():
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=8,
        num_layers=3,
    )  # fmt: skip
    told = {"ratios": [0.5, 0.1, 0.3], "stride": 4, "experts": {"transformer_2": [0.2]}}
    coredit = Coredit(ratios=(0.5, 0.1, 0.3), experts=(("transformer_2", (0.2,)),), stride=4, buckets=3)
    table = coredit.skipped(coredit.lattice((1, 3, 18, 22, 4), (1, 2, 2)), 3, 8)
    timesteps = np.linspace(1000, 100, 8)
    for index, name in enumerate(("transformer", "transformer_2")):
        state = add_coredit(model, told, timesteps, component=name, buckets=3)
        for step, t in enumerate(timesteps):
            state._look(model, (torch.zeros(1, 4, 3, 18, 22), torch.tensor([t]), torch.zeros(1, 5, 8)), {})
            assert [state.skipped(block) for block in range(3)] == table[index, step].tolist()


@pytest.mark.parametrize(("steps", "late_share"), [(1, 1.0), (3, 0.0), (4, 1.0)])
def test_all_or_no_steps_may_be_late(steps, late_share):
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    state = add_coredit(model, {"ratios": [0.4]}, np.linspace(1000, 300, steps), late_share=late_share)
    ids = torch.tensor([[0, y, x] for y in range(5) for x in range(7)])
    for t in np.linspace(1, 0.3, steps):
        told = {"timestep": torch.tensor([t]), "encoder_hidden_states": torch.zeros(1, 3, 8), "img_ids": ids}
        state._look(model, (torch.zeros(1, 35, 16),), told)
        assert (state.grid, state.text, state.is_late) == ((1, 5, 7), 3, late_share == 1)


def test_no_ratio_is_the_plain_model(written):
    written = written.with_size(EVEN)
    pipeline = written.theirs()
    plain = written.by_diffusers(pipeline, 1)
    add_coredit(pipeline.transformer, {"ratios": [0.0]}, timesteps(written, 1))
    np.testing.assert_array_equal(written.by_diffusers(pipeline, 1), plain)


@pytest.mark.parametrize("grid", [(1, 5, 7), (3, 4, 6), (2, 64, 64), (1, 1, 2)])
@pytest.mark.parametrize("stride", [3, 4])
def test_lattices_are_cut_and_protected_alike(grid, stride):
    lattice = ours.Lattice(grid=grid, cells=ours.cell_sizes(grid), stride=stride)
    assert cell_sides(grid) == lattice.cells
    for block in range(2 * stride):
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


def test_protected_tokens_are_found_once_a_lattice():
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(64.0), torch.arange(64.0))
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    state = add_coredit(model, {"ratios": [0.4]}, [1000.0, 500.0])
    told = {"timestep": torch.tensor([1.0]), "encoder_hidden_states": torch.zeros(1, 3, 8), "img_ids": ids}
    state._look(model, (torch.zeros(1, 4096, 16),), told)
    rope = (torch.zeros(4096 + 3, 8),) * 2
    x = torch.randn(1, 3 + 4096, 4, generator=torch.Generator().manual_seed(0))

    def call():
        for block in range(2, 5):
            assert state.skipped(block) == round(0.4 * 4096)
            CoherentAttention(lambda attn, x, *_: x, block, state)(None, x, rope=rope)

    protected.cache_clear()
    with torch.inference_mode():
        call()
    assert protected.cache_info().misses == state.stride
    x.requires_grad_()  # what was found in inference mode would be refused here
    call()
    assert protected.cache_info().misses == state.stride


@pytest.mark.parametrize("written", ["flux"], indirect=True)
@pytest.mark.parametrize("shift", [{"use_dynamic_shifting": True}, {"use_dynamic_shifting": False, "shift": 3.0}])
def test_flux_knows_its_late_steps_as_documented(written, shift, tmp_path, monkeypatch):
    shutil.copytree(written.folder, tmp_path / "flux-student")
    for file in (tmp_path / "flux-student").glob("text_encoder*/model.safetensors"):  # bf16, as FLUX is published
        save_file({key: w.bfloat16() for key, w in load_file(file).items()}, file, {"format": "pt"})
        about = file.with_name("config.json")
        about.write_text(json.dumps(json.loads(about.read_text()) | {"dtype": "bfloat16"}))
    config = tmp_path / "flux-student/scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | shift))
    guide = (Path(__file__).parents[3] / "docs/converting.md").read_text()
    (example,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
        if "FluxPipeline.from" in code and "add_coredit" in code
    ]
    monkeypatch.chdir(tmp_path)
    told, late = [], []

    def watched(transformer, ratios, timesteps):
        told.extend(map(float, timesteps))
        state = add_coredit(transformer, ratios, timesteps)
        transformer.register_forward_hook(lambda *_: late.append(state.is_late))

    exec(example, here := {"json": json, "torch": torch, "load_transformer": load_transformer, "add_coredit": watched})
    assert told == here["pipe"].scheduler.timesteps.tolist()
    assert late == [False] * 6 + [True] * 2
    ours = load_pipeline(tmp_path / "flux-student")
    schedule = ours.schedule(ours.prepare(Request(prompt="a", size=(128, 128), steps=8)))
    np.testing.assert_allclose(told, schedule.timesteps, rtol=1e-6)
