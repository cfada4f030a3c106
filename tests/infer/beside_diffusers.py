"""One request run by diffusers' pipelines and by ours, from the same starting noise."""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

PROMPT, NEGATIVE = "a red cat runs under the moon", "blue fish"
SIZE, FRAMES, STEPS = (48, 32), 9, 4  # 6x4 latent cells, 3 latent frames: 18 tokens


def starting_noise(channels=4, count=1):
    return np.random.default_rng(0).standard_normal((count, 3, 4, 6, channels)).astype(np.float32)


def by_diffusers(pipeline, solver, noise, guidance=3.5, size=SIZE, **options):
    """(latents, video) of diffusers; guidance may be a pair, (high, low)."""
    if isinstance(guidance, tuple):
        guidance, options["guidance_scale_2"] = guidance
    if solver == "euler":
        pipeline.scheduler, saved = FlowMatchEulerDiscreteScheduler(shift=3.0), pipeline.scheduler
    channels_first = torch.tensor(noise).permute(0, 4, 1, 2, 3)
    pipeline.set_progress_bar_config(disable=True)
    shared = dict(
        prompt=[PROMPT], negative_prompt=[NEGATIVE], width=size[0], height=size[1], num_frames=FRAMES,
        num_inference_steps=STEPS, guidance_scale=guidance, latents=channels_first,
    )  # fmt: skip
    with torch.no_grad():
        latents = pipeline(**shared, output_type="latent", **options).frames
        video = pipeline(**shared, output_type="np", **options).frames
    if solver == "euler":
        pipeline.scheduler = saved
    return latents.permute(0, 2, 3, 4, 1).numpy(), video


def by_ours(pipe, solver, noise, guidance=3.5, size=SIZE, **options):
    return pipe(
        PROMPT, negative_prompt=NEGATIVE, size=size, frames=FRAMES, steps=STEPS, guidance=guidance, solver=solver,
        latents=noise, **options,
    )  # fmt: skip


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)
