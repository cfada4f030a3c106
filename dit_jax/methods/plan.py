"""Plans: which methods a run uses with which settings, as one string, `hsa:50` or `coredit:ratios.json+teacache:0.1`.

A plan is frozen and hashable. What cannot work together is refused when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dit_jax.config import UserError
from dit_jax.methods.coredit import parse_coredit
from dit_jax.methods.hsa import parse_hsa
from dit_jax.methods.method import Choosy, Method, Part, Run, Words
from dit_jax.methods.routing import parse_routing

DENSE = "dense"
JOINT = "+"

# Name -> how its words are read. The order is the one in which methods are applied to a denoiser.
METHODS: dict[str, Callable[[Words], Method]] = {
    "routing": parse_routing,
    "coredit": parse_coredit,
    "hsa": parse_hsa,
}

# Pairs that refuse each other, and what to do instead.
REFUSED: dict[frozenset[str], str] = {
    frozenset({"coredit", "hsa"}): "both choose which tokens attention runs for; leave one of them out",
    frozenset({"hsa", "routing"}): "a block that is skipped would leave old keys and values in HSA's cache; use one",
}


@dataclass(frozen=True)
class Plan:
    """Methods of a run in the order in which they are applied; none is the plain model."""

    methods: tuple[Method, ...] = ()
    text: str = DENSE

    def __str__(self) -> str:
        return self.text

    @property
    def solver(self) -> str | None:
        """The only solver that its methods work with, or None."""
        return next((method.solver for method in self.methods if method.solver), None)

    @property
    def steps(self) -> int | None:
        """The only number of steps that its methods are for, or None."""
        return next((method.steps for method in self.methods if method.steps), None)

    def check(self, stacks: tuple[int, ...], parts: Mapping[str, Part]) -> None:
        """UserError where a method cannot serve a model with these blocks and these parts for methods."""
        for method in self.methods:
            if isinstance(method, Choosy):
                method.check(stacks, parts)

    def applied(self, denoiser: Any, run: Run) -> Any:
        """The denoiser with every method applied."""
        for method in self.methods:
            denoiser = method.applied(denoiser, run)
        return denoiser


def parse_plan(text: str) -> Plan:
    """A plan from its string; UserError for words that are none and for methods that refuse each other."""
    parts = [part.strip() for part in text.split(JOINT)]
    if parts == [DENSE]:
        return Plan()
    methods: dict[str, Method] = {}
    for part in parts:
        words = Words(part)
        if words.name not in METHODS:
            known = ", ".join([DENSE, *METHODS])
            raise UserError(f"plan {text!r} names {words.name!r}: expected methods of {known}; write them joined by +")
        if words.name in methods:
            raise UserError(f"plan {text!r} names {words.name} twice: expected each method once; remove one")
        methods[words.name] = METHODS[words.name](words)
    for pair, remedy in REFUSED.items():
        if pair <= set(methods):
            one, other = sorted(pair)
            raise UserError(f"{one} and {other} cannot share a plan: {remedy}")
    return Plan(tuple(methods[name] for name in METHODS if name in methods), JOINT.join(parts))
