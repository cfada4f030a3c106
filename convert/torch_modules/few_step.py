"""Few-step students in PyTorch (distribution matching, as PARE's third stage): a plain transformer of diffusers', run
at a few fixed noise levels without guidance.

    settings = json.loads(Path("student/methods/few_step/config.json").read_text())
    velocity = wan_velocity(pipe.transformer, encoder_hidden_states=prompt_embeds)
    latents = sample(velocity, torch.randn(1, 16, 21, 60, 104), settings)

The settings: `timesteps` before the shift, `shift`, `sampler` ("renoise" or "euler"), `guidance_scale`, which is 1 (no
second call for a negative prompt), and of a FLUX.1 dev model `guidance`, which it is told.
"""

import itertools

import torch

TRAIN_STEPS = 1000


def noise_levels(settings: dict) -> list[float]:
    """σ before each step, and 0 at the end: s·σ / (1 + (s - 1)·σ) of the timesteps."""
    shift = settings["shift"]
    evenly = [t / TRAIN_STEPS for t in settings["timesteps"]]
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in evenly] + [0.0]


@torch.no_grad()
def sample(velocity, latents, settings: dict, fresh=None):
    """Latents without noise from latents of pure noise.

    velocity  velocity(latents, t) at the model's timestep t in [0, 1000]
    fresh     fresh(step) is the new noise after a step; by default random
    x0 = x - σ·v; "renoise" makes the next x = (1 - σ')·x0 + σ'·ε, "euler" x + (σ' - σ)·v.
    """
    fresh = fresh or (lambda step: torch.randn_like(latents))
    levels, x = noise_levels(settings), latents.float()
    for step, (sigma, after) in enumerate(itertools.pairwise(levels)):
        t = torch.full((len(x),), TRAIN_STEPS * sigma, device=x.device)
        v = velocity(x, t).float()
        if settings["sampler"] == "euler":
            x = x + (after - sigma) * v
        else:
            clean = x - sigma * v
            x = clean if after == 0 else (1 - after) * clean + after * fresh(step).to(x)
    return x


def wan_velocity(transformer, condition=None, **told):
    """What `sample` calls, of a WanTransformer3DModel: latents [B, C, T, Y, X].

    condition  [B, C', T, Y, X] channels behind the latents (image-to-video): the mask and the encoded frames
    told       encoder_hidden_states, encoder_hidden_states_image
    """

    def velocity(x, t):
        seen = x if condition is None else torch.cat([x, condition], dim=1)
        return transformer(seen.to(transformer.dtype), timestep=t, return_dict=False, **told)[0]

    return velocity


def flux_velocity(transformer, **told):
    """What `sample` calls, of a FluxTransformer2DModel: packed latents [B, N, 4·C].

    told  encoder_hidden_states, pooled_projections, img_ids, txt_ids and, for a dev model, guidance
    """

    def velocity(x, t):
        return transformer(x.to(transformer.dtype), timestep=t / TRAIN_STEPS, return_dict=False, **told)[0]

    return velocity
