"""What a pipeline gives, and how it is saved.

Shapes: B samples, F frames, T Y X latent grid, C latent channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infer import media


@dataclass(frozen=True, kw_only=True)
class Result:
    """A pipeline's output: `.frames` uint8, `.latents` fp32 [B, T, Y, X, C], and what made them.

    frames  videos [B, F, H, W, 3], or images [B, H, W, 3]
    """

    frames: np.ndarray
    latents: np.ndarray
    metadata: list[dict[str, Any]]
    fps: int

    def save(self, path: Path | str) -> list[Path]:
        """Writes each video or image; several get `-0`, `-1`, … before the suffix. Returns the files."""
        path = Path(path)
        names = (
            [path] if len(self.frames) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(len(self.frames))]
        )
        for name, frames, metadata in zip(names, self.frames, self.metadata, strict=True):
            media.save(name, frames if frames.ndim == 4 else frames[None], self.fps, metadata)
        return names
