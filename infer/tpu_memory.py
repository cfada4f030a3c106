"""HBM that a sampling run takes on a TPU slice, from a compilation on any host: no TPU is needed, libtpu is.

    python -m infer.tpu_memory --model wan2.1-t2v-14b --topology v5p-16 --mesh fsdp=2,context=4 --size 832x480
    python -m infer.tpu_memory --model flux.1-dev --topology v5p-8 --mesh fsdp=2,context=2 --plan ddit

Without a model, it compiles every row of a table in docs/tpu.md: `--table models` or `--table methods`. What a program
is stands in `infer/tpu_programs.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from convert.components import Component
from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError
from dit_jax.methods.magcache import MagCache
from dit_jax.methods.patch_adapters import size_name
from dit_jax.methods.plan import DENSE
from dit_jax.parameters import STACKS, named_leaves
from dit_jax.sharding import make_mesh, parse_mesh, shardings
from infer.chips import CHIPS, GIB, SLICES, chip_name, tpu_devices
from infer.program_costs import needed_bytes
from infer.random_pipeline import PRESETS, transformer_component, usual
from infer.tpu_programs import Case, check_offload, config_of, plan_of, trace

MOSAIC = "tpu_custom_call"  # a Pallas kernel in a lowered program
VMEM = "S(1)"  # on-chip memory in the layout of a compiled program's array

# The tables in docs/tpu.md: models by size, slice and mesh; methods on one size of two models.
SIZES = ("832x480", "1280x720")
MODELS = [
    ("wan2.1-t2v-1.3b", "v5e-8", "data=2,fsdp=4"),
    ("wan2.1-t2v-14b", "v5e-8", "fsdp=8"),
    ("wan2.1-t2v-14b", "v5p-8", "data=2,fsdp=2"),
    ("wan2.1-t2v-14b", "v6e-8", "data=2,fsdp=4"),
    ("wan2.1-t2v-14b", "v5e-16", "data=2,fsdp=8"),
    ("wan2.1-t2v-14b", "v5p-16", "data=2,fsdp=2,context=2"),
    ("wan2.1-t2v-1.3b", "v5p-8", "data=2,fsdp=2"),
    ("wan2.1-t2v-1.3b", "v6e-8", "data=2,context=4"),
]
WAN_METHODS = {"model": "wan2.1-t2v-14b", "size": "832x480", "frames": 81}
FLUX_METHODS = {"model": "flux.1-dev", "size": "1024x1024", "frames": 1}
METHODS: list[dict[str, Any]] = [
    WAN_METHODS | {"topology": "v5p-8", "mesh": "data=2,fsdp=2"},
    WAN_METHODS | {"topology": "v6e-8", "mesh": "data=2,fsdp=4"},
    FLUX_METHODS | {"topology": "v5p-8", "mesh": "fsdp=2,context=2"},
    FLUX_METHODS | {"topology": "v6e-8", "mesh": "fsdp=4,context=2"},
]
POLYNOMIALS = {"wan2.1-t2v-14b": "wan2.1-t2v-14b", "flux.1-dev": "flux.1"}
PRUNED = {"heads": 0.3, "ffn": 0.3}
PLANS = ("hsa:75A", "hsa:50", "coredit:0.45", "routing", "ddit", "teacache:0.1:model={}", MagCache.name, "taylorseer")

MEASURED = ("arguments", "temporaries", "weights copied", "peak", "capacity", "fits", "compile s")
MODEL_COLUMNS = ("model", "video", "slice", "mesh", *MEASURED)
METHOD_COLUMNS = ("model", "plan", "slice", "mesh", "kept", *MEASURED)
ALL_COLUMNS = ("model", "video", "plan", "slice", "mesh", "kept", *MEASURED)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """HBM a chip in bytes: `peak` is all that lives at once, `copies` whole stacked weights written anew, `kept` the
    arguments that the plan's methods keep from step to step. A second expert that stays counts in arguments and peak.

    A program that exceeds HBM is not compiled to the end: its peak is what the compiler said it would need.
    """

    peak: int
    kept: int
    seconds: float
    fits: bool
    arguments: int | None = None
    temporaries: int | None = None
    copies: int | None = None


def measure(component: Component, case: Case) -> Memory:
    """Compiles a model as the case says; UserError for a size, plan, mesh or topology that cannot be."""
    mesh = make_mesh(parse_mesh(case.mesh), tpu_devices(case.topology))
    program = trace(component, case, mesh)
    lowered, kept, beside = program.traced.lower(), program.kept, program.beside
    if MOSAIC not in lowered.as_text():
        raise RuntimeError("the program holds no splash attention: expected a Mosaic kernel for a TPU topology")
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Memory(peak=needed_bytes(error) + beside, kept=kept, seconds=time.perf_counter() - began, fits=False)
    seconds = time.perf_counter() - began
    found = compiled.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    arguments = found.argument_size_in_bytes + beside
    peak = arguments + outputs + found.temp_size_in_bytes
    return Memory(
        arguments=arguments,
        temporaries=found.temp_size_in_bytes,
        peak=peak,
        kept=kept,
        copies=_copies(compiled, component, mesh),
        seconds=seconds,
        fits=peak <= CHIPS[chip_name(case.topology)].capacity,
    )


def _copies(compiled, component: Component, mesh) -> int | None:
    """`copied_stacks` of a program; None where XLA fails to print it (some loops with asynchronous copies)."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None
    return copied_stacks(text, component, mesh)


