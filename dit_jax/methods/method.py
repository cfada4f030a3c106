"""What a method is to a plan, and how its settings are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax

from dit_jax.config import UserError
from dit_jax.flops import Config, Shape, StepAt, StepWork


class Part(NamedTuple):
    """What a checkpoint holds for a method: its config.json, and arrays by dotted path."""

    settings: Mapping[str, Any]
    leaves: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a method may know of the run that it is applied to.

    latents_shape  [B, T, Y, X, C]
    first, stop    steps that the denoiser at hand serves, of `steps` in all
    sigmas         noise levels of the whole run [S + 1]
    parts          what the checkpoint's `methods` folder holds for this transformer: name -> Part
    component      the transformer that the denoiser runs: `transformer`, or `transformer_2` of two experts
    variant        which of its chooser's variants the denoiser is to be, where the plan has one
    """

    latents_shape: tuple[int, ...]
    first: int
    stop: int
    steps: int
    sigmas: Any
    parts: Mapping[str, Part] = field(default_factory=dict)
    component: str = "transformer"
    variant: int = 1


class RunRecord(NamedTuple):
    """What a run has shown.

    steps     of the sampler
    states    the last state of each denoiser that ran, in order, with None in place of its arrays
    variants  of every step, where latents choose them
    """

    steps: int
    states: list[Any]
    variants: list[int]


class Method(Protocol):
    """One method of a plan with its settings: a frozen, hashable dataclass.

    name     in plans, and in what is refused
    solver   the only one that it works with, or None
    steps    the only number of steps that it is for, or None
    applied  a denoiser that uses it, from one that does not

    and what it costs (`dit_jax/flops.py`):

    step_work   what it leaves of the work of a step, or makes of it
    kept_bytes  what it keeps from step to step
    """

    name: ClassVar[str]

    @property
    def solver(self) -> str | None: ...
    @property
    def steps(self) -> int | None: ...
    def applied(self, denoiser: Any, run: Run) -> Any: ...
    def step_work(self, work: StepWork, at: StepAt) -> StepWork: ...
    def kept_bytes(self, config: Config, shape: Shape) -> int: ...


@runtime_checkable
class Choosy(Protocol):
    """A method that not every model can serve: `check` raises UserError for one, told the blocks of its stacks and what
    its checkpoint holds for methods, before anything runs."""

    def check(self, stacks: tuple[int, ...], parts: Mapping[str, Part]) -> None: ...


@runtime_checkable
class Told(Protocol):
    """A method some of whose settings may be the checkpoint's own: `told` puts them where the plan has none; UserError
    where the checkpoint has none either."""

    def told(self, parts: Mapping[str, Part]) -> Method: ...


@runtime_checkable
class Measured(Protocol):
    """A method whose cost only a run tells: `measured(record)` is what `step_work` is told of each step [S]."""

    def measured(self, record: RunRecord) -> Sequence[float]: ...


class Scheduler(Protocol):
    """Chooses a variant before every step: scheduler(history, latents) -> (history, index of the variant [B], what it
    was chosen by). `init` makes the history of no steps; a pytree."""

    def init(self, latents: jax.Array) -> Any: ...
    def __call__(self, history: Any, latents: jax.Array) -> tuple[Any, jax.Array, jax.Array]: ...


@runtime_checkable
class Chooser(Protocol):
    """A method whose denoiser has variants, each with a program of its own, of which a run uses one at a time.

    variants    all that a run may use; `applied` is told one as `run.variant`
    breaks      the steps of so many before which the variant may change; UserError if they do not fit
    scheduled   the variant of a step, where latents have no say
    scheduler   what chooses by the latents of a sample, for this plain denoiser; None where they have no say
    """

    @property
    def variants(self) -> tuple[int, ...]: ...
    @property
    def by_latents(self) -> bool: ...
    def breaks(self, steps: int) -> tuple[int, ...]: ...
    def scheduled(self, step: int) -> int: ...
    def scheduler(self, denoiser: Any) -> Scheduler: ...


class Words:
    """The words of one method in a plan, `name:first:option=value:…`, taken one by one; UserError for one that is not
    expected."""

    def __init__(self, text: str):
        self.text = text
        self.name, *rest = text.split(":")
        self.options = dict(word.split("=", 1) for word in rest if "=" in word)
        plain = [word for word in rest if "=" not in word]
        self.first = plain[0] if plain else None
        self._unknown = plain[1:]

    def option(self, name: str) -> str | None:
        """The value of `name=value`, None if it is not there."""
        return self.options.pop(name, None)

    def flag(self, name: str) -> bool:
        """Whether the word stands behind the first."""
        found = name in self._unknown
        self._unknown = [word for word in self._unknown if word != name]
        return found

    def choice(self, name: str, usual: str, known: Sequence[str]) -> Any:
        """An option that is one of `known`."""
        value = self.options.pop(name, usual)
        if value not in known:
            raise self.error(f"expected {name} to be one of {', '.join(known)}, found {value!r}", "choose one")
        return value

    def number(self, name: str, usual: float, *, low: float, high: float) -> float:
        """An option that is a number in [low, high]; `first` names the word without a name."""
        text = self.options.pop(name, None)
        return usual if text is None else self.as_number(name, text, low=low, high=high)

    def whole(self, name: str, usual: int, *, low: int, high: int) -> int:
        """An option that is a whole number in [low, high]."""
        text = self.options.pop(name, None)
        value = usual if text is None else self.as_number(name, text, low=low, high=high)
        if value != int(value):
            raise self.error(f"expected {name} to be a whole number, found {text!r}", "change it")
        return int(value)

    def as_number(self, name: str, text: str, *, low: float, high: float) -> float:
        """`text` as a number in [low, high]."""
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise self.error(f"expected {name} from {low:g} to {high:g}, found {text!r}", "change it")
        return value

    def finish(self) -> None:
        """UserError if a word has not been taken."""
        for word in [*self._unknown, *self.options]:
            raise self.error(f"found {word!r}, which {self.name} does not know", "remove it")

    def error(self, found: str, remedy: str) -> UserError:
        """One sentence about this method's words."""
        return UserError(f"plan {self.text!r}: {found}; {remedy}")
