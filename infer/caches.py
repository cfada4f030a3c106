"""Where the commands keep what may be made again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder under `$XDG_CACHE_HOME/dit-jax` (`~/.cache/dit-jax`), made if need be; OSError where it cannot be."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise FileNotFoundError("there is no home folder") from error
    folder = caches / "dit-jax" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep_compiled_programs() -> None:
    """Turns jax's compilation cache on; where its folder cannot be made, says so and goes without."""
    import jax

    try:
        folder = cache_folder("programs")
    except OSError as error:
        print(f"warning: compiled programs are not kept: {error}; set XDG_CACHE_HOME", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
