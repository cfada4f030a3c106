"""The grammar of the demo's prompts: what a caption of moving digits may say, written and read. Pure Python."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import NoReturn, Protocol

from dit_jax.config import UserError

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
STILL = "standing still"
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "moving up and left",
    "moving up and right",
    "moving down and left",
    "moving down and right",
    STILL,
)
RELATIONS = ("above", "below", "left of", "right of")
BACKGROUNDS = ("plain", "striped", "checkered", "dotted")

GRAMMAR = """\
prompt      one or two digits, then where they stand:
              a COLOUR DIGIT [MOTION] [RELATION a COLOUR DIGIT [MOTION]] [on a BACKGROUND background]
COLOUR      red, green, blue, yellow, purple, white
DIGIT       0 to 9
MOTION      moving left | right | up | down | up and left | up and right | down and left | down and right,
            or standing still (the same as saying nothing)
RELATION    above, below, left of, right of
BACKGROUND  plain (the same as saying nothing), striped, checkered, dotted
examples    a red 7 moving left above a blue 2 on a striped background
            a yellow 4 moving down and right on a dotted background
            a white 0 standing still"""

WORDS = frozenset(" ".join([*COLOURS, *MOTIONS, *RELATIONS, *BACKGROUNDS, "a on background", *"0123456789"]).split())
"""Every word that a prompt may use."""


class RandomSource(Protocol):
    """What both `random.Random` and `numpy.random.Generator` offer: a number in [0, 1)."""

    def random(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Digit:
    """One digit of a scene: its value 0..9, a colour of COLOURS and a motion of MOTIONS."""

    value: int
    colour: str
    motion: str = STILL

    def __post_init__(self) -> None:
        _check("digit", self.value, range(10))
        _check("colour", self.colour, COLOURS)
        _check("motion", self.motion, MOTIONS)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says: one digit, or two and the relation of the first to the second, on a background."""

    digits: tuple[Digit, ...]
    relation: str | None = None
    background: str = "plain"

    def __post_init__(self) -> None:
        _check("number of digits", len(self.digits), (1, 2))
        _check("relation", self.relation, RELATIONS if len(self.digits) == 2 else (None,))
        _check("background", self.background, BACKGROUNDS)


def _check(name: str, found: object, allowed) -> None:
    if found not in allowed:
        raise UserError(f"The {name} of a scene must be one of {', '.join(map(str, allowed))}; found {found!r}.")


def caption(scene: Scene, rng: RandomSource | None = None) -> str:
    """The scene in words.

    What may go unsaid ("standing still", "on a plain background") is said, or with an `rng` left out every second time.
    """

    def said() -> bool:
        return rng is None or rng.random() < 0.5

    phrases = []
    for digit in scene.digits:
        phrase = f"a {digit.colour} {digit.value}"
        if digit.motion != STILL or said():
            phrase += f" {digit.motion}"
        phrases.append(phrase)
    text = phrases[0] if scene.relation is None else f"{phrases[0]} {scene.relation} {phrases[1]}"
    if scene.background != "plain" or said():
        text += f" on a {scene.background} background"
    return text


def _split(prompt: str) -> list[str]:
    return re.findall(r"[^\s,.;:!?]+", prompt.lower())


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that are outside the grammar, once each, in order; case and punctuation do not count."""
    return list(dict.fromkeys(word for word in _split(prompt) if word not in WORDS))


def parse(prompt: str) -> Scene:
    """The scene that a caption describes; the inverse of `caption`, said or unsaid.

    Raises UserError naming the word that is outside the grammar, or that stands where another kind of word is expected.
    """
    unknown = unknown_words(prompt)
    if unknown:
        raise UserError(
            f"{unknown[0]!r} in the prompt {prompt!r} is outside the grammar of moving digits; say for example "
            "'a red 7 moving left above a blue 2 on a striped background'."
        )
    return _Reader(prompt).scene()


class _Reader:
    """Reads one prompt from left to right."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.words = _split(prompt)
        self.place = 0

    def scene(self) -> Scene:
        digits = [self._digit()]
        relation = self._any_of(RELATIONS)
        if relation:
            digits.append(self._digit())
        background = "plain"
        if self._skip("on"):
            self._need("'a'", ["a"])
            background = self._need("a background", BACKGROUNDS)
            self._need("'background'", ["background"])
        if self.place < len(self.words):
            self._fail("the end of the prompt" if background != "plain" or relation else "a relation or a background")
        return Scene(digits=tuple(digits), relation=relation, background=background)

    def _digit(self) -> Digit:
        self._need("'a'", ["a"])
        colour = self._need("a colour", COLOURS)
        value = int(self._need("a digit 0-9", [str(value) for value in range(10)]))
        motion = self._any_of(MOTIONS)
        if motion is None and self.place < len(self.words) and self.words[self.place] in ("moving", "standing"):
            self.place += 1
            self._fail("a direction" if self.words[self.place - 1] == "moving" else "'still'")
        return Digit(value=value, colour=colour, motion=motion or STILL)

    def _any_of(self, phrases: tuple[str, ...]) -> str | None:
        # Longest first: "moving up and left" before "moving up".
        for phrase in sorted(phrases, key=lambda text: -len(text.split())):
            words = phrase.split()
            if self.words[self.place : self.place + len(words)] == words:
                self.place += len(words)
                return phrase
        return None

    def _skip(self, word: str) -> bool:
        return self._any_of((word,)) is not None

    def _need(self, kind: str, choices) -> str:
        found = self._any_of(tuple(choices))
        if found is None:
            self._fail(kind)
        return found

    def _fail(self, expected: str) -> NoReturn:
        found = repr(self.words[self.place]) if self.place < len(self.words) else "the end"
        raise UserError(
            f"The prompt {self.prompt!r} has {found} at word {self.place + 1} where {expected} is expected."
        )


def random_scene(rng: RandomSource) -> Scene:
    """A scene drawn uniformly from the whole grammar: one digit or two, then every word, with equal chance."""

    def pick(choices):
        return choices[int(rng.random() * len(choices))]

    digits = tuple(
        Digit(value=pick(range(10)), colour=pick(COLOURS), motion=pick(MOTIONS)) for _ in range(pick((1, 2)))
    )
    relation = pick(RELATIONS) if len(digits) == 2 else None
    return Scene(digits=digits, relation=relation, background=pick(BACKGROUNDS))


def all_captions_sample(count: int, seed: int) -> list[str]:
    """`count` captions of random scenes: a corpus on which a tokenizer sees every word."""
    rng = random.Random(seed)
    return [caption(random_scene(rng), rng) for _ in range(count)]
