"""The entries of `dit-bench --plans`: plans, with a number of steps of their own, and on other models."""

from __future__ import annotations

from dataclasses import dataclass

from dit_jax.config import UserError
from dit_jax.methods.plan import DENSE, JOINT, Plan, parse_plan
from dit_jax.methods.pruning import check_ratio

ON, PRUNED = "on", "pruned"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A plan of the list under its name there.

    steps   its number of steps (None: the request's)
    on      the checkpoint that it runs on, if not the command's
    pruned  of random weights: the share of heads and neurons that they lack
    """

    name: str
    plan: Plan
    steps: int | None
    on: str | None = None
    pruned: float = 0.0


def parse_entries(text: str) -> list[Entry]:
    """The entries of a list, dense first; UserError for one that is none or comes twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    entries = [_entry(name) for name in dict.fromkeys([DENSE, *names])]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"--plans names {twice[0]} twice: expected each plan once; remove one")
    return entries


def _entry(name: str) -> Entry:
    on, pruned, steps, rest = None, 0.0, None, name
    while rest:
        first, _, others = rest.partition(JOINT)
        word, _, value = first.partition(":")
        if word == ON:
            on = _model(value)
        elif word == PRUNED:
            pruned = _share(value)
        elif word == DENSE and value.isdigit():
            steps = int(value)
        else:
            break
        rest = others
    plan = parse_plan(rest or DENSE)
    if steps is not None and plan.steps not in (None, steps):
        raise UserError(f"--plans names {name}, whose plan has {plan.steps} steps of its own: remove {DENSE}:{steps}")
    return Entry(name=name, plan=plan, steps=plan.steps if steps is None else steps, on=on, pruned=pruned)


def _model(text: str) -> str:
    if not text:
        raise UserError("--plans names on: without a model: expected a checkpoint behind it; write on:FOLDER")
    return text


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        raise UserError(f"--plans names pruned:{text}: expected a share behind pruned:; write pruned:0.3") from None
    check_ratio("the share of pruned:", share)
    return share
