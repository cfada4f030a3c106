"""Writes demo-flux as a complete pipeline in diffusers' layout: what ships, and what diffusers' `FluxPipeline` opens.

python -m train.export_demo_flux [--flux runs/demo-flux] [--vae runs/demo-flux-vae] [--text RUN] [--out FOLDER]
python -m train.export_demo_flux --flux runs/demo-flux-on --vae demo-flux --text demo-flux    (a new transformer)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convert.checkpoint import SHIPPED
from convert.encoders import clip_text_settings, t5_settings
from convert.flux import flux_settings
from convert.vae_kl import config_to_diffusers
from train.demo_files import DemoPipeline, Part, export_command

MOST_BYTES = 12 * 10**6
SHIFT = 2.0
DEFAULTS = {"size": [128, 128], "steps": 20, "true_cfg": 3.0, "grammar": "digits"}

_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.38.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.38.0",
    "num_train_timesteps": 1000,
    "shift": SHIFT,
    "use_dynamic_shifting": False,
}


def export_pipeline(folder: str | Path, flux, vae, text, tokenizers: Path) -> int:
    """Writes the four models in bf16 and what goes with them; returns the bytes on disk.

    `tokenizers` holds the folders `tokenizer` and `tokenizer_2`. `folder` is replaced as a whole or not at all. Raises
    UserError above 12 MB.
    """
    pipeline = DemoPipeline(
        parts={
            "transformer": Part(model=flux, settings=flux_settings(flux.config)),
            "vae": Part(model=vae, settings=config_to_diffusers(vae.config)),
            "text_encoder": Part(model=text.clip, settings=clip_text_settings(text.clip.config)),
            "text_encoder_2": Part(model=text.t5, settings=t5_settings(text.t5.config)),
        },
        tokenizers={name: tokenizers / name for name in ("tokenizer", "tokenizer_2")},
        files={
            "scheduler/scheduler_config.json": _SCHEDULER,
            "model_index.json": _INDEX,
            "generation_defaults.json": DEFAULTS,
        },
    )
    return pipeline.write(folder, MOST_BYTES)


def main(arguments: list[str] | None = None) -> int:
    """Exports the newest checkpoints of three runs, or parts of pipelines; 2 for bad input."""
    runs = {"flux": "runs/demo-flux", "vae": "runs/demo-flux-vae", "text": "runs/demo-flux-text"}
    return export_command("train.export_demo_flux", runs, SHIPPED["demo-flux"], arguments, _export_runs)


def _export_runs(options: argparse.Namespace) -> int:
    from train.demo_models import folder_of, of_run_or_checkpoint
    from train.recipes.demo_flux import load_flux, load_text
    from train.recipes.demo_flux_vae import load_vae

    vae = of_run_or_checkpoint(options.vae, "vae", load_vae)
    return export_pipeline(options.out, load_flux(options.flux), vae, load_text(options.text), folder_of(options.text))


if __name__ == "__main__":
    sys.exit(main())
