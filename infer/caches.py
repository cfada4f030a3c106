"""Where the commands keep what may be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder under `$XDG_CACHE_HOME/dit-jax` (`~/.cache/dit-jax`), made if need be."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-jax" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
