"""Small Wan pipelines, such as one of two experts, and training data of random numbers for them."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import open_checkpoint
from train.buckets import Bucket
from train.encoders import encoder_hashes
from train.shards import EMPTY, MANIFEST, Example, Manifest, ShardWriter, describe, to_record, write_whole

BUCKET = Bucket(width=48, height=32, frames=5)
TEXT = (6, 24)


def write_model(folder: Path) -> str:
    """Its folder; low noise begins at σ = 0.875."""
    tiny_wan().two_experts(image=False).save_pretrained(folder)
    return str(folder)


def tiny_wan() -> Any:
    """The module that makes diffusers' small pipelines."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "infer"))
    try:
        import tiny_wan
    finally:
        sys.path.pop(0)
    return tiny_wan


def latents_shape(bucket: Bucket) -> tuple[int, ...]:
    """Of an example in it."""
    return (bucket.frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8, 4


def write_data(folder: Path, model: str, buckets: tuple[Bucket, ...] = (BUCKET,), more: Any = None) -> str:
    """Four examples in each bucket; `more` gives arrays that they have beside latents and text, of its latents'
    shape."""
    folder.mkdir()
    rng, shards = np.random.default_rng(0), []
    for bucket in buckets:
        writer = ShardWriter(folder / f"000000-{bucket.name}.array_record", bucket.name)
        for index in range(4):
            shapes = {"latents": latents_shape(bucket), "text": TEXT} | (more(latents_shape(bucket)) if more else {})
            arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
            writer.write(Example(arrays, f"caption {index}", f"{index}.mp4"))
        shards.append(writer.close())
    write_whole(folder / EMPTY, to_record(Example({"text": np.eye(*TEXT)[:1]}, "", "")))
    manifest = Manifest(
        model=model,
        transformer="WanTransformer3DModel",
        encoders=encoder_hashes(open_checkpoint(model)),
        fps=8.0,
        text=TEXT,
        buckets=buckets,
        latents={bucket.name: latents_shape(bucket) for bucket in buckets},
        shards=tuple(shards),
        empty=describe(folder / EMPTY, EMPTY, "", 1),
    )
    write_whole(folder / MANIFEST, manifest.to_json().encode())
    return str(folder)
