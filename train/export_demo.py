"""Writes demo-wan as a complete pipeline in diffusers' layout: what ships, and what diffusers' `WanPipeline` opens.

python -m train.export_demo --wan runs/demo-wan [--vae runs/demo-vae] [--text runs/demo-text] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp

from convert.checkpoint import SHIPPED
from convert.encoders import t5_settings
from convert.vae_wan import config_to_diffusers
from convert.wan import wan_settings
from dit_jax.models.wan import FP32_LEAVES
from train.demo_files import DemoPipeline, Part, export_command

MOST_BYTES = 16 * 10**6
SHIFT = 3.0
DEFAULTS = {"size": [128, 128], "frames": 17, "steps": 30, "guidance": 4.0, "fps": 8, "grammar": "moving-digits"}

_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.38.0",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "boundary_ratio": None,
    "expand_timesteps": False,
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.38.0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": SHIFT,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}


def export_pipeline(folder: str | Path, wan, vae, text, tokenizer: str | Path) -> int:
    """Writes the three models (transformer and VAE in bf16) and what goes with them; returns the bytes on disk.

    `folder` is replaced as a whole or not at all. Raises UserError above 16 MB.
    """
    pipeline = DemoPipeline(
        parts={
            "transformer": Part(model=wan, settings=wan_settings(wan.config), exact=FP32_LEAVES),
            "vae": Part(model=vae, settings=config_to_diffusers(vae.config)),
            "text_encoder": Part(model=text, settings=t5_settings(text.config), dtype=jnp.float32),
        },
        tokenizers={"tokenizer": Path(tokenizer)},
        files={
            "scheduler/scheduler_config.json": _SCHEDULER,
            "model_index.json": _INDEX,
            "generation_defaults.json": DEFAULTS,
        },
    )
    return pipeline.write(folder, MOST_BYTES)


def main(arguments: list[str] | None = None) -> int:
    """Exports the newest checkpoints of three runs; 2 for bad input."""
    runs = {"wan": "runs/demo-wan", "vae": "runs/demo-vae", "text": "runs/demo-text"}
    return export_command("train.export_demo", runs, SHIPPED["demo-wan"], arguments, _export_runs)


def _export_runs(options: argparse.Namespace) -> int:
    from train.recipes.demo_text import TOKENIZER, load_text_encoder
    from train.recipes.demo_vae import load_vae
    from train.recipes.demo_wan import load_wan

    text, _ = load_text_encoder(options.text)
    models = load_wan(options.wan), load_vae(options.vae), text
    return export_pipeline(options.out, *models, Path(options.text) / TOKENIZER)


if __name__ == "__main__":
    sys.exit(main())
