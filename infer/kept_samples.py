"""Generated samples kept in a folder, so that a long evaluation goes on where it stopped and others compare with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class KeptSamples:
    """Samples uint8 by number under `folder`, in a folder of their own for these settings.

    settings  whatever decides what the samples are; JSON, written beside them as settings.json
    name      of them in the folder's name, for readers
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]):
        text = json.dumps(settings, indent=1, sort_keys=True)
        readable = re.sub(r"[^\w.-]+", "-", name).strip("-")[:80]
        self.folder = folder / f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "settings.json").write_text(text + "\n", encoding="utf-8")

    def read(self, number: int) -> np.ndarray | None:
        """A sample that is there, or None."""
        file = self._file(number)
        return np.load(file) if file.exists() else None

    def write(self, number: int, sample: np.ndarray) -> None:
        """Keeps a sample; never half of one."""
        unfinished = self.folder / f"{number:05d}.{os.getpid()}.partial"
        with unfinished.open("wb") as stream:
            np.save(stream, sample)
        unfinished.rename(self._file(number))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.npy"
