"""The shipped model: what is in it, and that diffusers' own pipeline opens it and draws the same video."""

import jax
import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from convert.checkpoint import DEMO
from infer import load_pipeline

PROMPT = "a red 7 moving left above a blue 2 on a striped background"


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("demo-wan")


def test_it_is_small_and_has_heads_and_blocks_to_prune(pipe):
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= 16 * 2**20
    assert pipe.transformer.config.heads >= 8 and pipe.transformer.config.blocks >= 10
    assert sum(leaf.size for leaf in jax.tree.leaves(pipe.transformer)) > 10**6
    assert pipe.tokens(pipe.defaults.size, pipe.defaults.frames) == 320


def test_diffusers_draws_the_same_video(pipe):
    noise = np.random.default_rng(5).standard_normal((1, 5, 16, 16, 16)).astype(np.float32)
    theirs = WanPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=8, guidance_scale=pipe.defaults.guidance, width=128, height=128, num_frames=17)
    with torch.no_grad():
        video = theirs(
            PROMPT, latents=torch.tensor(noise).permute(0, 4, 1, 2, 3), max_sequence_length=pipe.text_tokens, **options
        ).frames[0]
    ours = pipe(PROMPT, latents=noise, steps=8).frames[0]
    error = np.mean(np.square(ours / 255.0 - video))
    assert 10 * np.log10(1 / error) >= 40
    assert ours.std() > 10
