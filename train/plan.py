"""`dit-plan`: whether a recipe's step, or a sampling run, fits a TPU slice, and how fast it can be at most.

dit-plan pare_stage1 --topology v5p:4x4x4 --mesh data=4,fsdp=16 --set model=wan2.1-t2v-14b
dit-plan step_distill --topology v6e-16 --slices 4 --mesh data=4,fsdp=16 --set model=wan2.1-t2v-1.3b --json
dit-plan wan2.1-t2v-14b --topology v5p-8 --mesh data=2,fsdp=2 --plan hsa:50

The real program is compiled ahead of time, on any machine that has libtpu: no TPU is needed. A model is a preset, whose
weights are not read, or a checkpoint. docs/pods.md tells what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError
from dit_jax.methods.plan import DENSE
from dit_jax.models.network import grid
from dit_jax.sharding import make_mesh, parse_mesh
from infer.chips import CHIPS, GIB, Chip, chip_name, tpu_devices
from infer.program_costs import CompiledText, matmul_flops, needed_bytes
from infer.random_pipeline import PRESETS, transformer_component, usual
from infer.tpu_memory import plan_cell, programs
from infer.tpu_programs import Case, check_offload, config_of, trace
from train.cli import configure, load_recipe
from train.step import TrainStep

NETWORK = 25e9  # bytes/s of a chip between slices: 200 Gbit/s a host of four chips, and twice as much where it is good


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a program is known to take before it has run, a chip.

    flops           of matrix products, those of recomputed blocks among them
    arguments, temporaries, peak_bytes  of HBM, of `capacity_bytes`; the first two unknown where the compiler gave up
    moved_bytes     that must pass between HBM and the chip at least: what is read and what is written, once
    sent_bytes      to other chips, by collective operation; unknown where the compiler gave up
    compute_seconds, memory_seconds, network_seconds  that these take at the chip's full speed
    floor_seconds   the longest of them: no step is faster
    tokens_per_second  of all chips at that floor
    """

    what: str
    topology: str
    slices: int
    mesh: str
    chips: int
    fits: bool
    peak_bytes: int
    capacity_bytes: int
    flops: float
    arguments: int | None
    temporaries: int | None
    moved_bytes: int | None
    sent_bytes: dict[str, float]
    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    floor_seconds: float
    tokens_per_second: float
    compile_seconds: float

    @property
    def intensity(self) -> float | None:
        """FLOPs for every byte that must pass between HBM and the chip."""
        return self.flops / self.moved_bytes if self.moved_bytes else None


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a program is to run."""

    topology: str
    slices: int
    mesh: str

    def built(self) -> jax.sharding.Mesh:
        """Its mesh over the described chips; UserError as `make_mesh`."""
        devices = tpu_devices(self.topology, self.slices)
        axes = parse_mesh(self.mesh) if self.mesh else {"data": self.slices, "fsdp": len(devices) // self.slices}
        return make_mesh(axes, devices)

    @property
    def chip(self) -> Chip:
        """What each of its chips can do."""
        return CHIPS[chip_name(self.topology)]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a report is of: a traced program, through whose trunk `tokens` go with so many `flops` on all chips, and the
    bytes a chip of weights that lie `beside` its arguments while it runs."""

    what: str
    traced: Any
    tokens: int
    flops: float
    beside: int = 0


def report(subject: Subject, target: Target, mesh: jax.sharding.Mesh) -> Report:
    """Compiles a program and reads what it takes."""
    flops = subject.flops / mesh.size
    began = time.perf_counter()
    arguments = temporaries = moved = None
    sent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            # Printed by the compiler: what it gives back of some loops with asynchronous copies cannot be read.
            compiled = subject.traced.lower().compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            peak = needed_bytes(error) + subject.beside
        else:
            found = compiled.memory_analysis()
            moved = found.argument_size_in_bytes + found.output_size_in_bytes
            arguments, temporaries = found.argument_size_in_bytes + subject.beside, found.temp_size_in_bytes
            peak = moved - found.alias_size_in_bytes + temporaries + subject.beside
            (printed,) = Path(folder).glob("*.after_optimizations.txt")
            sent = _sent(printed.read_text(), mesh.size, target.slices)
    chip = target.chip
    between = sum(size for kind, size in sent.items() if kind.endswith(BETWEEN))
    compute, memory = flops / chip.flops, (moved or 0) / chip.hbm
    network = max((sum(sent.values()) - between) / chip.ici, between / NETWORK)
    floor = max(compute, memory, network)
    return Report(
        what=subject.what,
        topology=target.topology,
        slices=target.slices,
        mesh=",".join(f"{name}={size}" for name, size in mesh.shape.items()),
        chips=mesh.size,
        fits=peak <= chip.capacity,
        peak_bytes=peak,
        capacity_bytes=chip.capacity,
        flops=flops,
        arguments=arguments,
        temporaries=temporaries,
        moved_bytes=moved,
        sent_bytes=sent,
        compute_seconds=compute,
        memory_seconds=memory,
        network_seconds=network,
        floor_seconds=floor,
        tokens_per_second=subject.tokens / floor,
        compile_seconds=time.perf_counter() - began,
    )


BETWEEN = " between slices"


def _sent(text: str, devices: int, slices: int) -> dict[str, float]:
    sizes: Counter[str] = Counter()
    for sent in CompiledText(text, devices, slices).sent:
        sizes[sent.kind + BETWEEN * sent.between_slices] += sent.size  # type: ignore[assignment]
    return dict(sizes)


