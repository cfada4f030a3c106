"""A file of prompts, one a line."""

from __future__ import annotations

from pathlib import Path

from dit_jax.config import UserError


def read_prompts(file: str) -> list[str]:
    """The prompts, without empty lines; UserError for a file that cannot be read or holds none."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {file!r}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{file!r} holds no prompt: expected one a line")
    return prompts
