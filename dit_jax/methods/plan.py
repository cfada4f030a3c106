"""Plans: which methods a run uses with which settings, as one string, `hsa:50` or `coredit:ratios.json+teacache:0.1`.

A plan is frozen and hashable. What cannot work together is refused when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dit_jax.config import UserError
from dit_jax.methods.coredit import parse_coredit
from dit_jax.methods.ddit import parse_ddit
from dit_jax.methods.hsa import parse_hsa
from dit_jax.methods.magcache import parse_magcache
from dit_jax.methods.method import Chooser, Choosy, Method, Part, Run, Told, Words
from dit_jax.methods.routing import parse_routing
from dit_jax.methods.taylorseer import parse_taylorseer
from dit_jax.methods.teacache import parse_teacache

DENSE = "dense"
JOINT = "+"

# Name -> how its words are read. The order is the one in which methods are applied to a denoiser.
METHODS: dict[str, Callable[[Words], Method]] = {
    "ddit": parse_ddit,  # before all that count or place tokens
    "teacache": parse_teacache,
    "magcache": parse_magcache,
    "taylorseer": parse_taylorseer,
    "routing": parse_routing,
    "coredit": parse_coredit,
    "hsa": parse_hsa,
}

# Pairs that refuse each other, and what to do instead.
REFUSED: dict[frozenset[str], str] = {
    frozenset({"teacache", "hsa"}): "tokens that HSA does not refresh have no residual of this step; use one of them",
    frozenset({"magcache", "hsa"}): "tokens that HSA does not refresh have no residual of this step; use one of them",
    frozenset({"magcache", "teacache"}): "both decide which steps reuse the trunk's residual; use one of them",
    **{
        frozenset({"taylorseer", other}): "TaylorSeer predicts the outputs that the other would change; use one of them"
        for other in ("routing", "coredit", "hsa", "ddit", "teacache", "magcache")
    },
    frozenset({"coredit", "hsa"}): "both choose which tokens attention runs for; leave one of them out",
    frozenset({"hsa", "routing"}): "a block that is skipped would leave old keys and values in HSA's cache; use one",
    frozenset({"ddit", "hsa"}): "keys and values that HSA keeps are of the tokens of one patch size; leave out one",
}

# Methods that live on steps being alike, and the most steps of a run in which they are not.
NEED_MANY_STEPS = ("hsa", "ddit", "teacache", "magcache")
FEW_STEPS = 8


@dataclass(frozen=True)
class Plan:
    """Methods of a run in the order in which they are applied; none is the plain model.

    text  what the plan is called wherever it is told; `parse_plan` makes both of it
    UserError for methods that refuse each other or are for other numbers of steps, and for methods without a text.
    """

    methods: tuple[Method, ...] = ()
    text: str = DENSE

    def __post_init__(self):
        names = {method.name for method in self.methods}
        if names and self.text == DENSE:
            raise UserError(
                f"a plan of {', '.join(sorted(names))} is called {DENSE}: expected the words that say what it does; "
                "make it with parse_plan"
            )
        for pair, remedy in REFUSED.items():
            if pair <= names:
                one, other = sorted(pair)
                raise UserError(f"{one} and {other} cannot share a plan: {remedy}")
        counted = [method for method in self.methods if method.steps]
        for method in counted:
            if method.steps != self.steps:
                raise UserError(
                    f"{counted[0].name} is for {self.steps} steps and {method.name} for {method.steps}: expected files "
                    "of one number of steps; calibrate one of them again"
                )

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

    @property
    def chooser(self) -> Chooser | None:
        """The method that chooses among variants of the denoiser between steps, or None."""
        return next((method for method in self.methods if isinstance(method, Chooser)), None)

    def pointless(self, steps: int) -> list[str]:
        """Methods with nothing to gain in a run of so few steps."""
        return [method.name for method in self.methods if method.name in NEED_MANY_STEPS and steps <= FEW_STEPS]

    def told(self, parts: Mapping[str, Part]) -> Plan:
        """The plan with the checkpoint's own settings where it leaves them to that; UserError where there are none."""
        methods = (method.told(parts) if isinstance(method, Told) else method for method in self.methods)
        return replace(self, methods=tuple(methods))

    def check(self, stacks: tuple[int, ...], parts: Mapping[str, Part]) -> None:
        """UserError where a method cannot serve a model with these blocks and these parts for methods."""
        for method in self.told(parts).methods:
            if isinstance(method, Choosy):
                method.check(stacks, parts)

    def applied(self, denoiser: Any, run: Run) -> Any:
        """The denoiser with every method applied."""
        for method in self.told(run.parts).methods:
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
    return Plan(tuple(methods[name] for name in METHODS if name in methods), JOINT.join(parts))
