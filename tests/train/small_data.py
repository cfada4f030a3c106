"""Small folders of training data with random numbers in them, written without any model."""

import numpy as np

from train.buckets import Bucket
from train.shards import EMPTY, MANIFEST, Example, Manifest, ShardWriter, describe, to_record, write_whole

TEXT = (6, 4)  # tokens and width
BUCKETS = tuple(Bucket(width=w, height=h, frames=f) for w, h, f in ((32, 32, 9), (48, 32, 9), (32, 32, 5), (32, 48, 5)))
COUNTS = (12, 7, 5, 2)
ENCODERS = {"vae": "aaaaaaaaaa", "text_encoder": "bbbbbbbbbb"}


def latents_shape(bucket):
    return (bucket.frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8, 3


def example(bucket, index):
    """What it holds follows from its bucket and index; the first value of its latents tells the index."""
    rng = np.random.default_rng([bucket.width, bucket.height, bucket.frames, index])
    text = rng.standard_normal(TEXT)
    text[2 + index % 4 :] = 0
    latents = rng.standard_normal(latents_shape(bucket))
    latents[0, 0, 0, 0] = index
    arrays = {"latents": latents, "text": text, "pooled": rng.standard_normal(5)}
    return Example(arrays, f"caption {index}", f"{index}.mp4")


def write_data(folder, counts=COUNTS, shard=5):
    """Training data with so many examples of each of BUCKETS, `shard` of them a file."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for bucket, count in zip(BUCKETS, counts, strict=True):
        for start in range(0, count, shard):
            writer = ShardWriter(folder / f"{start:06d}-{bucket.name}.array_record", bucket.name)
            for index in range(start, min(start + shard, count)):
                writer.write(example(bucket, index))
            shards.append(writer.close())
    empty = Example({"text": np.eye(*TEXT)[:1], "pooled": np.full(5, 7.0)}, "", "")
    write_whole(folder / EMPTY, to_record(empty))
    manifest = Manifest(
        model="small",
        transformer="WanTransformer3DModel",
        encoders=ENCODERS,
        fps=8.0,
        text=TEXT,
        buckets=BUCKETS,
        latents={bucket.name: latents_shape(bucket) for bucket in BUCKETS},
        shards=tuple(shards),
        empty=describe(folder / EMPTY, EMPTY, "", 1),
        skipped=({"file": "x.mp4", "reason": "the video is cut off"},),
    )
    write_whole(folder / MANIFEST, manifest.to_json().encode())
    return folder