def copied_stacks(text: str, component: Component, mesh) -> int:
    """Bytes of whole stacked weights that a program writes: a second copy of a chip's part, or all parts gathered."""
    model = component.abstract
    placement = jax.tree.leaves(shardings(model, component.axes, mesh))
    shapes = set()
    for (name, leaf), sharding in zip(named_leaves(model), placement, strict=True):
        if name.startswith(STACKS) and name.endswith(".kernel"):
            shapes |= {leaf.shape, sharding.shard_shape(leaf.shape)}
    written = 0
    for dtype, dimensions, layout, operation in re.findall(r"= (bf16|f32)\[([\d,]+)\](\S*) ([\w-]+)\(", text):
        shape = tuple(int(size) for size in dimensions.split(","))
        written_to_hbm = VMEM not in layout and operation not in ("parameter", "get-tuple-element", "bitcast")
        if shape in shapes and written_to_hbm:
            written += math.prod(shape) * (2 if dtype == "bf16" else 4)
    return written


def model_cases() -> list[Case]:
    """Rows of the documented table of models."""
    return [Case(model=m, topology=t, mesh=axes, size=size) for m, t, axes in MODELS for size in SIZES]


def method_cases() -> list[Case]:
    """Rows of the documented table of methods: the plain model, a pruned one, and every method of a plan."""
    cases = []
    for on in METHODS:
        plans = [plan.format(POLYNOMIALS[on["model"]]) for plan in PLANS]
        cases += [Case(**on), Case(**on | PRUNED), *(Case(**on, plan=plan) for plan in plans)]
    return [program for case in cases for program in programs(case)]


def programs(case: Case) -> list[Case]:
    """The case, or one for each patch size where its plan chooses among some."""
    chooser = plan_of(config_of(case), case.plan).chooser
    return [replace(case, variant=variant) for variant in chooser.variants] if chooser else [case]


def table_header(columns: tuple[str, ...]) -> str:
    """The first two lines of the markdown table."""
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def table_row(columns: tuple[str, ...], case: Case, memory: Memory) -> str:
    """One row of the markdown table."""
    sizes = {"arguments": memory.arguments, "temporaries": memory.temporaries, "weights copied": memory.copies}
    sizes |= {"kept": memory.kept, "peak": memory.peak}
    cells = {name: "" if size is None else f"{size / GIB:.2f}" for name, size in sizes.items()} | {
        "model": case.model,
        "video": f"{case.size}x{case.frames}",
        "plan": plan_cell(case),
        "slice": case.topology,
        "mesh": case.mesh,
        "capacity": f"{CHIPS[chip_name(case.topology)].capacity / GIB:.2f}",
        "fits": "yes" if memory.fits else "no",
        "compile s": f"{memory.seconds:.0f}",
    }
    return "| " + " | ".join(cells[name] for name in columns) + " |"


def plan_cell(case: Case) -> str:
    """A plan with the patch size it runs at, and what is pruned of the model."""
    pruned = [f"--{name} {ratio:g}" for name, ratio in (("heads", case.heads), ("ffn", case.ffn)) if ratio]
    size = [f"at {size_name(case.variant)}"] if plan_of(config_of(case), case.plan).chooser else []
    return " ".join([case.plan, *size, *pruned])


def parse(argv: list[str] | None) -> tuple[list[Case], tuple[str, ...], bool]:
    """(programs to compile, columns of their table, whether to print JSON)."""
    parser = argparse.ArgumentParser(prog="python -m infer.tpu_memory", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", choices=PRESETS, help="without it: every row of a documented table")
    add("--table", choices=("models", "methods"), default="models", help="which, without --model (default models)")
    add("--topology", default="v5e-8", help=f"{', '.join(SLICES)}, or a shape such as v5p:2x2x4")
    add("--mesh", default="data=2,context=4", help="axes of data, fsdp, context, tensor over all chips")
    add("--size", metavar="WxH", help="in pixels (default the model's)")
    add("--frames", type=int, help="default the model's")
    add("--plan", default=DENSE, help="methods of the run, such as hsa:50 (default dense); magcache needs no ratios")
    add("--heads", type=float, default=0, metavar="P", help="share of the heads that is pruned, as in dit-prune")
    add("--ffn", type=float, default=0, metavar="P", help="share of the MLPs' neurons that is pruned")
    add(
        "--offload-expert", action="store_true", help="Wan 2.2 A14B: keep one of the two experts on the chips at a time"
    )
    add("--json", action="store_true", help="print one JSON object a row instead of a table")
    options = parser.parse_args(argv)
    if options.model is None:
        if options.table == "methods":
            return method_cases(), METHOD_COLUMNS, options.json
        return model_cases(), MODEL_COLUMNS, options.json
    of_model = usual(PRESETS[options.model])
    check_offload(options.model, options.offload_expert)
    names = ("model", "topology", "mesh", "plan", "heads", "ffn", "offload_expert")
    case = Case(
        **{name: getattr(options, name) for name in names},
        size=options.size or "{}x{}".format(*of_model.size),
        frames=of_model.frames if options.frames is None else options.frames,
    )
    return programs(case), ALL_COLUMNS, options.json


def main(argv: list[str] | None = None) -> int:
    """Prints the table, a row as soon as it is known. Exit code 2 for bad input."""
    jax.config.update("jax_platforms", "cpu")
    try:
        with warnings_in_lines():
            cases, columns, as_json = parse(argv)
            if not as_json:
                print(table_header(columns), flush=True)
            for case in cases:
                memory = measure(transformer_component(config_of(case)), case)
                found = json.dumps(asdict(case) | asdict(memory)) if as_json else table_row(columns, case, memory)
                print(found, flush=True)
                jax.clear_caches()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