def of_recipe(name: str, settings: list[str], target: Target) -> Report:
    """The report of a recipe's training step; UserError without the `train` extra."""
    from train.recipe import abstract_batch, made, rows_of, source_of

    recipe = load_recipe(name)
    if not hasattr(recipe, "training"):
        raise UserError(
            f"{name} has no `training(config, source)`: expected a recipe of distillation, such as finetune"
        )
    config = configure(recipe.Config, settings, getattr(recipe, "VARIANTS", {}))
    mesh = target.built()
    source = source_of(config, mesh, planned=True)
    training = made(config, recipe.training, source)
    step = TrainStep(training.trained, training.plan, mesh, training.frozen)
    rows = rows_of(config, training)
    batch = abstract_batch(config, source.config, rows)
    tokens = rows * math.prod(grid(batch["latents"].shape, source.config.patch))
    traced = step.trace({**batch, **training.extra}, training.first_turn)
    flops = matmul_flops(traced.jaxpr, training.trips)
    subject = Subject(what=f"{Path(name).stem} {config.model}", traced=traced, tokens=tokens, flops=flops)
    return report(subject, target, mesh)


def of_sampling(model: str, options: argparse.Namespace, target: Target) -> list[Report]:
    """The reports of a plan's programs: one, or one for each patch size."""
    config = usual(PRESETS[model])
    case = Case(
        model=model,
        topology=target.topology,
        mesh=target.mesh,
        size=options.size or "{}x{}".format(*config.size),
        frames=options.frames or config.frames,
        plan=options.plan,
        offload_expert=options.offload_expert,
    )
    mesh, reports = target.built(), []
    for each in programs(case):
        program = trace(transformer_component(config_of(each)), each, mesh)
        tokens = program.tokens * program.steps
        what = f"{model} {plan_cell(each)}"
        subject = Subject(what=what, traced=program.traced, tokens=tokens, flops=program.flops, beside=program.beside)
        reports.append(report(subject, target, mesh))
    return reports


def told(found: Report) -> str:
    """A report for people."""

    def gib(size: float | None) -> str:
        return "unknown" if size is None else f"{size / GIB:.2f} GiB"

    short = found.peak_bytes - found.capacity_bytes
    verdict = "fits" if found.fits else f"does not fit, short by {gib(short)} a chip"
    sent = ", ".join(f"{kind} {gib(size)}" for kind, size in sorted(found.sent_bytes.items())) or "unknown"
    intensity = "unknown" if found.intensity is None else f"{found.intensity:.0f} FLOPs a byte"
    slices = f"{found.slices} x " if found.slices > 1 else ""
    rows = [
        ("slice", f"{slices}{found.topology}, {found.chips} chips, {found.mesh}"),
        ("HBM a chip", f"{gib(found.peak_bytes)} of {gib(found.capacity_bytes)}"),
        ("", f"arguments {gib(found.arguments)}, temporaries {gib(found.temporaries)}"),
        ("FLOPs a chip", f"{found.flops:.3e}, {intensity} of HBM"),
        ("sent by a chip", sent),
        (
            "floor of a step",
            f"{found.floor_seconds:.3f} s (compute {found.compute_seconds:.3f}, memory {found.memory_seconds:.3f}, "
            f"network {found.network_seconds:.3f})",
        ),
        ("tokens at that floor", f"{found.tokens_per_second:,.0f} a second"),
        ("compiled in", f"{found.compile_seconds:.0f} s"),
    ]
    return "\n".join([f"{found.what}: {verdict}", *(f"  {name:22}{value}" for name, value in rows)])


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dit-plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("what", metavar="RECIPE|PRESET", help=f"a recipe, or to sample one of {', '.join(PRESETS)}")
    add("--topology", required=True, metavar="NAME", help="a slice such as v5p-16, or a shape such as v5p:8x8x8")
    add("--slices", type=int, default=1, metavar="N", help="how many of them (default 1)")
    add(
        "--mesh", default="", metavar="AXES", help="such as data=4,fsdp=16 (default: data over slices, fsdp over chips)"
    )
    add("--remat", metavar="POLICY", help="of a recipe: what is kept of a block for its gradient")
    add("--set", action="append", default=[], metavar="name=value", dest="settings", help="of a recipe: its options")
    add("--plan", default=DENSE, help="to sample: methods of the run, such as hsa:50 (default dense)")
    add("--size", metavar="WxH", help="to sample: pixels (default: the model's)")
    add("--frames", type=int, metavar="N", help="to sample: 4k + 1 frames (default: the model's)")
    add("--offload-expert", action="store_true", help="to sample Wan 2.2 A14B: one expert on the chips at a time")
    add("--json", action="store_true", help="print one JSON object a program")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 0 if it fits, 1 if it does not, 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    target = Target(topology=options.topology, slices=options.slices, mesh=options.mesh)
    try:
        with warnings_in_lines():
            check_offload(options.what, options.offload_expert)
            if options.what in PRESETS:
                reports = of_sampling(options.what, options, target)
            else:
                settings = options.settings + ([f"remat={options.remat}"] if options.remat else [])
                reports = [of_recipe(options.what, settings, target)]
    except UserError as error:
        print(f"dit-plan: {error}", file=sys.stderr)
        return 2
    for found in reports:
        print(json.dumps(asdict(found)) if options.json else told(found))
    return 0 if all(found.fits for found in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
