"""What a pipeline reads of a checkpoint besides weights: defaults, the schedule's shift, the tokenizer."""

from __future__ import annotations

import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.components import class_name, read_json
from dit_jax.config import UserError
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import SOLVERS
from infer.digit_grammar import GRAMMARS
from infer.request import Defaults

DEFAULTS_FILE = "generation_defaults.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
SCHEDULERS = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}  # class -> our solver


def read_defaults(checkpoint: Checkpoint, usual: Defaults) -> Defaults:
    """The model's own defaults over its scheduler's solver and its backbone's defaults.

    Raises UserError for a setting that is none or does not fit.
    """
    settings = read_settings(checkpoint, DEFAULTS_FILE)
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
    for name in ("size", "guidance"):
        if isinstance(settings.get(name), list):
            settings[name] = tuple(settings[name])
    scheduler = class_name(read_settings(checkpoint, SCHEDULER_FILE))
    return replace(usual, **{"solver": SCHEDULERS.get(scheduler or "", usual.solver)} | settings)


_COUNT = "a whole number from 1"
_EXPECTED = {
    "size": "[width, height] in pixels",
    "frames": _COUNT,
    "steps": _COUNT,
    "guidance": "a number from 0, or two of them for the experts of Wan 2.2",
    "true_cfg": "a number from 0",
    "solver": f"one of {', '.join(SOLVERS)}",
    "fps": _COUNT,
    "video": "true or false",
    "grammar": f"{' or '.join(GRAMMARS)}",
}


def _fits(name: str, value: Any) -> bool:
    if name == "grammar":
        return value is None or value in GRAMMARS
    if name == "size":
        return isinstance(value, list) and len(value) == 2 and all(_is_count(side) for side in value)
    if name == "solver":
        return value in SOLVERS
    if name == "video":
        return isinstance(value, bool)
    if name == "guidance" and isinstance(value, list):
        return len(value) == 2 and all(_is_scale(scale) for scale in value)
    if name in ("guidance", "true_cfg"):
        return _is_scale(value)
    return _is_count(value)


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def read_shift(checkpoint: Checkpoint) -> Shift:
    """The shift of a Wan schedule, 1 where the scheduler's config has none; UserError where it is no number."""
    settings = read_settings(checkpoint, SCHEDULER_FILE)
    return Shift(constant=_number(checkpoint, settings, "flow_shift" if settings.get("flow_shift") else "shift", 1.0))


def read_flux_shift(checkpoint: Checkpoint) -> Shift:
    """The shift of a FLUX schedule: by the number of tokens (dev) or constant (schnell); UserError for no number."""
    settings = read_settings(checkpoint, SCHEDULER_FILE)
    return Shift(
        constant=_number(checkpoint, settings, "shift", 1.0),
        dynamic=bool(settings.get("use_dynamic_shifting")),
        to_last_step=True,
        low=_number(checkpoint, settings, "base_shift", 0.5),
        high=_number(checkpoint, settings, "max_shift", 1.15),
        low_tokens=_number(checkpoint, settings, "base_image_seq_len", 256),
        high_tokens=_number(checkpoint, settings, "max_image_seq_len", 4096),
    )


def _number(checkpoint: Checkpoint, settings: dict[str, Any], name: str, usual: float) -> float:
    value = settings.get(name) or usual
    if not isinstance(value, int | float):
        raise UserError(
            f"{checkpoint.folder / SCHEDULER_FILE} sets {name} to {value!r}: expected a number; download it again"
        )
    return float(value)


def load_tokenizer(checkpoint: Checkpoint, folder: str):
    """The tokenizer in this folder of the checkpoint; UserError where it is missing or damaged."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss a torch that tokenizers do not need
    from transformers import AutoTokenizer

    for name, file in checkpoint.files.items():
        if name.startswith(f"{folder}/") and isinstance(file, Path):
            try:
                return AutoTokenizer.from_pretrained(file.parent)
            except Exception as error:  # the tokenizers library raises bare Exceptions besides those of json and files
                reason = str(error).strip().partition("\n")[0]
                raise UserError(
                    f"cannot read the tokenizer in {file.parent} ({type(error).__name__}: {reason}): expected files "
                    "that transformers opens; download them again"
                ) from error
    raise UserError(
        f"{checkpoint.folder} has no tokenizer: expected its files in the folder {folder}; download it again"
    )


def read_settings(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    source = checkpoint.files.get(name)
    return {} if source is None else read_json(source)
