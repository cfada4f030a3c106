"""Final latents on disk between denoising and decoding, so that a failed decode loses nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dit_jax.config import UserError
from dit_jax.methods.plan import Plan
from infer.request import Job

SUFFIX = ".latents.safetensors"


Loras = Sequence[Mapping[str, Any]]  # name, hash and strength of each


def write(out: Path, latents: np.ndarray, job: Job, checkpoint: str, loras: Loras) -> Path:
    """Writes `OUT.latents.safetensors` beside the output and returns its path."""
    path = out.with_name(out.name + SUFFIX)
    path.parent.mkdir(parents=True, exist_ok=True)
    details = {"job": json.dumps(job.describe()), "checkpoint": checkpoint, "loras": json.dumps(loras)}
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({"latents": np.ascontiguousarray(latents)}, partial, details)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read(path: Path, checkpoint: str, loras: Loras) -> tuple[np.ndarray, Job]:
    """(latents, the job that they answer); UserError if they are not there or come from another model or LoRA."""
    try:
        with safe_open(path, framework="np") as file:
            latents, details = file.get_tensor("latents"), file.metadata() or {}
            told, source = json.loads(details["job"]), details["checkpoint"]
            job = Job(**told | {"plan": Plan(text=told["plan"])})  # its methods have run: their files may be gone
            merged = json.loads(details.get("loras", "[]"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot read latents from {str(path)!r} ({error}): expected a file *{SUFFIX} left by dit-generate"
        ) from error
    if source != checkpoint:
        raise UserError(
            f"{path} was made by checkpoint {source}, this model is {checkpoint}: pass the --model that made it"
        )
    if merged != loras:
        raise UserError(
            f"{path} has LoRAs {json.dumps(merged)}, found {json.dumps(loras)}: pass the --lora that made it"
        )
    return latents, job
