"""Pruned models: what a config.json says beyond diffusers' own settings when blocks keep fewer heads or neurons.

diffusers derives the heads of both backbones, and FLUX's MLP width, from the model's width. Where a pruned model has
fewer, its config gives the sizes that diffusers would expect, and what is kept of them under the key `pruned`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_jax.config import UserError

PRUNED = "pruned"
HEADS, MLP, NORM = "heads", "mlp_width", "norm_counts_pruned"


def kept(settings: Mapping[str, Any], full: Mapping[str, int | bool]) -> dict[str, Any]:
    """What a model keeps of each size, and its flags; those of `full` where its config says nothing.

    Raises UserError for a name that is not in `full`, a size that is not between 1 and the full one, and a flag that is
    none.
    """
    given = settings.get(PRUNED) or {}
    if not isinstance(given, dict):
        raise UserError(f"config.json: {PRUNED} is {given!r}, expected an object with some of {', '.join(full)}.")
    for name, value in given.items():
        if name not in full:
            raise UserError(f"config.json: {PRUNED} names {name!r}, expected some of {', '.join(full)}; mend the name.")
        flag = isinstance(full[name], bool)
        if type(value) is not type(full[name]) or not (flag or 1 <= value <= full[name]):
            expected = "true or false" if flag else f"a whole number from 1 to {full[name]}"
            raise UserError(f"config.json: {PRUNED} has {name} {value!r}, expected {expected}; mend the value.")
    return dict(full) | given


def pruned_settings(kept: Mapping[str, int | bool], full: Mapping[str, int | bool]) -> dict[str, Any]:
    """The entry of config.json for what a model keeps; none where it is everything."""
    fewer = {name: value for name, value in kept.items() if value != full[name]}
    return {PRUNED: fewer} if fewer else {}
