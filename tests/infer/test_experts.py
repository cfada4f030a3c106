"""Wan 2.2's two experts: against diffusers, how often they compile, and how many of them are on the devices."""

import gc

import jax
import numpy as np
import pytest
from beside_diffusers import FRAMES, PROMPT, SIZE, by_diffusers, by_ours, relative, starting_noise
from PIL import Image
from tiny_wan import two_experts

from dit_jax.config import UserError
from dit_jax.parameters import named_leaves
from infer import generate, load_pipeline, media
from infer.request import Request

GUIDANCE = (3.5, 2.0)
SHORT = dict(size=SIZE, frames=5, steps=4, guidance=GUIDANCE)


@pytest.fixture(scope="module")
def pipe(text_experts):
    return load_pipeline(text_experts[0])


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_text_to_video_equals_diffusers(text_experts, pipe, solver):
    latents, video = by_diffusers(text_experts[1], solver, starting_noise(), GUIDANCE)
    ours = by_ours(pipe, solver, starting_noise(), GUIDANCE)
    assert relative(ours.latents, latents) <= 1e-4
    assert np.abs(ours.frames - np.round(video * 255)).max() <= 1
    for other in ((3.5, 3.5), (2.0, 2.0)):
        assert relative(by_ours(pipe, solver, starting_noise(), other).latents, latents) > 1e-3, "both scales matter"


def test_image_to_video_equals_diffusers(tmp_path):
    theirs = two_experts(image=True)
    theirs.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8))
    latents, video = by_diffusers(theirs, "unipc", starting_noise(), GUIDANCE, image=image)
    ours = by_ours(load_pipeline(tmp_path), "unipc", starting_noise(), GUIDANCE, image=image)
    assert relative(ours.latents, latents) <= 1e-4
    assert np.abs(ours.frames - np.round(video * 255)).max() <= 1


def test_one_scale_serves_both_experts(pipe):
    one = pipe(PROMPT, seed=1, **SHORT | dict(guidance=3.0))
    np.testing.assert_array_equal(one.latents, pipe(PROMPT, seed=1, **SHORT | dict(guidance=(3.0, 3.0))).latents)
    assert one.metadata[0]["guidance"] == 3.0


def test_experts_share_one_program_and_a_second_request_compiles_nothing(text_experts):
    pipe, compiled = load_pipeline(text_experts[0]), []
    pipe("a dog", seed=1, **SHORT)
    assert len(pipe.programs) == len(["noise", "solver", "text", "segment", "decode"])
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    pipe(PROMPT, seed=2, **SHORT | dict(guidance=(2.0, 4.0)))
    assert compiled == []
    pipe(PROMPT, **SHORT | dict(steps=5))
    assert compiled, "another schedule must be seen to compile, or the count means nothing"


def test_all_steps_may_be_one_experts(pipe):
    assert pipe.schedule(pipe.prepare(Request(prompt=PROMPT, **SHORT | dict(steps=1)))).timesteps[0] > 875
    assert pipe(PROMPT, **SHORT | dict(steps=1)).frames.shape == (1, 5, SIZE[1], SIZE[0], 3)


def test_an_offloaded_expert_is_on_no_device_and_changes_nothing(text_experts, pipe):
    expected = pipe(PROMPT, seed=3, **SHORT).latents
    kernels = {leaf.shape: leaf.nbytes for _, leaf in named_leaves(pipe.transformer.blocks) if leaf.ndim > 2}
    one = sum(leaf.nbytes for _, leaf in named_leaves(pipe.transformer.blocks) if leaf.ndim > 2)

    def weights():
        return sum(kernels.get(array.shape, 0) for array in jax.live_arrays() if array.dtype == np.float32)

    gc.collect()  # or what other tests have left goes in between
    others = weights()
    offloading, alive, loaded = load_pipeline(text_experts[0], offload_expert=True), [], []
    run = offloading.programs.run
    assert weights() - others == one

    def watched_run(*arguments, **options):
        result = run(*arguments, **options)
        alive.append(weights() - others)
        return result

    offloading.programs.run = watched_run
    for name, read in offloading.experts._load.items():
        offloading.experts._load[name] = lambda name=name, read=read: (
            loaded.append((name, weights() - others)) or read()
        )
    for _ in range(2):
        np.testing.assert_array_equal(offloading(PROMPT, seed=3, **SHORT).latents, expected)
    assert set(alive) == {one}
    assert loaded == [("transformer_2", 0), ("transformer", 0), ("transformer_2", 0)]


@pytest.mark.parametrize(
    ("guidance", "words"),
    [
        ((4.0, -1.0), ["guidance is -1.0"]),
        ((float("nan"), 3.0), ["guidance is nan"]),
        ((1.0, 2.0, 3.0), ["(1.0, 2.0, 3.0)", "(high, low)"]),
        ("4,3", ["'4,3'", "(high, low)"]),
    ],
)
def test_wrong_scales_are_refused_in_a_sentence(pipe, guidance, words):
    with pytest.raises(UserError) as error:
        pipe(PROMPT, **SHORT | dict(guidance=guidance))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_model_of_one_transformer_takes_one_scale_and_offloads_nothing(text_to_video):
    with pytest.raises(UserError, match="one number for a model of one transformer"):
        load_pipeline(text_to_video[0])(PROMPT, **SHORT)
    with pytest.raises(UserError, match="has one transformer"):
        load_pipeline(text_to_video[0], offload_expert=True)


def test_the_command_takes_two_scales_and_offloads(text_experts, pipe, tmp_path):
    out = tmp_path / "cat.mp4"
    size = ["--size", f"{SIZE[0]}x{SIZE[1]}", "--frames", str(FRAMES), "--steps", "4"]
    told = ["--model", str(text_experts[0]), "--prompt", PROMPT, "--out", str(out), *size]
    assert generate.main([*told, "--guidance", "3.5,2", "--offload-expert"]) == 0
    assert media.read_metadata(out)["guidance"] == [3.5, 2.0]


def test_a_scale_that_is_none_is_told(text_experts, tmp_path, capsys):
    told = ["--model", str(text_experts[0]), "--prompt", PROMPT, "--out", str(tmp_path / "x.mp4")]
    assert generate.main([*told, "--guidance", "4,3,2"]) == 2
    assert "'4,3,2'" in capsys.readouterr().err and not list(tmp_path.iterdir())
