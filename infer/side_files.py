"""What a pipeline reads of a checkpoint besides weights: defaults, the schedule's shift, the tokenizer."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from convert.checkpoint import INDEX, Checkpoint
from convert.components import read_json
from dit_jax.config import UserError
from dit_jax.sampling.schedules import Shift
from infer.request import Defaults

DEFAULTS_FILE = "generation_defaults.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"


def check_supported(checkpoint: Checkpoint) -> None:
    """Raises UserError for a Wan pipeline that needs more than one transformer, one image and the channels we feed."""
    folder, index = checkpoint.folder, _read(checkpoint, INDEX)
    if "transformer_2" in checkpoint.settings or index.get("boundary_ratio") is not None:
        raise UserError(
            f"{folder} is a Wan 2.2 model with two transformers: expected one, found transformer_2 or a "
            "boundary_ratio; choose a Wan 2.1 checkpoint"
        )
    transformer, vae = checkpoint.component("transformer").config, checkpoint.component("vae").config
    if transformer.image_positions is not None:
        raise UserError(
            f"{folder} draws between a first and a last frame (FLF2V): expected a model of a prompt and at most a "
            f"first frame, found positions for {transformer.image_positions} image tokens; choose an I2V checkpoint"
        )
    takes_image = transformer.image_width is not None
    channels = vae.z_dim + (vae.time_factor + vae.z_dim if takes_image else 0)
    if transformer.in_channels != channels:
        branch = "with" if takes_image else "without"
        raise UserError(
            f"{folder} has a transformer {branch} an image encoder that takes {transformer.in_channels} channels: "
            f"expected {channels}; choose a Wan 2.1 checkpoint (Wan 2.2 feeds images in another way)"
        )


def read_defaults(checkpoint: Checkpoint) -> Defaults:
    """The model's own defaults over ours; UserError for a setting that is none or does not fit."""
    settings = _read(checkpoint, DEFAULTS_FILE)
    names = [field.name for field in fields(Defaults)]
    for name, value in settings.items():
        if name not in names:
            raise UserError(
                f"{checkpoint.folder / DEFAULTS_FILE} sets {name!r}: expected some of {', '.join(names)}; remove it"
            )
        if not _fits(name, value):
            raise UserError(
                f"{checkpoint.folder / DEFAULTS_FILE} sets {name} to {value!r}: expected {_EXPECTED[name]}; mend it"
            )
    if "size" in settings:
        settings["size"] = tuple(settings["size"])
    return Defaults(**settings | {"grammar": bool(settings.get("grammar"))})


_COUNT = "a whole number from 1"
_EXPECTED = {
    "size": "[width, height] in pixels",
    "frames": _COUNT,
    "steps": _COUNT,
    "guidance": "a number from 0",
    "fps": _COUNT,
}


def _fits(name: str, value: Any) -> bool:
    if name == "grammar":  # true, or as earlier exports have it the grammar's text
        return True
    if name == "size":
        return isinstance(value, list) and len(value) == 2 and all(_is_count(side) for side in value)
    if name == "guidance":
        return isinstance(value, int | float) and math.isfinite(value) and value >= 0
    return _is_count(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def read_shift(checkpoint: Checkpoint) -> Shift:
    """The shift of the schedule, 1 where the scheduler's config has none; UserError where it is no number."""
    settings = _read(checkpoint, SCHEDULER_FILE)
    shift = settings.get("flow_shift") or settings.get("shift") or 1.0
    if not isinstance(shift, int | float):
        raise UserError(
            f"{checkpoint.folder / SCHEDULER_FILE} sets the shift to {shift!r}: expected a number; download it again"
        )
    return Shift(constant=float(shift))


def load_tokenizer(checkpoint: Checkpoint):
    """The tokenizer in the folder `tokenizer`; UserError where it is missing or damaged."""
    from transformers import AutoTokenizer

    for name, file in checkpoint.files.items():
        if name.startswith("tokenizer/") and isinstance(file, Path):
            try:
                return AutoTokenizer.from_pretrained(file.parent)
            except Exception as error:  # the tokenizers library raises bare Exceptions besides those of json and files
                reason = str(error).strip().partition("\n")[0]
                raise UserError(
                    f"cannot read the tokenizer in {file.parent} ({type(error).__name__}: {reason}): expected files "
                    "that transformers opens; download them again"
                ) from error
    raise UserError(
        f"{checkpoint.folder} has no tokenizer: expected its files in the folder tokenizer; download it again"
    )


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    source = checkpoint.files.get(name)
    if source is None:
        return {}
    return json.loads(source) if isinstance(source, bytes) else read_json(source)
