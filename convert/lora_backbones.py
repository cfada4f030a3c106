"""Which backbone a LoRA file is for, told from its keys where no model is at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from convert.encoders import canonical_clip_text_key, canonical_t5_key, clip_text_rows, t5_rows
from convert.flux import flux_rows
from convert.lora import LoraFile, find_lora, lora_tensors, open_lora
from convert.lora_keys import Target, address_of, is_adapter_key
from convert.original import INDEX
from convert.wan import wan_rows
from dit_jax.config import UserError
from dit_jax.models.clip_text import CLIP_L
from dit_jax.models.flux import FLUX_DEV
from dit_jax.models.t5 import UMT5_XXL
from dit_jax.models.wan import PRESETS

# The layers' names are the same at any size; these presets have every layer that a relative may have.
_WAN = Target(rows=wan_rows(replace(PRESETS["wan2.1-i2v-14b"], image_positions=514)))
_T5 = Target(rows=t5_rows(UMT5_XXL), canonical=canonical_t5_key)
_CLIP = Target(rows=clip_text_rows(CLIP_L), canonical=canonical_clip_text_key)
BACKBONES: dict[str, dict[str, Target]] = {
    "Wan": {"transformer": _WAN, "transformer_2": _WAN, "text_encoder": _T5},
    "FLUX": {"transformer": Target(rows=flux_rows(FLUX_DEV)), "text_encoder": _CLIP, "text_encoder_2": _T5},
}


def recognise(path: str | Path) -> tuple[str, LoraFile]:
    """(backbone, the file) of a LoRA: the backbone that most of its keys fit.

    Raises UserError as `open_lora` does, and when no key fits any.
    """
    file = find_lora(path)
    addresses = [address for key in lora_tensors(file) if (address := address_of(key, file))]

    def fitting(targets: Mapping[str, Target]) -> int:
        return sum(bool(at.component in targets and targets[at.component].find(at)) for at in addresses)

    fits = {name: fitting(targets) for name, targets in BACKBONES.items()}
    backbone = max(fits, key=lambda name: fits[name])
    if not fits[backbone]:
        raise UserError(f"{file} is no LoRA of {' or '.join(BACKBONES)}: none of its keys names a layer; use another.")
    return backbone, open_lora(file, BACKBONES[backbone])


def is_lora(path: str | Path) -> bool:
    """Whether a path leads to a LoRA: a file some of whose keys are an adapter's, or a folder with such a file, and no
    pipeline that it is merged into."""
    place = Path(path).expanduser()
    if not place.exists() or (place / INDEX).is_file():
        return False
    try:
        return any(is_adapter_key(key) for key in lora_tensors(find_lora(place)))
    except UserError:
        return False
