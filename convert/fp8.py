"""Weights in fp8 on their way in: values times their scales, as bfloat16.

Checkpoints of ComfyUI keep `X.weight` in e4m3 with one fp32 scale for the tensor or one for each of its rows, called
`X.scale_weight` or, later, `X.weight_scale`; a weight is its value times its scale. Others hold plain fp8 values.
Both formats of fp8 (e4m3 and e5m2) are read: their values are exact in bfloat16, and a product with a scale is
rounded once, to 2⁻⁹ of it, where e4m3 itself had rounded to 2⁻⁴.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np

from convert.safetensors_files import Tensor
from dit_jax.config import UserError

WIDER = np.dtype(ml_dtypes.bfloat16)
FP8 = frozenset(map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
# Scales of a layer's inputs, for products in fp8 (whoever computes in bfloat16 has no use for them), and ComfyUI's own
# note on the layer, which is checked.
INPUT_SCALES = (".scale_input", ".input_scale")
NOTE = ".comfy_quant"
MARKER = "scaled_fp8"  # an empty tensor by which ComfyUI knows such a file
_PIECE = 1 << 20  # values that are scaled at once
SCALE_DTYPES = frozenset(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one component with fp8 ones as bfloat16, and without what belongs to their scaling.

    Raises UserError naming file and key for a scale of another shape, kind or value than fits its weight, and for one
    that is missing where the same weight of other blocks has one.
    """
    out = {key: tensor for key, tensor in tensors.items() if key != MARKER}
    quantised = {key: tensor for key, tensor in out.items() if tensor.dtype in FP8}
    scaled_families = set()
    for key, tensor in quantised.items():
        layer = key.removesuffix(".weight")
        scales = [out.pop(layer + name) for name in WEIGHT_SCALES if layer + name in out]
        for name in INPUT_SCALES:
            out.pop(layer + name, None)
        if layer + NOTE in out:
            _check_note(out.pop(layer + NOTE))
        if len(scales) > 1:
            raise UserError(f"{tensor.file}: {key} has two scales, {scales[0].key} and {scales[1].key}; drop one.")
        out[key] = _times(tensor, scales[0] if scales else None)
        if scales:
            scaled_families.add(_family(key))
    for key, tensor in quantised.items():
        if _family(key) in scaled_families and out[key].scale is None:
            raise UserError(
                f"{tensor.file} lacks a scale of {key}; expected one, as the same weight of other blocks has; "
                "download the weights again."
            )
    return out


def _family(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)


def _check_note(note: Tensor) -> None:
    """A layer's note is JSON in bytes that names its format."""
    try:
        told = json.loads(note.read().tobytes())
        found = told["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{note.file}: {note.key} is no JSON that names a format; download it again.") from error
    if found not in ("float8_e4m3fn", "float8_e5m2"):
        raise UserError(f"{note.file}: {note.key} has format {found!r}, expected float8_e4m3fn; use another file.")


def _times(tensor: Tensor, scale: Tensor | None) -> Tensor:
    values = np.ones(1, np.float32) if scale is None else _scale_values(tensor, scale)
    return replace(
        tensor,
        dtype=WIDER,
        stored=tensor.dtype,
        scale=None if scale is None else scale.key,
        read=lambda: _product(tensor.read(), values),
    )


def _scale_values(tensor: Tensor, scale: Tensor) -> np.ndarray:
    """One scale, or one for each row."""
    if scale.dtype not in SCALE_DTYPES:
        raise UserError(f"{scale.file}: {scale.key} is {scale.dtype}, expected a scale in fp32; use another file.")
    rows = tensor.shape[0] if tensor.shape else 1
    if scale.size != 1 and scale.shape != (rows, *(1,) * (len(scale.shape) - 1)):
        raise UserError(
            f"{scale.file}: {scale.key} has shape {scale.shape}, expected one scale or one for each of the {rows} rows "
            f"of {tensor.key}; use a file scaled so."
        )
    values = scale.read().astype(np.float32).reshape(-1)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise UserError(f"{scale.file}: {scale.key} holds a scale that is negative, NaN or infinite; use another file.")
    return values


def _product(weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values times scales in fp32, rounded once, a few rows at a time; there are only 256 values: a table has them."""
    values = np.arange(256, dtype=np.uint8).view(weights.dtype).astype(np.float32)
    rows = len(weights) if weights.ndim else 1
    bits, out = weights.view(np.uint8).reshape(rows, -1), np.empty((rows, weights.size // max(rows, 1)), WIDER)
    step = max(1, _PIECE // max(1, out.shape[1]))
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        out[piece] = values[bits[piece]] * (scales[piece, None] if len(scales) > 1 else scales)
    return out.reshape(weights.shape)
