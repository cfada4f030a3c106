"""Training data made from moving digits: crops of clips, and a cache on disk of latents and captions.

Shapes: B batch, T frames (or latent frames), Y X pixels or latent grid, S side of a crop, C channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.progress import progress_bar
from dit_jax.parameters import named_leaves
from infer.digit_pictures import make_pictures
from infer.moving_digits import ClipSpec, make_clips

SHARD = 128  # clips a file of the cache
BRIGHT = 110  # digits are brighter than this in some colour, backgrounds are not


@dataclass(frozen=True, kw_only=True)
class CropSettings:
    """Crops of `frames` frames and `side` pixels; a share of them is centred near a digit."""

    frames: int
    side: int
    batch: int
    on_digits: float = 0.8


def clip_pool(seed: int, count: int, split: str = "train") -> np.ndarray:
    """`count` clips of the split, uint8 [N, 17, 128, 128, 3]."""
    return np.concatenate([make_clips(seed, range(i, min(i + 16, count)), split)[0] for i in range(0, count, 16)])


def random_crops(pool: np.ndarray, settings: CropSettings, seed: int, position: int) -> np.ndarray:
    """Batch `position` of crops, uint8 [B, T, S, S, 3]; depends on the seed and the position alone."""
    rng = np.random.default_rng([seed, position])
    return np.stack([_crop(pool[rng.integers(len(pool))], settings, rng) for _ in range(settings.batch)])


def _crop(clip: np.ndarray, settings: CropSettings, rng: np.random.Generator) -> np.ndarray:
    start = rng.integers(clip.shape[0] - settings.frames + 1)
    frames = clip[start : start + settings.frames]
    room = clip.shape[1] - settings.side
    corner = rng.integers(0, room + 1, 2)
    if rng.random() < settings.on_digits:
        bright = np.argwhere(frames[len(frames) // 2].max(-1) > BRIGHT)
        if len(bright):
            centre = bright[rng.integers(len(bright))] + rng.integers(-settings.side // 3, settings.side // 3 + 1, 2)
            corner = np.clip(centre - settings.side // 2, 0, room)
    y, x = corner
    return frames[:, y : y + settings.side, x : x + settings.side]


Maker = Callable[[range], tuple[np.ndarray, list[str]]]  # indices -> clips uint8 [B, T, Y, X, 3], captions


@dataclass(frozen=True, kw_only=True)
class LatentSource:
    """Examples to encode `group` at a time and to keep under `folder`; example i of `make` depends on i alone."""

    folder: Path
    make: Maker
    group: int = 32


def clip_maker(seed: int, frames: int, split: str = "train") -> Maker:
    """Clips of moving digits; a lone frame is a clip's first, not the middle one that a still shows."""

    def make(indices: range) -> tuple[np.ndarray, list[str]]:
        clips, captions, _ = make_clips(seed, indices, split, ClipSpec(frames=max(2, frames)))
        return clips[:, :frames], captions

    return make


def picture_maker(seed: int, size: int, split: str = "train") -> Maker:
    """Pictures of standing digits as clips of one frame."""

    def make(indices: range) -> tuple[np.ndarray, list[str]]:
        pictures, captions, _ = make_pictures(seed, indices, split, size)
        return pictures[:, None], captions

    return make


def weights_hash(model) -> str:
    """Names a cache after the model whose output it keeps: ten hex digits of its config and weights."""
    digest = hashlib.sha256(repr(dataclasses.asdict(model.config)).encode())
    for name, leaf in named_leaves(model):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:10]


@dataclass(frozen=True)
class LatentSet:
    """Latents fp16 [N, T, Y, X, C], normalised, and a caption for each."""

    latents: np.ndarray
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def indices(self, size: int, seed: int, position: int) -> list[int]:
        """Batch `position` of pass after pass through the set, each in its own order."""
        return [self._pick(seed, position * size + row) for row in range(size)]

    def _pick(self, seed: int, index: int) -> int:
        epoch, place = divmod(index, len(self))
        return int(_order(seed, epoch, len(self))[place])


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, epoch, count)
    if key not in _orders:
        if len(_orders) > 8:
            _orders.clear()
        _orders[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _orders[key]


def cached_latents(source: LatentSource, count: int, encode: Callable[[np.ndarray], np.ndarray]) -> LatentSet:
    """The first `count` examples of a source as `encode` (of uint8 [B, T, Y, X, 3]) makes them, kept by shards."""
    source.folder.mkdir(parents=True, exist_ok=True)
    latents, captions = [], []
    files = {start: source.folder / f"{start:07d}.npz" for start in range(0, count, SHARD)}
    missing = [start for start, file in files.items() if not file.exists()]
    name = f"encoding {source.folder.name}"
    for start in progress_bar(missing, desc=name, unit="shard", disable=not missing, mininterval=5.0):
        _write_shard(source, start, files[start], encode)
    for file in files.values():
        with np.load(file) as shard:
            latents.append(shard["latents"])
            captions += json.loads(str(shard["captions"]))
    return LatentSet(np.concatenate(latents)[:count], captions[:count])


def _write_shard(source: LatentSource, start: int, file: Path, encode: Callable[[np.ndarray], np.ndarray]) -> None:
    latents, captions = [], []
    for first in range(start, start + SHARD, source.group):
        examples, texts = source.make(range(first, first + source.group))
        latents.append(np.asarray(encode(examples)))
        captions += texts
    # Written beside and renamed, so that a killed run leaves no half shard and two encoders do not disturb each other.
    beside = file.with_suffix(f".{os.getpid()}.part.npz")
    np.savez(beside, latents=np.concatenate(latents).astype(np.float16), captions=json.dumps(captions))
    beside.rename(file)
