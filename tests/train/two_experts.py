"""A small pipeline of two experts, and training data of random numbers for it."""

import sys
from pathlib import Path

import numpy as np

from convert.checkpoint import open_checkpoint
from train.buckets import Bucket
from train.encoders import encoder_hashes
from train.shards import EMPTY, MANIFEST, Example, Manifest, ShardWriter, describe, to_record, write_whole

BUCKET = Bucket(width=48, height=32, frames=5)
LATENTS, TEXT = (2, 4, 6, 4), (6, 24)


def write_model(folder: Path) -> str:
    """Its folder; low noise begins at σ = 0.875."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "infer"))
    try:
        import tiny_wan
    finally:
        sys.path.pop(0)
    tiny_wan.two_experts(image=False).save_pretrained(folder)
    return str(folder)


def write_data(folder: Path, model: str) -> str:
    """Four examples in one bucket."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder / f"000000-{BUCKET.name}.array_record", BUCKET.name)
    for index in range(4):
        arrays = {"latents": rng.standard_normal(LATENTS), "text": rng.standard_normal(TEXT)}
        writer.write(Example(arrays, f"caption {index}", f"{index}.mp4"))
    write_whole(folder / EMPTY, to_record(Example({"text": np.eye(*TEXT)[:1]}, "", "")))
    manifest = Manifest(
        model=model,
        transformer="WanTransformer3DModel",
        encoders=encoder_hashes(open_checkpoint(model)),
        fps=8.0,
        text=TEXT,
        buckets=(BUCKET,),
        latents={BUCKET.name: LATENTS},
        shards=(writer.close(),),
        empty=describe(folder / EMPTY, EMPTY, "", 1),
    )
    write_whole(folder / MANIFEST, manifest.to_json().encode())
    return str(folder)
