"""HBM that a sampling run takes on a TPU slice, from a compilation on any host: no TPU is needed, libtpu is.

    python -m infer.tpu_memory --model wan2.1-t2v-14b --topology v5p-16 --mesh fsdp=2,context=4 --size 832x480

Without a model, it compiles every row of the table in docs/tpu.md. The program is what a pipeline runs: `sample` over
`Guided` with UniPC, one video, both guidance branches, bf16 weights, splash attention. Its arguments are shapes alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.config import UserError
from dit_jax.methods.method import Run
from dit_jax.methods.plan import DENSE, Plan, parse_plan
from dit_jax.models import vae_wan, wan
from dit_jax.models.network import Conditioning
from dit_jax.parameters import Precision, cast, named_leaves
from dit_jax.sampling.sampler import Guided, sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import SOLVERS
from dit_jax.sharding import batch_shardings, make_mesh, parse_mesh, replicated, shardings
from infer.request import parse_size

GIB = 1 << 30
TEXT_TOKENS = 512
IMAGE_TOKENS = 257
STEPS = 50
SEGMENT = 4
STRIDES = {vae.z_dim: vae.space_factor for vae in vae_wan.PRESETS.values()}
PRECISION = Precision(weights=jnp.bfloat16, exact=wan.FP32_LEAVES)
MOSAIC = "tpu_custom_call"  # a Pallas kernel in a lowered program
VMEM = "S(1)"  # on-chip memory in the layout of a compiled program's array

# Cloud names of slices. v5p counts TensorCores, two a chip; the others count chips.
SLICES = {
    "v5e-4": "v5e:2x2", "v5e-8": "v5e:2x4", "v5e-16": "v5e:4x4", "v5e-32": "v5e:4x8",
    "v5p-8": "v5p:2x2x1", "v5p-16": "v5p:2x2x2", "v5p-32": "v5p:2x2x4",
    "v6e-4": "v6e:2x2", "v6e-8": "v6e:2x4", "v6e-16": "v6e:4x4",
}  # fmt: skip

# What the compiler lets a program use of a chip's HBM (it keeps a little for itself), in GiB.
CAPACITY = {"v5e": 15.75, "v5p": 95.73, "v6e": 31.24}

SIZES = ("832x480", "1280x720")
TABLE = [
    ("wan2.1-t2v-1.3b", "v5e-8", "data=2,fsdp=4"),
    ("wan2.1-t2v-14b", "v5e-8", "fsdp=8"),
    ("wan2.1-t2v-14b", "v5p-8", "data=2,fsdp=2"),
    ("wan2.1-t2v-14b", "v6e-8", "data=2,fsdp=4"),
    ("wan2.1-t2v-14b", "v5e-16", "data=2,fsdp=8"),
    ("wan2.1-t2v-14b", "v5p-16", "data=2,fsdp=2,context=2"),
    ("wan2.1-t2v-1.3b", "v5p-8", "data=2,fsdp=2"),
    ("wan2.1-t2v-1.3b", "v6e-8", "data=2,context=4"),
]

HEADER = """\
| model | video | slice | mesh | arguments | temporaries | weights copied | peak | capacity | fits | compile s |
|---|---|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One program: a model, a slice or topology, a mesh over its chips, the video's size and frames, and a plan."""

    model: str
    topology: str
    mesh: str
    size: str
    frames: int = 81
    plan: str = DENSE


@dataclass(frozen=True, kw_only=True)
class Memory:
    """HBM a chip in bytes: `peak` is all that lives at once, `copies` whole stacked weights written anew.

    A program that exceeds HBM is not compiled to the end: its peak is what the compiler said it would need.
    """

    peak: int
    seconds: float
    fits: bool
    arguments: int | None = None
    temporaries: int | None = None
    copies: int | None = None


def chip(topology: str) -> str:
    """`v5e` of `v5e-8` or `v5e:2x4`; UserError for one whose HBM is not known."""
    name = SLICES.get(topology, topology).partition(":")[0]
    if name not in CAPACITY:
        raise UserError(
            f"unknown topology {topology!r}: expected one of {', '.join(SLICES)} or a shape such as v5p:2x2x4"
        )
    return name


