"""`dit-prune`: a model whose blocks have fewer attention heads and MLP neurons, those that matter least left out.

dit-prune --model demo-wan --prompts prompts.txt --heads 0.3 --ffn 0.3 --out narrow
dit-generate --model narrow --prompt "a red 7 moving left" --out seven.mp4

Heads are scored over a short plain run of every prompt, neurons by their weights (or, to compare with, all are drawn by
lot). What comes out is an ordinary model that wants to be trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint, CheckpointLayout, open_checkpoint
from convert.method_parts import transformers
from convert.progress import progress_bar
from convert.transfer import convert
from convert.warning_lines import warnings_in_lines
from convert.widths import with_widths
from dit_jax.config import UserError
from dit_jax.methods.pruning import (
    HEAD_TYPES,
    PROTECTION,
    Widths,
    attentions,
    best_heads,
    best_neurons,
    check_ratio,
    heads_to_keep,
    mlps,
    neurons_to_keep,
    protected,
)
from dit_jax.models.flux import FluxConfig
from infer.given_images import given_images, image_options
from infer.head_calibration import Heads, calibrate_heads, plot_types
from infer.prompts_file import read_prompts

STEPS = 10  # timestep bins
NORMS = ("full", "kept")
CHOICES = ("scores", "random")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dit-prune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", required=True, help="a checkpoint folder, a hub id org/name[@revision], demo-flux or demo-wan")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to make")
    add(
        "--prompts", metavar="FILE",
        help="prompts to score heads on, one a line (about 200); not needed for --heads 0 and --choose random",
    )  # fmt: skip
    image_options(options)
    add("--heads", type=float, default=0.3, metavar="P", help="share of the heads that is pruned (default 0.3)")
    add("--ffn", type=float, default=0.3, metavar="P", help="share of the MLPs' neurons that is pruned (default 0.3)")
    add(
        "--choose", choices=CHOICES, default="scores",
        help="what says which are kept: scores (default), or lots for heads and neurons (the paper's ablation)",
    )  # fmt: skip
    add("--seed", type=int, metavar="N", help="of the lots (default 0)")
    add("--protection", type=float, metavar="X", help=f"raises temporal heads' scores (default {PROTECTION:g})")
    add(
        "--norm", choices=NORMS, default="full",
        help="Wan: normalise queries and keys as if pruned heads were there with zeros (full, default), or over the "
        "kept ones",
    )  # fmt: skip
    add("--steps", type=int, metavar="N", help=f"steps of a prompt's run (default {STEPS})")
    add("--size", metavar="WxH", help="pixels of the runs (default: the model's)")
    add("--frames", type=int, metavar="N", help="4k + 1 frames of the runs (default: the model's)")
    add("--mesh", metavar="AXES", help="devices by axis, such as data=2,context=4")
    add("--plot", type=Path, metavar="FILE", help="draw the types of heads by block")
    add("--overwrite", action="store_true", help="replace a checkpoint that is already at DIR")
    add("--json", action="store_true", help="print one JSON object")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    try:
        with warnings_in_lines():
            report = prune(options)
    except UserError as error:
        print(f"dit-prune: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dit-prune: {error.filename or options.out}: {error.strerror or error}.", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report))
    else:
        print(
            f"{options.out}: {report['heads']} of {report['all_heads']} heads and {report['neurons']} of "
            f"{report['all_neurons']} neurons in every block, {report['seconds']:.1f} s"
        )
    return 0


def prune(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the parsed command; returns what `--json` prints."""
    began = time.perf_counter()
    for name, ratio in (("--heads", options.heads), ("--ffn", options.ffn)):
        check_ratio(name, ratio)
    if (options.seed or 0) < 0:
        raise UserError(f"--seed is {options.seed}: expected a whole number from 0; leave it out for 0")
    _check_unread(options)
    source = open_checkpoint(options.model)
    if not source.is_pipeline:
        raise UserError(f"{source.place} is a lone model: expected a whole pipeline, which can be run on prompts")
    if options.plot and isinstance(source.component(transformers(source)[0]).config, FluxConfig):
        raise UserError("types of heads exist for videos alone, found a model of still images; leave out --plot")
    heads = _scored(options) if _scores_heads(options) else {}
    widths = _widths(options, source, heads)
    if options.plot:
        _plot(options, heads, widths)
    layout: CheckpointLayout = "native" if source.layout == "native" else "diffusers"
    target = with_widths(source, widths, norm_counts_pruned=options.norm == "full")
    with progress_bar(unit="tensor") as bar:
        convert(target, options.out, layout, overwrite=options.overwrite, progress=bar)
    return _report(source, widths, heads) | {"seconds": round(time.perf_counter() - began, 1)}


def _scores_heads(options: argparse.Namespace) -> bool:
    return bool(options.plot or (options.heads and options.choose == "scores"))


