"""Tensors in torch's files, which are pickles: only with the `torch` extra, and without running any code in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.safetensors_files import Tensor
from dit_jax.config import UserError


def read_torch(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, without running any code in it: mapped, or in memory in the form before torch 1.6."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f'{file} can only be read with torch; run: pip install "dit-jax[torch]".') from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:  # torch raises a different kind for every sort of damage
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{file} cannot be read as a file of weights ({reason}); download it again.") from error
    if not isinstance(state, Mapping) or not all(_is_entry(key, value, torch) for key, value in state.items()):
        raise UserError(f"{file} should hold a dict of tensors and nothing else; save model.state_dict() again.")
    return {key: _from_torch(key, file, value, torch) for key, value in state.items()}


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _is_entry(key: Any, value: Any, torch: Any) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def _from_torch(key: str, file: Path, value: Any, torch: Any) -> Tensor:
    name = str(value.dtype).removeprefix("torch.")
    try:
        dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    except TypeError as error:
        raise UserError(f"{file}: {key} has dtype {name}, expected a float; save it in another dtype.") from error

    def read() -> np.ndarray:
        # numpy has no bfloat16 of its own: torch hands the bytes over as integers.
        same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        return value.detach().contiguous().view(same_size).numpy().view(dtype)

    return Tensor(key, file, dtype, tuple(value.shape), read)
