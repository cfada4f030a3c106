"""LoRAs of a pipeline: what was asked for, read for its models, and merged into their weights.

The weights that LoRAs are merged into are not kept: a leaf that a LoRA was added to is read again from the checkpoint,
which is exact and costs neither device nor host memory, where a copy of a 14B model's leaves would cost 28 GB. A leaf
that no LoRA has touched is what it was when it was loaded, and is not read again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from convert.lora import read_lora
from convert.lora_keys import Target
from convert.original import TRANSFORMER
from convert.wan import LOW_NOISE
from dit_jax.config import UserError
from dit_jax.lora import Lora
from dit_jax.parameters import leaf_name

Held = tuple[MutableMapping[str, Any], str]
"""Where a model is: a mapping, an object's attributes say, and its name there; not in it while it is not loaded."""
LoraChoice = str | Path | tuple[str | Path, float] | tuple[str | Path, float, str]
"""A LoRA's file, folder or hub id, perhaps its strength (1), perhaps the transformer that it is for."""


@dataclass(frozen=True, kw_only=True)
class ChosenLora:
    """A LoRA that was read: the name and hash of its file, its strength, and what it adds to each component."""

    name: str
    hash: str
    strength: float
    parts: Mapping[str, Lora]

    def describe(self) -> dict[str, Any]:
        """What an output's metadata says of it."""
        return {"name": self.name, "hash": self.hash, "strength": self.strength}


def read_choice(choice: LoraChoice, targets: Mapping[str, Target], allow_unmatched: bool) -> ChosenLora:
    """The LoRA that was asked for.

    Raises UserError as `read_lora` does, for a strength that is no number, for a transformer that is not there and for
    one that a file of both experts says itself.
    """
    path, strength, into = _complete(choice)
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise UserError(f"the strength of LoRA {path} is {strength!r}: expected a finite number; write 0.8, say")
    if into not in targets:
        raise UserError(f"LoRA {path} is for {into!r}, which the model lacks: expected one of {', '.join(targets)}")
    # Files name one transformer, whichever expert they were trained for.
    opened, parts = read_lora(path, {**targets, TRANSFORMER: targets[into]}, allow_unmatched)
    if into != TRANSFORMER and TRANSFORMER in parts:
        if into in parts:
            raise UserError(
                f"LoRA {opened.file} has parts for {TRANSFORMER} and {into}; expected one part to put into {into}; "
                f"give the file without {into}=, and each goes to its own."
            )
        parts[into] = parts.pop(TRANSFORMER)
    return ChosenLora(name=opened.file.name, hash=opened.hash, strength=float(strength), parts=parts)


def _complete(choice: LoraChoice) -> tuple[str | Path, float, str]:
    if not isinstance(choice, tuple):
        return choice, 1.0, TRANSFORMER
    return choice if len(choice) == 3 else (*choice, TRANSFORMER)


def parse_choice(text: str) -> LoraChoice:
    """`[transformer_2=]PATH[:STRENGTH]`; UserError for a strength that is no number."""
    into, equals, rest = text.partition("=")
    if not equals or into not in (TRANSFORMER, LOW_NOISE):
        into, rest = TRANSFORMER, text
    path, colon, strength = rest.rpartition(":")
    if not colon or Path(rest).exists():
        return rest, 1.0, into
    try:
        return path, float(strength), into
    except ValueError as error:
        raise UserError(f"--lora {text!r} ends in {strength!r}: expected a number; write PATH:0.8") from error


def replace_leaves(held: Held, names: Collection[str], value: Callable[[str, jax.Array], jax.Array]) -> None:
    """Gives a model that is held somewhere other leaves, one after the other: no more than one is there twice.

    value  dotted path and present leaf -> new leaf; when it raises, the leaves before it are the new ones
    """
    holder, key = held
    found, tree = jax.tree_util.tree_flatten_with_path(holder[key])
    paths, leaves = [leaf_name(path) for path, _ in found], [leaf for _, leaf in found]
    del found
    holder[key] = None  # or the old leaves would live on in the old model
    try:
        for index, name in enumerate(paths):
            if name in names:
                leaves[index] = value(name, leaves[index])
    finally:
        holder[key] = jax.tree.unflatten(tree, leaves)
