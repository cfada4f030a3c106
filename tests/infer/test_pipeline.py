"""Whole pipelines against diffusers', from the same starting noise."""

import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_diffusers import FRAMES, PROMPT, SIZE, by_diffusers, by_ours, relative, starting_noise
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from flax import nnx
from PIL import Image

from dit_jax.config import UserError
from dit_jax.models.vae_kl import FLUX_VAE, AutoencoderKL
from dit_jax.models.vae_wan import WanVAE, WanVAEConfig
from infer import load_pipeline, pipeline
from infer.pipeline import _decode as vae_decode
from infer.pipeline import _decode_tiled as vae_decode_tiled
from infer.request import Request
from infer.wan_pipeline import clean


@pytest.fixture(scope="module")
def pipe(text_to_video):
    return load_pipeline(text_to_video[0])


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("guidance", [3.5, 1.0])
def test_text_to_video_equals_diffusers(text_to_video, pipe, solver, guidance):
    noise = starting_noise()
    latents, video = by_diffusers(text_to_video[1], solver, noise, guidance)
    ours = by_ours(pipe, solver, noise, guidance)
    assert relative(ours.latents, latents) <= 1e-4
    assert ours.frames.dtype == np.uint8 and ours.frames.shape == (1, FRAMES, SIZE[1], SIZE[0], 3)
    assert np.abs(ours.frames - np.round(video * 255)).max() <= 1
    assert ours.frames.std() > 10


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_image_to_video_equals_diffusers(image_to_video, solver):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8))
    noise = starting_noise()
    latents, video = by_diffusers(image_to_video[1], solver, noise, image=image)
    ours = by_ours(load_pipeline(image_to_video[0]), solver, noise, image=image)
    assert relative(ours.latents, latents) <= 1e-4
    assert np.abs(ours.frames - np.round(video * 255)).max() <= 1


def test_pixels_are_the_nearest_of_256_levels():
    levels = np.arange(256)
    for off in (-0.45, 0.0, 0.45):
        values = np.clip((levels + off) / 127.5 - 1, -1, 1).astype(np.float32)
        np.testing.assert_array_equal(pipeline._levels(jnp.asarray(values)), levels)


def test_a_request_gives_the_same_pixels_alone_and_in_a_batch(pipe):
    prompts = [PROMPT, "the dog sleeps", "a fish on the moon"]
    together = pipe(prompts, size=SIZE, frames=5, steps=2, guidance=3.0, seed=7)
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, size=SIZE, frames=5, steps=2, guidance=3.0, seed=7 + i)
        assert np.abs(alone.frames[0].astype(int) - together.frames[i]).max() <= 1
    assert np.abs(together.frames[0].astype(int) - together.frames[1]).max() > 10


def test_a_second_call_compiles_nothing(pipe):
    pipe(PROMPT, size=SIZE, frames=5, steps=4, seed=1)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    again = pipe("the dog sleeps", size=SIZE, frames=5, steps=4, seed=2)
    assert compiled == []
    pipe(PROMPT, size=(32, 32), frames=5, steps=4)
    assert compiled, "a new shape must be seen to compile, or the count means nothing"
    assert again.frames.shape == (1, 5, SIZE[1], SIZE[0], 3)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_another_shift_is_that_of_diffusers_and_compiles_nothing(pipe, solver):
    request = Request(prompt=PROMPT, size=SIZE, frames=5, steps=4, solver=solver)
    usual = pipe.denoise(pipe.prepare(request))
    shifted = pipe.prepare(replace(request, shift=7))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0)
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(4)
    np.testing.assert_allclose(pipe.schedule(shifted).sigmas, scheduler.sigmas.numpy(), rtol=1e-6)
    programs = len(pipe.programs)
    assert relative(pipe.denoise(shifted), usual) > 0.01 and len(pipe.programs) == programs
    assert pipe.metadata(shifted)[0]["shift"] == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(size=(50, 32)), ["50x32", "16 divides", "48x32"]),
        (dict(frames=6), ["6 frames", "5 and 9"]),
        (dict(frames=-3), ["-3 frames"]),
        (dict(steps=0), ["steps is 0"]),
        (dict(solver="heun"), ["heun", "unipc", "euler"]),
        (dict(guidance=float("nan")), ["guidance is nan"]),
        (dict(true_cfg=3.0), ["true_cfg is 3.0", "say guidance"]),
        (dict(shift=0.0), ["shift is 0.0", "above 0"]),
        (dict(shift=float("inf")), ["shift is inf", "above 0"]),
        (dict(image=Image.new("RGB", (8, 8))), ["text-to-video"]),
        (dict(latents=np.zeros((1, 2, 2, 2, 4), np.float32)), ["(1, 2, 2, 2, 4)", "(1, 3, 4, 6, 4)"]),
        (dict(colour="red"), ["colour"]),
        (dict(seed=2**63), ["seed is 9223372036854775808", "4294967295"]),
        (dict(seed=2**32), ["seed is 4294967296", "4294967295"]),
        (dict(seed=-1), ["seed is -1"]),
        (dict(seed=0.5), ["seed is 0.5", "whole number"]),
    ],
)
def test_bad_requests_are_refused_in_a_sentence(pipe, options, words):
    with pytest.raises(UserError) as error:
        pipe(PROMPT, **(dict(size=SIZE, frames=FRAMES, steps=1) | options))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_an_empty_prompt_is_refused(pipe):
    with pytest.raises(UserError, match="prompt is empty"):
        pipe("  ", size=SIZE, frames=5, steps=1)


