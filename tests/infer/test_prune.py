"""`dit-prune` from end to end, on small pipelines."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_flux import pipeline as flux_pipeline

from convert.checkpoint import load_model, open_checkpoint
from dit_jax.methods.head_statistics import HeadSums
from dit_jax.methods.method import Run
from dit_jax.methods.pruning import HEAD_TYPES
from dit_jax.models.wan import WanConfig
from dit_jax.parameters import named_leaves
from infer import head_calibration, load_pipeline, prune
from infer.head_calibration import calibrate_heads, plot_types
from infer.media import open_image
from infer.prune import chosen_widths, main, widths_by_lot

PROMPTS = ["a red cat runs", "the dog sleeps on the moon"]
SHORT = ["--size", "32x32", "--steps", "2"]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return str(tmp_path / "prompts.txt")


def run(source, out, *more):
    return main(["--model", str(source), "--out", str(out), *more])


def test_a_video_model_loses_heads_and_neurons_and_still_runs(text_to_video, prompts, tmp_path, capsys):
    plot = tmp_path / "types.png"
    options = ["--prompts", prompts, "--heads", "0.5", "--frames", "5", *SHORT, "--plot", str(plot), "--json"]
    assert run(text_to_video[0], tmp_path / "narrow", *options) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["heads"], report["all_heads"], report["neurons"], report["all_neurons"]) == (1, 2, 28, 40)
    assert sum(report["types of transformer"].values()) == 6
    assert plot.read_bytes().startswith(b"\x89PNG")
    settings = json.loads((tmp_path / "narrow/transformer/config.json").read_text())
    assert settings["pruned"] == {"heads": 1, "norm_counts_pruned": True} and settings["ffn_dim"] == 28
    video = load_pipeline(tmp_path / "narrow")("a red cat", size=(32, 32), frames=5, steps=2)
    assert np.isfinite(video.latents).all() and video.frames.shape == (1, 5, 32, 32, 3)


def test_an_image_model_keeps_one_set_of_heads_for_both_streams(prompts, tmp_path, capsys):
    flux_pipeline(dev=True).save_pretrained(tmp_path / "flux")
    pipe = load_pipeline(tmp_path / "flux")
    heads = calibrate_heads(pipe, PROMPTS, size=(32, 32), steps=2)["transformer"]
    assert heads.types is None and all((scores > 0).all() for scores in heads.scores.values())
    widths = chosen_widths(pipe.checkpoint, "transformer", heads, 0.5, 0.3, 1.5)
    assert widths.heads["double.image.attn"] is widths.heads["double.text.attn"]
    options = ["--prompts", prompts, "--heads", "0.5", *SHORT]
    assert run(tmp_path / "flux", tmp_path / "narrow", *options) == 0
    config = open_checkpoint(tmp_path / "narrow").component("transformer").config
    assert (config.heads, config.mlp_width) == (1, 88)
    image = load_pipeline(tmp_path / "narrow")("a red cat", size=(32, 32), steps=2)
    assert np.isfinite(image.latents).all()
    assert run(tmp_path / "flux", tmp_path / "again", *options, "--plot", str(tmp_path / "p.png")) == 2
    assert "videos alone" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_pruning_nothing_is_the_same_model(text_experts, tmp_path):
    assert run(text_experts[0], tmp_path / "same", "--heads", "0", "--ffn", "0") == 0
    for component in ("transformer", "transformer_2"):
        one, two = (dict(named_leaves(load_model(place, component))) for place in (text_experts[0], tmp_path / "same"))
        assert all(np.array_equal(leaf, two[name]) for name, leaf in one.items())


def test_scores_are_means_of_runs_and_types_means_of_steps(monkeypatch):
    """Of two runs of four steps; a head whose output projection is zero scores nothing."""
    monkeypatch.setattr(head_calibration, "recorded", lambda denoiser, shape: denoiser)
    config = WanConfig(blocks=1, width=12, heads=3, head_width=4, mlp_width=8)
    rng = np.random.default_rng(0)
    sums = {kind: rng.uniform(1, 2, (2, 1, 3)) for kind in HeadSums._fields}
    sums["inside"] = 4 * np.array([[[0.6, 0.5, 0.2]], [[0.9, 0.5, 0.3]]])
    kernels = {name: rng.standard_normal((1, 3, 4, 12)) for name in ("attn1", "attn2")}
    kernels["attn1"][0, 1] = 0
    leaves = {
        f"blocks.{name}.o.kernel": SimpleNamespace(shape=kernel.shape, block=kernel.__getitem__)
        for name, kernel in kernels.items()
    }
    told = SimpleNamespace(component=lambda name: SimpleNamespace(config=config), leaves=lambda name: leaves)

    def denoise(job, watch):
        watch.around(None, Run(latents_shape=(1, 2, 2, 2, 4), first=1, stop=5, steps=5, sigmas=None))
        watch.finished("transformer", SimpleNamespace(attention=[of_all[job] for of_all in sums.values()]))

    pipe = SimpleNamespace(checkpoint=told, denoise=denoise)
    pipe.prepare = lambda request: SimpleNamespace(single=lambda index: index)
    found = calibrate_heads(pipe, PROMPTS)["transformer"]
    assert found.types.tolist() == [["spatial", "mixed", "temporal"]]
    norms = {name: np.linalg.norm(kernel.reshape(1, 3, -1), axis=-1) for name, kernel in kernels.items()}
    expected = sums["tokens"].mean(0) * norms["attn1"]
    np.testing.assert_allclose(found.scores[("blocks.attn1",)], expected, rtol=1e-6)
    assert found.scores[("blocks.attn1",)][0, 1] == 0
    crossed = (sums["cross_text"] + sums["cross_image"]).mean(0) * norms["attn2"]
    np.testing.assert_allclose(found.scores[("blocks.attn2",)], crossed, rtol=1e-6)


def test_prompts_are_averaged_not_summed(text_to_video):
    pipe = load_pipeline(text_to_video[0])
    options = dict(size=(32, 32), frames=5, steps=2)
    once, twice = (calibrate_heads(pipe, prompts, seed=0, **options) for prompts in (PROMPTS[:1], PROMPTS[:1] * 2))
    for modules, scores in once["transformer"].scores.items():
        np.testing.assert_allclose(scores, twice["transformer"].scores[modules], rtol=1e-5)
    assert set(once["transformer"].types.ravel()) <= set(HEAD_TYPES)


@pytest.fixture
def scored(monkeypatch):
    """All heads that the command has scored, as [G, H] of self- and cross-attention."""
    found = []

    def noted(*told, **options):
        heads = calibrate_heads(*told, **options)
        found.append(np.stack([*heads["transformer"].scores.values()]))
        return heads

    monkeypatch.setattr(prune, "calibrate_heads", noted)
    return found


def test_heads_of_a_model_that_animates_an_image(image_to_video, prompts, pictures, scored, tmp_path, capsys):
    options = ["--prompts", prompts, "--heads", "0.5", "--frames", "5", *SHORT]
    for out, *images in (("one", pictures[0]), ("other", pictures[1]), ("each", *pictures[:2])):
        assert run(image_to_video[0], tmp_path / out, *options, "--image", *images) == 0
    assert open_checkpoint(tmp_path / "each").component("transformer").config.heads == 1
    assert all(np.abs(scores / scored[0] - 1).max() > 1e-3 for scores in scored[1:]), "the image matters"
    assert np.abs(scored[1] / scored[2] - 1).max() > 1e-3, "each prompt has its own"
    assert run(image_to_video[0], tmp_path / "none", *options) == 2
    assert "this model animates an image and none was given: pass one as image (--image FILE" in capsys.readouterr().err
    assert run(image_to_video[0], tmp_path / "none", *options, "--image", *pictures) == 2
    assert "3 images came with 2 prompts: expected one for each, or one for all" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_an_image_goes_with_its_prompt(image_to_video, pictures):
    pipe, images = load_pipeline(image_to_video[0]), [open_image(file) for file in pictures[:2]]
    options = dict(size=(32, 32), frames=5, steps=2, seed=0)
    both = calibrate_heads(pipe, PROMPTS, image=images, **options)["transformer"]
    alone = [
        calibrate_heads(pipe, [prompt], image=image, **options)["transformer"]
        for prompt, image in zip(PROMPTS, images, strict=True)
    ]
    for modules, scores in both.scores.items():
        np.testing.assert_allclose(scores, np.mean([one.scores[modules] for one in alone], axis=0), rtol=1e-5)


def test_heads_of_a_model_that_draws_between_two_images(frames_to_video, prompts, pictures, scored, tmp_path, capsys):
    options = ["--prompts", prompts, "--heads", "0.5", "--frames", "5", *SHORT, "--image", pictures[0]]
    for last in pictures[1:]:
        assert run(frames_to_video, tmp_path / "narrow", *options, "--last-image", last, "--overwrite") == 0
    assert np.abs(scored[0] / scored[1] - 1).max() > 1e-3, "the last image matters"
    assert run(frames_to_video, tmp_path / "none", *options) == 2
    assert "one was given: pass the other as last_image (--last-image FILE" in capsys.readouterr().err


def test_types_are_drawn(tmp_path):
    types = np.array([["spatial", "mixed", "temporal"]] * 4)
    plot_types(types, np.tile([0, 2], (4, 1)), tmp_path / "types.png")
    assert (tmp_path / "types.png").stat().st_size > 1000


def test_lots_need_no_prompts_and_are_those_of_their_seed(text_experts, tmp_path, capsys):
    source = open_checkpoint(text_experts[0])
    for out, seed in (("one", "7"), ("again", "7"), ("other", "8")):
        options = ["--choose", "random", "--seed", seed, "--heads", "0.5", "--json"]
        assert run(text_experts[0], tmp_path / out, *options) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["heads"], report["neurons"]) == (1, 28)
    rng = np.random.default_rng(7)
    components = ("transformer", "transformer_2")
    widths = [widths_by_lot(source, name, 0.5, 0.3, rng) for name in components]
    assert (widths[0].neurons["blocks.mlp"] != widths[1].neurons["blocks.mlp"]).any(), "experts have lots of their own"
    for name, kept in zip(components, widths, strict=True):
        full = source.leaves(name)
        one, again, other = (open_checkpoint(tmp_path / out).leaves(name) for out in ("one", "again", "other"))
        for block in range(source.component(name).config.blocks):
            up = full["blocks.mlp.up.kernel"].block(block)[:, kept.neurons["blocks.mlp"][block]]
            out = full["blocks.attn2.o.kernel"].block(block)[kept.heads["blocks.attn2"][block]]
            np.testing.assert_array_equal(one["blocks.mlp.up.kernel"].block(block), up)
            np.testing.assert_array_equal(one["blocks.attn2.o.kernel"].block(block), out)
        assert all(np.array_equal(leaf.rectangle(None), again[key].rectangle(None)) for key, leaf in one.items())
        assert (one["blocks.mlp.up.kernel"].rectangle(None) != other["blocks.mlp.up.kernel"].rectangle(None)).any()


def test_an_image_for_a_model_that_takes_none(text_to_video, prompts, pictures, tmp_path, capsys):
    assert run(text_to_video[0], tmp_path / "out", "--prompts", prompts, *SHORT, "--image", pictures[0]) == 2
    assert "an image was given to a text-to-video model: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--heads", "1.5"], "--heads is 1.5: expected a share"),
        ([], "expected --prompts FILE"),
        (["--choose", "random", "--plot", "types.png"], "expected --prompts FILE"),
        (["--choose", "random", "--seed", "-1"], "--seed is -1: expected a whole number from 0"),
        (["--heads", "0", "--seed", "3"], "found --seed 3, which nothing reads, since only --choose random draws lots"),
        (["--choose", "random", "--protection", "1"], "found --protection 1.0, which nothing reads"),
        (["--heads", "0", "--prompts", "prompts.txt"], "found --prompts prompts.txt, which nothing reads"),
        (["--choose", "random", "--frames", "5"], "found --frames 5, which nothing reads, since no heads are scored"),
        (["--prompts", "nowhere.txt"], "cannot read the prompts"),
        (["--heads", "0", "--last-image", "a.png", "b.png"], "found --last-image a.png b.png, which nothing reads"),
        (["--prompts", __file__, "--image", "nowhere.png"], "cannot read the image 'nowhere.png'"),
    ],
)
def test_bad_input_is_one_sentence(text_to_video, options, told, tmp_path, capsys):
    assert run(text_to_video[0], tmp_path / "out", *options) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("dit-prune: ") and told in message and not (tmp_path / "out").exists()
