"""Few-step students in PyTorch: their loop against the same steps of this project's models, with the same new noise."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_models import BLOCKS, PROMPTS, relative

from convert.checkpoint import open_checkpoint
from convert.cli import main
from convert.method_parts import part_files
from convert.torch_modules.few_step import flux_velocity, noise_levels, sample, wan_velocity
from convert.torch_modules.pare import load_router, route
from convert.transfer import convert
from dit_jax.methods.method import Part
from dit_jax.sampling.schedules import shifted
from dit_jax.sampling.solvers import Renoise, Step
from infer.request import Request
from infer.side_files import read_shift

SETTINGS = {"timesteps": [1000, 750, 500, 250], "shift": 5.0, "guidance_scale": 1.0, "sampler": "renoise"}
RNG = np.random.default_rng(4)


def velocities(written):
    """(this project's velocity of latents at a σ, channels last; diffusers' for `sample`, and how its latents lie)."""
    pipe = written.pipe
    options = {} if written.kind == "flux" else dict(frames=9, guidance=1.0)
    if written.has_image:
        options["image"] = [written.image] * 2
    job = pipe.prepare(Request(prompt=PROMPTS, size=(112, 80), steps=1, **options))
    denoiser = pipe.stages(job, pipe.schedule(job))[0].denoiser()

    def mine(x, sigma):
        return denoiser(x, denoiser.init(x), Step(jnp.int32(0), sigma, sigma, 1000 * sigma))[0]

    told, model = denoiser.conditioning, written.theirs().transformer
    text = torch.tensor(np.asarray(told.text))
    if written.kind == "flux":
        ids = torch.stack([torch.zeros(35), torch.arange(35) // 7, torch.arange(35) % 7], dim=1)
        return mine, flux_velocity(
            model, encoder_hidden_states=text, pooled_projections=torch.tensor(np.asarray(told.pooled)), img_ids=ids,
            txt_ids=torch.zeros(text.shape[1], 3), guidance=torch.tensor(np.asarray(told.guidance)),
        )  # fmt: skip
    given = None if denoiser.extra is None else torch.tensor(np.asarray(denoiser.extra)).permute(0, 4, 1, 2, 3)
    image = None if told.image is None else torch.tensor(np.asarray(told.image))
    return mine, wan_velocity(model, given, encoder_hidden_states=text, encoder_hidden_states_image=image)


def as_theirs(written, latents):
    x = torch.tensor(np.asarray(latents)).permute(0, 4, 1, 2, 3)
    if written.kind != "flux":
        return x
    return torch.nn.functional.pixel_unshuffle(x[:, :, 0], 2).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    "written", ["text-to-video", "flux", pytest.param("image-to-video", marks=pytest.mark.long)], indirect=True
)
@pytest.mark.parametrize("sampler", ["renoise", "euler"])
def test_the_loop_is_that_of_this_project(written, sampler):
    settings = SETTINGS | {"sampler": sampler}
    mine, theirs = velocities(written)
    noise = written.noise(2)
    fresh = RNG.standard_normal((4, *noise.shape)).astype(np.float32)
    sigmas = np.append(shifted(np.asarray(settings["timesteps"]) / 1000, 5.0), 0).astype(np.float32)
    x = jnp.asarray(noise)
    for step in range(4):
        v = mine(x, sigmas[step])
        clean = x - sigmas[step] * v
        after = sigmas[step + 1]
        x = x + (after - sigmas[step]) * v if sampler == "euler" else (1 - after) * clean + after * fresh[step]
    found = sample(theirs, as_theirs(written, noise), settings, lambda step: as_theirs(written, fresh[step]))
    assert relative(found.numpy(), as_theirs(written, x).numpy()) <= 1e-4


def fresh_noise(latents, step):
    """What `Renoise` adds after a step: of a key that the starting noise gives."""
    keys = Renoise().init(jnp.asarray(latents))

    def of_sample(key):
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step)
        return jax.random.normal(key, latents.shape[1:])

    return np.asarray(jax.vmap(of_sample)(keys))


@pytest.mark.parametrize("written", ["text-to-video"], indirect=True)
def test_a_routed_student_of_four_steps_is_run_as_its_folder_says(written, tmp_path):
    shift = read_shift(open_checkpoint(written.native)).constant
    told = part_files({"few_step": Part(SETTINGS | {"shift": shift}, {})})
    source = open_checkpoint(written.native)
    convert(replace(source, files=source.files | told), tmp_path / "native", "native")
    assert main(["to-torch", str(tmp_path / "native"), str(tmp_path / "torch")]) == 0
    settings = json.loads((tmp_path / "torch/methods/few_step/config.json").read_text())

    noise = written.noise(2)
    request = Request(
        prompt=PROMPTS, size=written.size, frames=9, steps=len(settings["timesteps"]), solver=settings["sampler"],
        guidance=settings["guidance_scale"], plan="routing:min=2:max=4", latents=noise,
    )  # fmt: skip
    ours = written.pipe.denoise(written.pipe.prepare(request))

    model = written.theirs().transformer
    routing = route(model, load_router(tmp_path / "torch/methods/router"), 2, 4)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(routing.gates.sum(dim=1).tolist()))
    text = torch.tensor(np.asarray(written.pipe.embedded(PROMPTS)))
    velocity = wan_velocity(model, encoder_hidden_states=text)
    found = sample(
        velocity, as_theirs(written, noise), settings, lambda step: as_theirs(written, fresh_noise(noise, step))
    )
    assert relative(found.numpy(), as_theirs(written, ours).numpy()) <= 1e-4
    assert len(seen) == 4 and max(max(counts) for counts in seen) < BLOCKS


def test_levels_are_shifted_timesteps():
    np.testing.assert_allclose(noise_levels(SETTINGS), [1, 0.9375, 5 / 6, 0.625, 0])
