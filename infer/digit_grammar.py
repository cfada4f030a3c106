"""The grammar of the demo models' prompts: what a caption of digits may say, written and read. Pure Python."""

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


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What a model's prompts may say: `text` explains it to people, `words` are all that it knows."""

    text: str
    words: frozenset[str]


def _words(*phrases: str) -> frozenset[str]:
    return frozenset(" ".join([*COLOURS, *RELATIONS, *BACKGROUNDS, "a on background", *phrases]).split())


MOVING = Grammar(
    text="""\
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
            a white 0 standing still""",
    words=_words(*MOTIONS, *"0123456789"),
)
PICTURES = Grammar(
    text="""\
prompt      one or two kinds of digits, then where they stand:
              OBJECTS [RELATION OBJECTS] [on a BACKGROUND background]
OBJECTS     a COLOUR DIGIT, or two COLOUR DIGITs
COLOUR, DIGIT, RELATION and BACKGROUND as above
examples    a red 7
            two purple 0s on a checkered background
            two green 4s left of a white 9 on a striped background""",
    words=_words("two", *"0123456789", *(f"{value}s" for value in range(10))),
)
GRAMMARS = {"moving-digits": MOVING, "digits": PICTURES}
"""By the name of the suite of `dit-eval` that scores a model of these prompts."""


class RandomSource(Protocol):
    """What both `random.Random` and `numpy.random.Generator` offer: a number in [0, 1)."""

    def random(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Digit:
    """One digit of a scene: its value 0..9, a colour of COLOURS and a motion of MOTIONS; a picture may have two."""

    value: int
    colour: str
    motion: str = STILL
    count: int = 1

    def __post_init__(self) -> None:
        _check("count", self.count, (1, 2))
        _check("digit", self.value, range(10))
        _check("colour", self.colour, COLOURS)
        _check("motion", self.motion, MOTIONS)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says: one kind of digit, or two and the relation of the first to the second, on a background."""

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


def caption(scene: Scene, rng: RandomSource | None = None, *, of_picture: bool = False) -> str:
    """The scene in words.

    What may go unsaid ("standing still", "on a plain background") is said, or with an `rng` left out every second time;
    of a picture nobody says that a digit stands still.
    """

    def said() -> bool:
        return rng is None or rng.random() < 0.5

    phrases = []
    for digit in scene.digits:
        phrase = f"a {digit.colour} {digit.value}" if digit.count == 1 else f"two {digit.colour} {digit.value}s"
        if digit.motion != STILL or (not of_picture and said()):
            phrase += f" {digit.motion}"
        phrases.append(phrase)
    text = phrases[0] if scene.relation is None else f"{phrases[0]} {scene.relation} {phrases[1]}"
    if scene.background != "plain" or said():
        text += f" on a {scene.background} background"
    return text


def _split(prompt: str) -> list[str]:
    return re.findall(r"[^\s,.;:!?]+", prompt.lower())


def unknown_words(prompt: str, grammar: Grammar) -> list[str]:
    """The words of a prompt that are outside the grammar, once each, in order; case and punctuation do not count."""
    return list(dict.fromkeys(word for word in _split(prompt) if word not in grammar.words))


def parse(prompt: str) -> Scene:
    """The scene that a caption describes; the inverse of `caption`, said or unsaid.

    Raises UserError naming the word that is outside the grammar, or that stands where another kind of word is expected.
    """
    unknown = [word for word in _split(prompt) if not any(word in grammar.words for grammar in GRAMMARS.values())]
    if unknown:
        raise UserError(
            f"{unknown[0]!r} in the prompt {prompt!r} is outside the grammar of digits; say for example "
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
        count = 1 if self._need("'a' or 'two'", ["a", "two"]) == "a" else 2
        colour = self._need("a colour", COLOURS)
        ending = "" if count == 1 else "s"
        value = int(self._need(f"a digit 0{ending} to 9{ending}", [f"{value}{ending}" for value in range(10)])[0])
        motion = self._any_of(MOTIONS)
        if motion is None and self.place < len(self.words) and self.words[self.place] in ("moving", "standing"):
            self.place += 1
            self._fail("a direction" if self.words[self.place - 1] == "moving" else "'still'")
        return Digit(value=value, colour=colour, motion=motion or STILL, count=count)

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
    """A scene of moving digits drawn uniformly from the whole grammar: one digit or two, then every word."""
    digits = tuple(
        Digit(value=_pick(rng, range(10)), colour=_pick(rng, COLOURS), motion=_pick(rng, MOTIONS))
        for _ in range(_pick(rng, (1, 2)))
    )
    return _on_background(digits, rng)


def random_picture(rng: RandomSource) -> Scene:
    """A scene of standing digits drawn uniformly from the whole grammar: one kind or two, one or two of each."""
    digits = tuple(
        Digit(value=_pick(rng, range(10)), colour=_pick(rng, COLOURS), count=_pick(rng, (1, 2)))
        for _ in range(_pick(rng, (1, 2)))
    )
    return _on_background(digits, rng)


def _pick(rng: RandomSource, choices):
    return choices[int(rng.random() * len(choices))]


def _on_background(digits: tuple[Digit, ...], rng: RandomSource) -> Scene:
    relation = _pick(rng, RELATIONS) if len(digits) == 2 else None
    return Scene(digits=digits, relation=relation, background=_pick(rng, BACKGROUNDS))


def all_captions_sample(count: int, seed: int) -> list[str]:
    """`count` captions of random scenes of moving digits: a corpus on which a tokenizer sees every word."""
    rng = random.Random(seed)
    return [caption(random_scene(rng), rng) for _ in range(count)]


def all_picture_captions_sample(count: int, seed: int) -> list[str]:
    """`count` captions of random pictures: a corpus on which a tokenizer sees every word."""
    rng = random.Random(seed)
    return [caption(random_picture(rng), rng, of_picture=True) for _ in range(count)]