def _check_unread(options: argparse.Namespace) -> None:
    by_lot = options.choose == "random"
    unread = {"seed": "only --choose random draws lots"} if not by_lot else {}
    if by_lot or not options.heads:
        unread |= {"protection": "no heads are chosen by their scores"}
    if not _scores_heads(options):
        of_runs = ("prompts", "image", "last_image", "steps", "size", "frames", "mesh")
        unread |= dict.fromkeys(of_runs, "no heads are scored")
    for name, why in unread.items():
        if (value := getattr(options, name)) is not None:
            found = " ".join([name.replace("_", "-"), *(value if isinstance(value, list) else [str(value)])])
            raise UserError(f"found --{found}, which nothing reads, since {why}: leave it out")


def _scored(options: argparse.Namespace) -> dict[str, Heads]:
    from dit_jax.sharding import make_mesh, parse_mesh
    from infer.caches import keep_compiled_programs
    from infer.loading import load_pipeline
    from infer.request import parse_size

    if options.prompts is None:
        raise UserError(
            "heads are scored on prompts, found none: expected --prompts FILE; give one, or say --heads 0 or --choose "
            "random, without --plot"
        )
    prompts = read_prompts(options.prompts)
    asked: dict[str, Any] = {
        "size": parse_size(options.size) if options.size else None,
        "frames": options.frames,
        "steps": STEPS if options.steps is None else options.steps,
        **given_images(options),
    }
    keep_compiled_programs()
    pipe = load_pipeline(options.model, mesh=make_mesh(parse_mesh(options.mesh)) if options.mesh else None)
    with progress_bar(total=len(prompts), unit="prompt", desc="scoring heads") as bar:
        return calibrate_heads(pipe, prompts, lambda done: bar.update(done - bar.n), **asked)


def _widths(options: argparse.Namespace, source: Checkpoint, heads: Mapping[str, Heads]) -> dict[str, Widths]:
    names, shares = transformers(source), (options.heads, options.ffn)
    if options.choose == "random":
        rng = np.random.default_rng(options.seed or 0)
        return {name: widths_by_lot(source, name, *shares, rng) for name in names}
    protection = PROTECTION if options.protection is None else options.protection
    return {name: chosen_widths(source, name, heads.get(name), *shares, protection) for name in names}


def chosen_widths(
    checkpoint: Checkpoint, name: str, heads: Heads | None, heads_ratio: float, ffn_ratio: float, protection: float
) -> Widths:
    """What a component keeps; without `heads` all of them."""
    config, leaves = checkpoint.component(name).config, checkpoint.leaves(name)
    count, neurons = heads_to_keep(config.heads, heads_ratio), neurons_to_keep(config.mlp_width, ffn_ratio)
    kept: dict[str, np.ndarray] = {}
    for modules, blocks in attentions(config).items():
        best = np.tile(np.arange(config.heads), (blocks, 1))
        if heads is not None:
            types = heads.types if modules == ("blocks.attn1",) else None
            best = best_heads(protected(heads.scores[modules], types, protection), count)
        kept |= dict.fromkeys(modules, best)
    chosen: dict[str, np.ndarray] = {}
    for module in mlps(config):
        up, down = leaves[f"{module}.up.kernel"], leaves[f"{module}.down.kernel"]
        bar = progress_bar(range(up.shape[0]), unit="block", desc=f"{name}.{module}", leave=False)
        chosen[module] = np.stack([best_neurons(up.block(block), down.block(block), neurons) for block in bar])
    return Widths(heads=kept, neurons=chosen)


def widths_by_lot(
    checkpoint: Checkpoint, name: str, heads_ratio: float, ffn_ratio: float, rng: np.random.Generator
) -> Widths:
    """As many as `chosen_widths` keeps, by lot: other ones in every block."""
    config, leaves = checkpoint.component(name).config, checkpoint.leaves(name)
    count, neurons = heads_to_keep(config.heads, heads_ratio), neurons_to_keep(config.mlp_width, ffn_ratio)
    kept: dict[str, np.ndarray] = {}
    for modules, blocks in attentions(config).items():
        kept |= dict.fromkeys(modules, best_heads(rng.random((blocks, config.heads)), count))
    chosen = {
        module: best_heads(rng.random((leaves[f"{module}.up.kernel"].shape[0], config.mlp_width)), neurons)
        for module in mlps(config)
    }
    return Widths(heads=kept, neurons=chosen)


def _plot(options: argparse.Namespace, heads: Mapping[str, Heads], widths: Mapping[str, Widths]) -> None:
    file: Path = options.plot
    for name, found in heads.items():
        if found.types is None:
            raise UserError(f"heads have types in videos of several latent frames, found --frames {options.frames}")
        place = file if name == next(iter(heads)) else file.with_stem(f"{file.stem}-{name}")
        plot_types(found.types, widths[name].heads["blocks.attn1"], place)


def _report(source: Checkpoint, widths: Mapping[str, Widths], heads: Mapping[str, Heads]) -> dict[str, Any]:
    first = next(iter(widths))
    config, kept = source.component(first).config, widths[first]
    report: dict[str, Any] = {
        "heads": kept.kept_heads,
        "all_heads": config.heads,
        "neurons": kept.kept_neurons,
        "all_neurons": config.mlp_width,
    }
    for name, found in heads.items():
        if found.types is not None:
            report[f"types of {name}"] = {kind: int((found.types == kind).sum()) for kind in HEAD_TYPES}
    return report


if __name__ == "__main__":
    sys.exit(main())
