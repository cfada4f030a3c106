"""The entries of `dit-bench --plans`: plans, the plain model with fewer steps, and pruned models."""

from __future__ import annotations

from dataclasses import dataclass

from dit_jax.config import UserError
from dit_jax.methods.plan import DENSE, JOINT, Plan, parse_plan

PRUNED = "pruned"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A plan of the list under its name there.

    steps   its number of steps (None: the request's)
    pruned  the model that it runs on, if not on the one of the command: a checkpoint, or of random weights the share of
            heads and neurons that is pruned
    """

    name: str
    plan: Plan
    steps: int | None
    pruned: str | None = None


def parse_entries(text: str) -> list[Entry]:
    """The entries of a list, dense first; UserError for one that is none or comes twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    entries = [_entry(name) for name in dict.fromkeys([DENSE, *names])]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"--plans names {twice[0]} twice: expected each plan once; remove one")
    return entries


def _entry(name: str) -> Entry:
    first, _, rest = name.partition(JOINT)
    word, _, value = first.partition(":")
    if word == PRUNED:
        if not value:
            raise UserError(f"--plans names {name!r}: expected a model behind pruned:, or a share; write pruned:FOLDER")
        plan = parse_plan(rest or DENSE)
        return Entry(name=name, plan=plan, steps=plan.steps, pruned=value)
    if word == DENSE and value.isdigit():
        return Entry(name=name, plan=Plan(), steps=int(value))
    plan = parse_plan(name)
    return Entry(name=name, plan=plan, steps=plan.steps)
