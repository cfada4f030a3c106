"""The data behind the figures of docs/methods against the methods' own, on tiny models; and the command."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_flux import pipeline as flux_pipeline

from dit_jax.methods.coredit import Coredit
from dit_jax.methods.ddit import mean_tokens
from dit_jax.methods.plan import parse_plan
from dit_jax.methods.routing import Routing, budget
from dit_jax.methods.taylorseer import TaylorSeer
from dit_jax.methods.token_groups import group_ends
from infer.figures import __main__ as command
from infer.figures import caches, coredit, ddit, hsa, pare
from infer.figures.style import DPI, WIDTH, write_figure
from infer.head_calibration import calibrate_heads
from infer.loading import load_pipeline
from infer.request import Request

DOCS = Path(__file__).parents[2] / "docs/methods"
PROMPTS = ["a red cat runs", "the dog sleeps on the moon"]
SHORT = dict(size=(48, 32), frames=9, guidance=3.0)
CALIBRATION = {"size": "48x32", "frames": 9}
ACTIVITY = "hsa:groups=25@8/25@4/50@2:window=0.5"


@pytest.fixture(scope="module")
def pipe(text_to_video, tmp_path_factory):
    return command.loaded(str(text_to_video[0]), True, tmp_path_factory.mktemp("adapted"))


def written(module, found, tmp_path) -> tuple[int, int]:
    file = tmp_path / "figure.png"
    write_figure(file, module.HEIGHT, lambda figure: module.draw(figure, found))
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    with Image.open(file) as picture:
        assert picture.mode == "P" and len(picture.getcolors()) > 20
        return picture.size


def size_of(module) -> tuple[int, int]:
    return round(WIDTH * DPI), round(module.HEIGHT * DPI)


def test_hsas_groups_are_those_of_its_ranking(pipe, tmp_path):
    [found] = hsa.measured(pipe, PROMPTS[0], [ACTIVITY], **SHORT)
    assert found.groups.shape == found.change.shape == (3, 2, 3) and found.frames.shape == (9, 32, 48, 3)
    sizes = np.diff(group_ends(found.hsa.shares, 18, 18), prepend=0)
    np.testing.assert_array_equal(np.bincount(found.groups.ravel()), sizes)
    changes = [found.change[found.groups == group] for group in range(3)]
    assert changes[0].min() >= changes[1].max() > 0 and changes[1].min() >= changes[2].max()
    assert written(hsa, [found], tmp_path) == size_of(hsa)


def test_the_activity_table_is_hsas_own():
    from matplotlib.figure import Figure

    [method] = parse_plan(ACTIVITY).methods
    axes = Figure().subplots()
    nothing = np.zeros(0)
    hsa.draw_activity(axes, hsa.Grouped(name="x", hsa=method, frames=nothing, change=nothing, groups=nothing))
    edges, drawn = [0, 25, 50, 100], np.zeros((8, 3), bool)
    for bar in axes.patches:
        group = edges.index(round(bar.get_y()))
        assert bar.get_height() == pytest.approx(edges[group + 1] - edges[group])
        drawn[round(bar.get_x() + bar.get_width() / 2), group] = True
    np.testing.assert_array_equal(drawn, method.active)
    assert "6.0 of 8 token-steps" in axes.get_title()


@pytest.mark.parametrize(("latent_frames", "frames", "expected"), [(1, 1, [0]), (3, 9, [0, 3, 7]), (2, 5, [0, 3])])
def test_a_latent_frames_picture_is_one_that_it_stands_for(latent_frames, frames, expected):
    assert hsa.frame_of_each(latent_frames, frames) == expected


def check_skipped(found: coredit.Skipped, wanted: int) -> None:
    """So many tokens, the most coherent, and no protected one."""
    skips, stays = found.skipped, ~found.skipped & ~found.protected
    assert skips.sum() == wanted > 0
    assert not (skips & found.protected).any()
    assert found.coherence[skips].min() >= found.coherence[stays].max()


@pytest.mark.parametrize("block", [0, 1, 2])
def test_coredit_skips_the_most_coherent_and_never_protected_ones(block):
    method, watch = Coredit(ratios=(0.2, 0.4, 0.3)), coredit.CoherenceWatch()
    watch.lattice = method.lattice((1, 1, 16, 20, 4), (1, 2, 2))
    watch.coherence = np.random.default_rng(block).random((4, 3, 2, 80), np.float32)
    for step in (1, 3):  # the last step skips a quarter of it
        found = coredit.skipped_at(watch, method, step, block)
        np.testing.assert_array_equal(found.coherence.ravel(), watch.coherence[step, block, 0])
        check_skipped(found, method.skipped(watch.lattice, 3, 4)[0, step, block])
        assert found.cell == watch.lattice.cells[block % 2]
        assert found.protected[block % 3, 0] and not found.protected[(block + 1) % 3, 0]


@pytest.mark.long
def test_coredits_picture_is_that_of_a_run_which_is_not_watched(tmp_path):
    flux_pipeline(dev=False).save_pretrained(tmp_path / "tiny-flux")
    pipe = load_pipeline(tmp_path / "tiny-flux")
    options = dict(size=(80, 64), steps=4, true_cfg=2.0)
    found = coredit.measured(pipe, PROMPTS, calibration={"size": "80x64"}, **options)
    assert found.frame.shape == (64, 80, 3) and found.ratios.mean() == pytest.approx(coredit.RATIO, abs=1e-6)
    lattice = Coredit(ratios=(0.0,)).lattice((1, 1, 8, 10, 4), pipe.transformer_config.patch)
    assert [of_block.block % 2 for of_block in found.blocks] == [0, 1]
    for of_block in found.blocks:
        check_skipped(of_block, round(found.buckets[of_block.block] * lattice.tokens))
    (tmp_path / "drawn").mkdir()
    assert written(coredit, found, tmp_path / "drawn") == size_of(coredit)
    job = pipe.prepare(Request(prompt=PROMPTS[0], plan="coredit:0.3", **options))
    watch = coredit.CoherenceWatch()
    np.testing.assert_allclose(pipe.denoise(job, watch=watch), pipe.denoise(job), atol=1e-5)
    assert watch.coherence.shape == (4, 4, 2, 20) and (np.abs(watch.coherence) > 0).all()


def test_ddits_sizes_are_the_largest_below_the_threshold(pipe, tmp_path):
    found = ddit.measured(pipe, PROMPTS, steps=8, **SHORT)
    assert found.values.shape == (2, 8, 2) and np.isinf(found.values[:, :3]).all()
    np.testing.assert_array_equal(found.tokens, [18, 6, 3])
    for values, tokens in zip(found.values.reshape(-1, 2), found.chosen.ravel(), strict=True):
        size = 2 if values[1] < found.threshold else 1 if values[0] < found.threshold else 0
        assert tokens == found.tokens[size]
    assert len(np.unique(found.chosen)) > 1
    assert found.chosen.mean() == pytest.approx(mean_tokens(found.values, found.tokens, found.threshold))
    assert found.frame.shape == (32, 48, 3) and found.cells == 16
    assert written(ddit, found, tmp_path) == size_of(ddit)


def test_pares_heads_and_blocks_are_those_of_its_commands(pipe, tmp_path):
    found = pare.measured(pipe, PROMPTS, heads=0.5, bins=2, **SHORT | {"steps": 6})
    heads = calibrate_heads(pipe, PROMPTS, **SHORT | {"steps": 2})["transformer"]
    np.testing.assert_array_equal(found.types, heads.types)
    assert found.kept.shape == (3, 1)
    np.testing.assert_array_equal(found.shares.sum(axis=1), budget(found.timesteps, *Routing().limits(3)))
    assert found.limits == (2, 3) and len(found.timesteps) == 6 and found.shares.min() == 0
    assert written(pare, found, tmp_path) == size_of(pare)


def test_caches_run_the_steps_that_they_say(pipe, tmp_path):
    found = caches.measured(pipe, PROMPTS[:1], calibration=CALIBRATION, **SHORT | {"steps": 6})
    assert np.isnan(found.residual[0]) and (found.residual[1:] > 0).all()
    # A vector's length changes at most by as much as the vector.
    assert (np.abs(found.ratios[1:] - 1) <= 1.001 * found.residual[1:]).all()
    assert [ran.shape for settings in found.runs.values() for ran in settings.values()] == [(6,)] * 9
    np.testing.assert_array_equal(found.runs["TaylorSeer"]["n = 4"], TaylorSeer(interval=4).timeline(6).full)
    # TeaCache runs again where the changes since it last ran add up to the threshold.
    for factor in (0.999, 1.001):
        for step in (1, 3):
            limit = factor * found.signal[1 : step + 1].sum()
            runs = caches.teacache_runs(pipe, limit, PROMPTS[0], caches.SEED, SHORT | {"steps": 6})
            assert runs[0] and runs[step] == (factor < 1) and not runs[1:step].any()
    assert written(caches, found, tmp_path) == size_of(caches)


def test_the_command_writes_a_figure(text_to_video, tmp_path, monkeypatch, capsys):
    def measured(pipe):
        return pare.measured(pipe, PROMPTS[:1], bins=2, **SHORT | {"steps": 2})

    monkeypatch.setitem(command.KINDS, "pare", command.KINDS["pare"]._replace(measured=measured))
    out = tmp_path / "deep" / "figures"
    assert command.main(["--model", str(text_to_video[0]), "--out", str(out), "--only", "pare"]) == 0
    assert [path.name for path in out.iterdir()] == ["pare.png"]
    assert f"{out / 'pare.png'}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "hsa,cats"], "--only names 'cats'"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "demo-flux", "--only", "hsa"], "--model is demo-flux, which makes no videos"),
        (["--image-model", "demo-wan", "--only", "coredit"], "makes no pictures"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, arguments, told):
    assert command.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("figures: ") and told in printed
    assert not list((tmp_path / "out").glob("*"))


def test_every_method_has_its_figure_and_they_are_small():
    sizes = {name: (DOCS / f"{name}.png").stat().st_size for name in command.KINDS}
    assert max(sizes.values()) < 120_000 and sum(sizes.values()) < 700_000
    for name in command.KINDS:
        assert f"]({name}.png)" in (DOCS / f"{name}.md").read_text()
