"""`dit-train RECIPE [--set name=value]...`: runs a recipe, a Python file with a `Config` and a `run(config)`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import errno
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dit_jax.config import UserError
from train.hosts import join
from train.loop import Outcome, TrainingDivergedError

RECIPES = Path(__file__).parent / "recipes"
FULL = "full"  # the variant that a recipe's defaults are
USAGE = "dit-train RECIPE [--set name=value]... | dit-train RECIPE --help"


def main(arguments: list[str] | None = None) -> int:
    """Runs a recipe; 0 when it ended or was stopped by SIGTERM (or its `stopped_code`), 2 for bad input and a disk that
    is full, 3 when training diverged.

    As a command it joins the other processes of the run; who calls it with arguments has done so.
    """
    try:
        return _main(sys.argv[1:] if arguments is None else arguments, join_others=arguments is None)
    except UserError as error:
        print(f"dit-train: {error}", file=sys.stderr)
        return 2
    except TrainingDivergedError as error:
        print(f"dit-train: {error}", file=sys.stderr)
        return 3


def _main(arguments: list[str], *, join_others: bool) -> int:
    parser = argparse.ArgumentParser("dit-train", usage=USAGE, add_help=False)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--set", action="append", default=[], metavar="name=value", dest="settings")
    parser.add_argument("-h", "--help", action="store_true")
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(f"Unknown argument {unknown[0]!r}; expected {USAGE}.")
    if known.recipe is None:
        if not known.help:
            raise UserError(f"No recipe is named; expected {USAGE}, with one of {', '.join(_shipped())}.")
        print(f"usage: {USAGE}\n\nshipped recipes: {', '.join(_shipped())}")
        return 0
    recipe = load_recipe(known.recipe)
    if known.help:
        print(describe(recipe))
        return 0
    config = configure(recipe.Config, known.settings, getattr(recipe, "VARIANTS", {}))
    if join_others:
        join()
    keep_programs()
    try:
        outcome = recipe.run(config)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{error.filename or config.out} could not be written ({error.strerror}): the newest whole checkpoint "
            "stays; make room and run the same command again"
        ) from error
    stopped = isinstance(outcome, Outcome) and outcome.stopped
    return config.stopped_code if stopped else 0


def keep_programs() -> None:
    """Keeps compiled programs under runs/cache: a run that is resumed compiles nothing again."""
    jax.config.update("jax_compilation_cache_dir", str(Path("runs/cache/programs").resolve()))


def load_recipe(name: str) -> types.ModuleType:
    """The module of a recipe: a path to a Python file, or the name of a shipped one."""
    path = Path(name)
    if not path.suffix and not path.exists():
        path = RECIPES / f"{name}.py"
    if path.suffix != ".py" or not path.is_file():
        close = difflib.get_close_matches(path.stem, _shipped(), 1, 0.0)
        known = ", ".join(_shipped())
        raise UserError(f"There is no recipe {name!r}; expected a file or one of {known}; did you mean {close[0]}?")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "Config") or not hasattr(module, "run"):
        raise UserError(f"{path} is no recipe: expected a dataclass `Config` and a function `run(config)`.")
    return module


def describe(recipe: types.ModuleType) -> str:
    """A recipe's docstring and its options: what they are, their types and defaults."""
    lines = [(recipe.__doc__ or "").strip(), ""]
    for each in recipe.Config.__mro__[:-1]:
        if not (each.__doc__ or "").startswith(f"{each.__name__}("):  # as dataclasses have where they say nothing
            lines += [inspect.cleandoc(each.__doc__ or ""), ""]
    lines.append("options (--set name=value):")
    hints = typing.get_type_hints(recipe.Config)
    for field in dataclasses.fields(recipe.Config):
        kind = getattr(hints[field.name], "__name__", None) or str(hints[field.name])
        told = f"default {getattr(recipe.Config(), field.name)!r}"
        for variant, settings in getattr(recipe, "VARIANTS", {}).items():
            if field.name in settings:
                told += f", {variant} {settings[field.name]!r}"
        lines.append(f"  {field.name:20} {kind:8} {told}")
    return "\n".join(lines)


def configure(config_class, settings: list[str], variants: Mapping[str, Mapping[str, Any]] | None = None):
    """A config with `name=value` settings; `variant=NAME` begins with the recipe's settings of that name.

    Raises UserError for an unknown name or a value of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(config_class)]
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set takes name=value, found {setting!r}.")
        if name not in names:
            close = difflib.get_close_matches(name, names, 1, 0.0)[0]
            raise UserError(f"There is no option {name!r}; did you mean {close!r}? Options: {', '.join(names)}.")
        values[name] = _parse(name, text, hints[name])
    chosen = values.get("variant", FULL)
    if chosen != FULL and chosen not in (variants or {}):
        known = ", ".join((FULL, *(variants or {})))
        raise UserError(f"There is no variant {chosen!r} of this recipe; expected one of {known}.")
    return config_class(**{**(variants or {}).get(chosen, {}), **values})


def _parse(name: str, text: str, kind):
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if str in options:
        return None if text == "None" and type(None) in options else text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if float in options and type(value) is int:
        value = float(value)
    kinds = tuple(typing.get_origin(option) or option for option in options)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
        raise UserError(f"The option {name} takes {wanted}, found {text!r}.")
    return value


def _shipped() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "__init__")


if __name__ == "__main__":
    sys.exit(main())
