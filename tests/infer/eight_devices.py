"""What `test_pipeline_mesh.py` runs in a process of its own: a saved pipeline on eight fake CPU devices. Writes
OUT.npz."""

import sys

import jax
import numpy as np

from dit_jax.sharding import make_mesh, parse_mesh
from infer import load_pipeline


def main(folder: str, out: str, meshes: list[str]) -> None:
    frames, compiled = {}, []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    for text in meshes:
        pipe = load_pipeline(folder, mesh=make_mesh(parse_mesh(text)))
        kernel = pipe.transformer.blocks.mlp.up.kernel[...]
        if "fsdp" in text:
            assert kernel.addressable_shards[0].data.size < kernel.size, "the transformer is not sharded"
        options = dict(size=(48, 64), frames=5, steps=8, guidance=3.0)
        frames[text] = pipe("a red cat runs", seed=7, **options).frames[0]
        before = len(compiled)
        pipe("the dog sleeps", seed=8, **options)
        frames[f"{text} compiled"] = np.array(len(compiled) - before)
        frames[f"{text} batch"] = pipe(["the dog sleeps", "a red cat runs"], seed=6, **options).frames[1]
    np.savez(out, **frames)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
