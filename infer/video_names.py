"""Names of videos as VBench (arXiv 2311.17982) and VBench-2.0 (arXiv 2503.21755) look for them: `{prompt}-{index}.mp4`,
all in one folder; the second cuts the prompt to 180 characters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dit_jax.config import UserError

# Whose names -> how many characters of the prompt they keep (None: all).
NAMES: dict[str, int | None] = {"vbench": None, "vbench2": 180}
LONGEST = 255  # bytes of a file name, on the usual file systems


def prompts_by_name(kind: str, titles: Sequence[str], prompts: Sequence[str], samples: int) -> dict[str, str]:
    """What the videos of each prompt are called -> the prompt; one that comes twice is there once.

    titles  what each prompt's videos are named after: the prompt itself, or the one of VBench's that it stands for
    UserError for a title that no file can be named after, and for two prompts whose videos would have one name.
    """
    if len(titles) != len(prompts):
        raise UserError(
            f"--names-from has {len(titles)} lines for {len(prompts)} prompts: expected one for each; mend one file"
        )
    named: dict[str, str] = {}
    for title, prompt in zip(titles, prompts, strict=True):
        name = title[: NAMES[kind]]
        _check_name(name, title, samples)
        if named.setdefault(name, prompt) != prompt:
            raise UserError(
                f"videos of {named[name]!r} and of {prompt!r} would have one name, {name!r}: expected prompts to "
                "differ there; change or remove one"
            )
    return named


def video_paths(folder: Path, names: Sequence[str], samples: int) -> list[Path]:
    """The files of all samples, those of a prompt next to each other."""
    return [folder / f"{name}-{index}.mp4" for name in names for index in range(samples)]


def _check_name(name: str, title: str, samples: int) -> None:
    if "/" in name or "\0" in name:
        raise UserError(
            f"no file can be named after {title!r}: expected a prompt without '/', which VBench would not find either; "
            "change or remove it"
        )
    if len(f"{name}-{samples - 1}.mp4".encode()) > LONGEST:
        raise UserError(
            f"videos of {title!r} would have too long a name: expected at most {LONGEST} bytes with number and .mp4; "
            "shorten the prompt, or choose --names vbench2, which cuts it to 180 characters"
        )
