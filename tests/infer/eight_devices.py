"""What `test_pipeline_mesh.py` runs in a process of its own: saved pipelines on eight fake CPU devices. Writes
OUT.npz."""

import json
import sys

import jax
import numpy as np
from PIL import Image

from dit_jax.methods.plan import Plan
from dit_jax.sharding import make_mesh, parse_mesh
from infer import load_pipeline
from infer.buckets import Frame, ModelBuckets, Offer
from infer.engine import Engine, EngineOptions
from infer.request import Request
from infer.tickets import Ticket

SMALL = dict(size=(48, 64), frames=5, guidance=3.0)
LARGE = dict(size=(96, 64), frames=5, guidance=3.0)  # where a latent is 16x16 pixels
GUIDANCE = (3.5, 2.0)
PROMPTS = ["the dog sleeps", "a red cat runs"]
IMAGE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8))
SERVED = ((7, "a red cat runs"), (8, "the dog sleeps"))  # seeds and prompts
WIDE = dict(size=(832, 480), frames=1)  # latents of 60 x 104: eight devices divide the columns alone


def wide_latents():
    return np.random.default_rng(4).standard_normal((1, 1, 60, 104, 4)).astype(np.float32)


def record_runs(pipe):
    """Fills the returned list with (program, shard shape of its last argument) of every run of the pipeline."""
    runs, run = [], pipe.programs.run

    def recording(name, function, *arguments, **options):
        last = arguments[-1]
        runs.append((name, last.sharding.shard_shape(last.shape) if isinstance(last, jax.Array) else None))
        return run(name, function, *arguments, **options)

    pipe.programs.run = recording
    return runs


def served(pipe) -> np.ndarray:
    """The first frames of two requests that an engine makes in one batch."""
    shape = Frame(*SMALL["size"], SMALL["frames"])
    buckets = ModelBuckets(shapes=(shape,), offers={"high": Offer(plan=Plan(), steps=8)}, batches=(1, 2))
    engine = Engine({"tiny": pipe}, {"tiny": buckets}, EngineOptions(window=1.0))
    engine.start()
    jobs = [pipe.prepare(Request(prompt=text, seed=seed, steps=8, **SMALL)) for seed, text in SERVED]
    tickets = [Ticket(model="tiny", job=job) for job in jobs]
    engine.submit(tickets)
    samples = [ticket.result.result(600) for ticket in tickets]
    assert [sample.batch for sample in samples] == [2, 2] and engine.stop(60)
    return np.stack([sample.frames[0] for sample in samples])


def text_to_video(folder: str, mesh: str, compiled: list[str]) -> dict[str, np.ndarray]:
    pipe = load_pipeline(folder, mesh=make_mesh(parse_mesh(mesh)))
    kernel = pipe.transformer.blocks.mlp.up.kernel[...]
    if "fsdp" in mesh:
        assert kernel.addressable_shards[0].data.size < kernel.size, "the transformer is not sharded"
    found = {mesh: pipe("a red cat runs", seed=7, steps=8, **SMALL).frames[0]}
    before = len(compiled)
    pipe("the dog sleeps", seed=8, steps=8, **SMALL)
    found[f"{mesh} compiled"] = np.array(len(compiled) - before)
    known = len(pipe.programs)
    found[f"{mesh} batch"] = pipe(PROMPTS, seed=6, steps=8, **SMALL).frames[1]
    found[f"{mesh} batch programs"] = np.array(len(pipe.programs) - known)
    before = len(compiled)
    pipe(PROMPTS[::-1], seed=9, steps=8, **SMALL)
    found[f"{mesh} batch compiled"] = np.array(len(compiled) - before)
    found[f"{mesh} served"] = served(pipe)
    runs = record_runs(pipe)
    job = pipe.prepare(Request(prompt="a red cat", **WIDE))
    found[f"{mesh} wide"] = pipe.decode(job, wide_latents()).frames[0]
    found[f"{mesh} wide shard"] = np.array(runs[-1][1])
    return found


def image_to_video(folder: str, mesh: str) -> dict[str, np.ndarray]:
    pipe = load_pipeline(folder, mesh=make_mesh(parse_mesh(mesh)))
    runs = record_runs(pipe)
    video = pipe(PROMPTS, image=IMAGE, seed=6, steps=2, **SMALL).frames
    return {f"{mesh} image": video, f"{mesh} image shard": np.array(dict(runs)["encode"])}


def experts(folder: str, mesh: str, compiled: list[str]) -> dict[str, np.ndarray]:
    """Both resident, and one at a time."""
    told = dict(seed=7, steps=4, **SMALL | dict(guidance=GUIDANCE))
    pipe = load_pipeline(folder, mesh=make_mesh(parse_mesh(mesh)))
    found = {"experts": pipe("a red cat runs", **told).frames[0]}
    before = len(compiled)
    pipe("the dog sleeps", **told | dict(seed=8))
    found["experts compiled"] = np.array(len(compiled) - before)
    offloading = load_pipeline(folder, mesh=make_mesh(parse_mesh(mesh)), offload_expert=True)
    return found | {"experts one at a time": offloading("a red cat runs", **told).frames[0]}


def first_frame(folder: str, mesh: str) -> dict[str, np.ndarray]:
    """A model that may have a first frame, of which every token has its own timestep."""
    pipe = load_pipeline(folder, mesh=make_mesh(parse_mesh(mesh)))
    return {"first frame": pipe(PROMPTS, image=IMAGE, seed=6, steps=2, **LARGE).frames}


def main(folders: dict[str, str], out: str, meshes: list[str]) -> None:
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    found: dict[str, np.ndarray] = {}
    for mesh in meshes:
        found |= text_to_video(folders["text"], mesh, compiled)
    found |= image_to_video(folders["image"], meshes[0])
    found |= experts(folders["experts"], meshes[1], compiled)
    np.savez(out, **found, **first_frame(folders["first frame"], meshes[0]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:])
