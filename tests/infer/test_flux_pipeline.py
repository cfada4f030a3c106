"""Whole FLUX pipelines against diffusers', from the same starting noise, and what is FLUX's own in a request."""

import numpy as np
import pytest
import tiny_flux
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit_jax.config import UserError
from infer import generate, load_pipeline, media
from infer.request import Request

PROMPTS, NEGATIVE = ["a red cat runs under the moon", "a blue fish sleeps"], "dog"
SIZE, STEPS = (96, 64), 4  # 12x8 latent cells, 24 tokens


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_flux.pipeline(dev=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["dev", "schnell"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = tiny_flux.pipeline(request.param == "dev")
    theirs.save_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return load_pipeline(folder), theirs


def starting_noise(count):
    return np.random.default_rng(0).standard_normal((count, 1, 8, 12, tiny_flux.CHANNELS)).astype(np.float32)


def packed(latents):
    b, _, y, x, c = latents.shape
    z = torch.tensor(latents)[:, 0].permute(0, 3, 1, 2).reshape(b, c, y // 2, 2, x // 2, 2)
    return z.permute(0, 2, 4, 1, 3, 5).reshape(b, y * x // 4, 4 * c)


def by_diffusers(pipeline, noise, **options):
    shared = dict(
        prompt=PROMPTS, width=SIZE[0], height=SIZE[1], num_inference_steps=STEPS, guidance_scale=2.5,
        latents=packed(noise), **options,
    )  # fmt: skip
    with torch.no_grad():
        latents = pipeline(**shared, output_type="latent").images
        images = pipeline(**shared, output_type="np").images
    unpacked = pipeline._unpack_latents(latents, SIZE[1], SIZE[0], pipeline.vae_scale_factor)
    return unpacked.permute(0, 2, 3, 1)[:, None].numpy(), images


def by_ours(pipe, noise, **options):
    told = {"guidance": 2.5} if pipe.transformer_config.guidance else {}
    return pipe(PROMPTS, size=SIZE, steps=STEPS, latents=noise, **told, **options)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_equals_diffusers(both, true_cfg):
    pipe, theirs = both
    noise = starting_noise(2)
    latents, images = by_diffusers(theirs, noise, true_cfg_scale=true_cfg, negative_prompt=[NEGATIVE] * 2)
    ours = by_ours(pipe, noise, true_cfg=true_cfg, negative_prompt=NEGATIVE)
    assert relative(ours.latents, latents) <= 1e-4
    assert ours.frames.dtype == np.uint8 and ours.frames.shape == (2, SIZE[1], SIZE[0], 3)
    assert np.abs(ours.frames - np.round(images * 255)).max() <= 1
    assert ours.frames.std() > 10


def test_guidance_of_a_model_that_is_told_none_is_real_guidance(both):
    pipe, _ = both

    def scales(**given):
        job = pipe.prepare(Request(prompt=PROMPTS, size=SIZE, steps=STEPS, **given))
        again = pipe.prepare(Request(prompt=PROMPTS, size=SIZE, guidance=job.guidance, true_cfg=job.true_cfg))
        assert (again.guidance, again.true_cfg) == (job.guidance, job.true_cfg), "what is told of a job asks for it"
        told = pipe.metadata(job)[0]
        assert (told["guidance"], told["true_cfg"]) == (job.guidance, job.true_cfg)
        return job.guidance, job.true_cfg

    if pipe.transformer_config.guidance:
        assert scales(guidance=3.0) == (3.0, 1.0) and scales(true_cfg=3.0) == (3.5, 3.0)
        assert scales(guidance=3.0, true_cfg=2.0) == (3.0, 2.0)
    else:
        assert scales() == (1.0, 1.0) and scales(guidance=3.0) == scales(true_cfg=3.0) == (3.0, 3.0)
        assert pipe._denoiser(pipe.prepare(Request(prompt=PROMPTS, size=SIZE, guidance=3.0))).branches == 2
        with pytest.raises(UserError, match=r"guidance is 3.0 and true_cfg 2.0: expected one of them"):
            scales(guidance=3.0, true_cfg=2.0)


def test_several_images_of_a_prompt_are_those_of_the_following_seeds(both):
    pipe, _ = both
    several = pipe(PROMPTS, size=SIZE, steps=2, images_per_prompt=2, seed=7)
    assert [told["seed"] for told in several.metadata] == [7, 8, 9, 10]
    assert [told["prompt"] for told in several.metadata] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    alone = pipe(PROMPTS[1], size=SIZE, steps=2, seed=9)
    assert np.abs(alone.frames[0].astype(int) - several.frames[2]).max() <= 1


def test_a_given_shift_takes_the_place_of_the_schedulers(both):
    pipe, _ = both
    shifted = pipe.prepare(Request(prompt=PROMPTS, size=SIZE, steps=STEPS, shift=2.0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    np.testing.assert_allclose(pipe.schedule(shifted).sigmas, scheduler.sigmas.numpy(), rtol=1e-6)


def test_defaults_are_of_images(both):
    pipe, _ = both
    assert pipe.defaults.size == (1024, 1024) and pipe.defaults.frames == 1 and pipe.defaults.solver == "euler"


def test_an_image_is_saved_as_a_picture(both, tmp_path):
    pipe, _ = both
    result = pipe(PROMPTS, size=SIZE, steps=1)
    assert [path.name for path in result.save(tmp_path / "x.png")] == ["x-0.png", "x-1.png"]


def test_the_command_draws_pictures(flux_folder, tmp_path, capsys):
    out = tmp_path / "x.png"
    arguments = ["--model", str(flux_folder), "--prompt", "a red cat", "--size", "96x64", "--steps", "2"]
    assert (
        generate.main([*arguments, "--images-per-prompt", "2", "--out", str(out), "--sheet", str(tmp_path / "s.png")])
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s-000.png", "s-001.png", "x-000.png", "x-001.png"]
    told = media.read_metadata(tmp_path / "x-001.png")
    assert (told["seed"], told["prompt"], told["solver"]) == (1, "a red cat", "euler")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "5"], "5 frames were asked of a model that makes images"),
        (["--images-per-prompt", "0"], "images_per_prompt is 0"),
        (["--true-cfg", "nan"], "true_cfg is nan"),
        (["--guidance", "3", "--true-cfg", "2"], "guidance is 3.0 and true_cfg 2.0"),
        (["--guidance", "3,2"], "expected one number for a model of one transformer"),
        (["--size", "90x64"], "the nearest is 96x64"),
    ],
)
def test_bad_input_is_one_sentence(flux_folder, tmp_path, capsys, options, message):
    arguments = [
        "--model",
        str(flux_folder),
        "--prompt",
        "a red cat",
        "--size",
        "96x64",
        "--out",
        str(tmp_path / "x.png"),
    ]
    assert generate.main([*arguments, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