def test_image_to_video_needs_an_image(image_to_video):
    with pytest.raises(UserError, match="as image"):
        load_pipeline(image_to_video[0])(PROMPT, size=SIZE, frames=5, steps=1)


def test_the_last_prompt_needs_a_seed_too(pipe):
    assert pipe.prepare(Request(prompt=PROMPT, size=SIZE, frames=5, seed=2**32 - 1)).seeds == [2**32 - 1]
    with pytest.raises(UserError, match="from 0 to 4294967294"):
        pipe.prepare(Request(prompt=[PROMPT] * 2, size=SIZE, frames=5, seed=2**32 - 1))


def test_the_callers_noise_stays_and_no_seed_is_told(pipe):
    given = jnp.asarray(starting_noise())
    result = pipe(PROMPT, size=SIZE, frames=FRAMES, steps=2, latents=given)
    np.testing.assert_array_equal(given, starting_noise())
    assert result.metadata[0]["seed"] is None
    assert pipe(PROMPT, size=SIZE, frames=5, steps=1, seed=3).metadata[0]["seed"] == 3


def test_progress_waits_for_the_steps_that_it_tells_of(pipe, monkeypatch):
    told, waited = [], []
    monkeypatch.setattr(jax, "block_until_ready", lambda carry: waited.append(len(told)))
    job = pipe.prepare(Request(prompt=PROMPT, size=SIZE, frames=5, steps=8))
    pipe.denoise(job, lambda stage, done, total: told.append(done))
    assert told == [0, 4, 8] and waited == [1, 2]
    pipe.denoise(job)
    assert waited == [1, 2]


@pytest.mark.parametrize(
    "prompt",
    ["“a red cat” isn’t under the moon", " a  dog &amp;amp; a\tfish ", "a cafÃ© <b>on</b> the ﬁsh", "the dog… sleeps"],
)
def test_prompts_are_cleaned_as_by_diffusers(prompt):
    assert clean(prompt) == prompt_clean(prompt)


def test_bf16_is_close_to_fp32(text_to_video, pipe):
    half = by_ours(load_pipeline(text_to_video[0], dtype=jnp.bfloat16), "unipc", starting_noise())
    assert half.latents.dtype == np.float32
    assert 1e-5 < relative(half.latents, by_ours(pipe, "unipc", starting_noise()).latents) < 0.1


@pytest.mark.parametrize(
    ("of", "config", "latents"),
    [
        (AutoencoderKL, FLUX_VAE, (1, 1, 128, 128, 16)),
        (AutoencoderKL, FLUX_VAE, (1, 1, 40, 96, 16)),
        (WanVAE, WanVAEConfig(), (1, 2, 24, 32, 16)),
    ],
)
def test_tiles_hold_no_more_than_half_the_picture(of, config, latents):
    """Where decoding a picture whole takes too much memory, a tile that holds it takes as much."""

    def tallest(tiled):
        vae = nnx.eval_shape(lambda: of(config, rngs=nnx.Rngs(0)))
        decode = vae_decode_tiled if tiled else vae_decode
        found = str(jax.make_jaxpr(decode)(vae, jax.ShapeDtypeStruct(latents, jnp.float32)))
        shapes = re.findall(r":f32\[([\d,]+)\] = conv_general_dilated", found)
        return max(int(size) for shape in shapes for size in shape.split(",")[-3:-1])

    assert tallest(tiled=False) == 8 * max(latents[2:4])
    assert tallest(tiled=True) == 4 * max(latents[2:4])


def test_names_and_hash_are_those_of_loading(text_to_video, tmp_path, monkeypatch):
    folder = shutil.copytree(text_to_video[0], tmp_path / "some-model")
    monkeypatch.chdir(folder)
    pipe = load_pipeline(".")
    loaded = pipe.hash
    (folder / "vae" / "config.json").write_text("{}")
    told = pipe(PROMPT, size=SIZE, frames=5, steps=1).metadata[0]
    assert told["model"] == "some-model" and told["checkpoint"] == loaded


def test_a_shipped_model_keeps_its_name():
    assert load_pipeline("demo-wan").name == "demo-wan"