def tpu_devices(topology: str) -> list[Any]:
    """Chips of a slice (`v5e-8`) or topology (`v5e:2x4`), described by libtpu; UserError if it cannot."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    chip(topology)
    try:
        return list(topologies.get_topology_desc(SLICES.get(topology, topology), platform="tpu").devices)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"libtpu cannot describe {topology!r} ({reason}): install libtpu, or name a shape that exists"
        ) from error


def latents_shape(size: str, frames: int, channels: int) -> tuple[int, ...]:
    """[1, T, Y, X, C] of a WxH video behind a VAE of so many channels: strides of 4 in time, 8 or 16 in space."""
    width, height = parse_size(size)
    stride = STRIDES.get(channels, 8)
    if width % (2 * stride) or height % (2 * stride) or not width * height:
        raise UserError(
            f"size {size} does not fit: width and height must be multiples of {2 * stride}; write 832x480 or 1280x704"
        )
    if frames < 1 or frames % 4 != 1:
        raise UserError(f"{frames} frames do not fit: expected 4·k + 1; ask for {4 * max(frames // 4, 1) + 1}")
    return 1, (frames - 1) // 4 + 1, height // stride, width // stride, channels


def abstract_request(config: wan.WanConfig, size: str, frames: int) -> tuple[Guided, Any]:
    """(denoiser, latents) of one guided video as shapes alone, in bf16; UserError for a size that does not fit."""

    def shape(dtype, *sizes) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    latents = latents_shape(size, frames, config.out_channels)
    extra = config.in_channels - config.out_channels
    guided = Guided(
        model=cast(nnx.eval_shape(lambda: wan.Wan(config, nnx.Rngs(0))), PRECISION),
        conditioning=Conditioning(
            shape(jnp.bfloat16, 2, TEXT_TOKENS, config.text_width),
            shape(jnp.bfloat16, 2, IMAGE_TOKENS, config.image_width) if config.image_width else None,
        ),
        guidance_scale=shape(jnp.float32),
        extra=shape(jnp.float32, *latents[:-1], extra) if extra else None,
        branches=2,
    )
    return guided, shape(jnp.float32, *latents)


def lower(guided: Guided, latents: Any, mesh, plan: Plan):
    """The program of one sampling segment, lowered for the mesh."""
    solver, steps = SOLVERS[plan.solver or "unipc"], plan.steps or STEPS
    schedule = solver.schedule(steps, Shift(constant=3.0), 0)

    def segment(denoiser, carry, schedule, first):
        return sample(denoiser, solver, carry, schedule, first, SEGMENT)

    def on_mesh(tree):
        return _placed(tree, batch_shardings(tree, mesh))

    with jax.set_mesh(mesh):
        model = _placed(guided.model, shardings(guided.model, wan.AXES, mesh))
        guided = replace(on_mesh(replace(guided, model=None)), model=model)
        run = Run(latents_shape=latents.shape, first=0, stop=steps, steps=steps, sigmas=schedule.sigmas)
        denoiser, schedule, first = jax.tree.map(
            lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else _shape(leaf, replicated(mesh)),
            (plan.applied(guided, run), schedule, np.int32(0)),
        )
        latents = on_mesh(latents)
        started = jax.jit(lambda denoiser, latents: start(denoiser, solver, latents)).lower(denoiser, latents).compile()
        carry = jax.tree.map(_shape, started.out_info, started.output_shardings)
        program = jax.jit(segment, donate_argnames="carry", out_shardings=started.output_shardings)
        return program.lower(denoiser, carry, schedule, first)


def _shape(leaf, sharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(tree, placement):
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), tree, placement)


def measure(config: wan.WanConfig, case: Case) -> Memory:
    """Compiles a model of this config as the case says; UserError for a size, mesh or topology that cannot be."""
    guided, latents = abstract_request(config, case.size, case.frames)
    mesh = make_mesh(parse_mesh(case.mesh), tpu_devices(case.topology))
    lowered = lower(guided, latents, mesh, parse_plan(case.plan))
    if MOSAIC not in lowered.as_text():
        raise RuntimeError("the program holds no splash attention: expected a Mosaic kernel for a TPU topology")
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _over_capacity(error, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    found = compiled.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    peak = found.argument_size_in_bytes + outputs + found.temp_size_in_bytes
    return Memory(
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        peak=peak,
        copies=_copies(compiled, guided.model, mesh),
        seconds=seconds,
        fits=peak <= CAPACITY[chip(case.topology)] * GIB,
    )


def _copies(compiled, model, mesh) -> int | None:
    """`copied_stacks` of a program; None where XLA fails to print it (some loops with asynchronous copies)."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None
    return copied_stacks(text, model, mesh)


def _over_capacity(error: Exception, seconds: float) -> Memory:
    """What a program needs that the compiler refuses because it exceeds HBM; any other error is raised again."""
    needed = re.search(r"\(([\d.]+)([GM])\) exceeds available HBM", str(error))
    if needed is None:
        raise error
    return Memory(peak=round(float(needed[1]) * (GIB if needed[2] == "G" else GIB >> 10)), seconds=seconds, fits=False)


def copied_stacks(text: str, model, mesh) -> int:
    """Bytes of whole stacked weights that a program writes: a second copy of a chip's part, or all parts gathered."""
    placement = shardings(model, wan.AXES, mesh)
    shapes = set()
    for (name, leaf), sharding in zip(named_leaves(model.blocks), jax.tree.leaves(placement.blocks), strict=True):
        if name.endswith(".kernel"):
            shapes |= {leaf.shape, sharding.shard_shape(leaf.shape)}
    written = 0
    for dtype, dimensions, layout, operation in re.findall(r"= (bf16|f32)\[([\d,]+)\](\S*) ([\w-]+)\(", text):
        shape = tuple(int(size) for size in dimensions.split(","))
        written_to_hbm = VMEM not in layout and operation not in ("parameter", "get-tuple-element", "bitcast")
        if shape in shapes and written_to_hbm:
            written += math.prod(shape) * (2 if dtype == "bf16" else 4)
    return written


def table_row(case: Case, memory: Memory) -> str:
    """One row of the markdown table."""
    arguments, temporaries, copies = (
        "" if size is None else f"{size / GIB:.2f}" for size in (memory.arguments, memory.temporaries, memory.copies)
    )
    cells = (
        case.model, f"{case.size}x{case.frames}", case.topology, case.mesh, arguments, temporaries, copies,
        f"{memory.peak / GIB:.2f}", f"{CAPACITY[chip(case.topology)]:.2f}",
        "yes" if memory.fits else "no", f"{memory.seconds:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def parse(argv: list[str] | None) -> tuple[list[Case], bool]:
    """(programs to compile, whether to print JSON)."""
    parser = argparse.ArgumentParser(prog="python -m infer.tpu_memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=wan.PRESETS, help="without it: every row of the documented table")
    parser.add_argument("--topology", default="v5e-8", help=f"{', '.join(SLICES)}, or a shape such as v5p:2x2x4")
    parser.add_argument("--mesh", default="data=2,context=4", help="axes of data, fsdp, context, tensor over all chips")
    parser.add_argument("--size", default="832x480", help="WxH in pixels")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--plan", default=DENSE, help="methods of the run, such as hsa:50 (default dense)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row instead of a table")
    options = parser.parse_args(argv)
    if options.model is None:
        cases = [Case(model=m, topology=t, mesh=axes, size=size) for m, t, axes in TABLE for size in SIZES]
    else:
        names = ("model", "topology", "mesh", "size", "frames", "plan")
        cases = [Case(**{name: getattr(options, name) for name in names})]
    return cases, options.json


def main(argv: list[str] | None = None) -> int:
    """Prints the table, a row as soon as it is known. Exit code 2 for bad input."""
    jax.config.update("jax_platforms", "cpu")
    try:
        cases, as_json = parse(argv)
        if not as_json:
            print(HEADER, flush=True)
        for case in cases:
            memory = measure(wan.PRESETS[case.model], case)
            print(json.dumps(asdict(case) | asdict(memory)) if as_json else table_row(case, memory), flush=True)
            jax.clear_caches()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
