"""`dit-adapt`: a copy of a model with the untrained parts that a method needs, to be trained or tried.

dit-adapt --model demo-wan --add router --out adapted
dit-generate --model adapted --plan routing --prompt "a red 7 moving left" --out seven.mp4
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.checkpoint import METHODS, Checkpoint, CheckpointLayout, open_checkpoint
from convert.components import Component
from convert.leaves import Leaf
from convert.method_parts import part_files, transformers
from convert.progress import progress_bar
from convert.transfer import convert
from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError
from dit_jax.methods.ddit import Ddit
from dit_jax.methods.method import Part
from dit_jax.methods.patch_adapters import AdapterSettings, untrained_part
from dit_jax.methods.routing import ROUTER, RouterConfig, new_router
from dit_jax.models.flux import FluxConfig


def untrained_adapters(
    component: Component, leaves: Mapping[str, Leaf], seed: int, settings: AdapterSettings | None = None
) -> Part:
    """DDiT's adapters, resized from the model's own patch embedding and head."""
    names = ("patch.kernel", "patch.bias", "out.kernel", "out.bias")
    layers = {name: leaves[name].block(None) for name in names}
    return untrained_part(component.config, layers, seed, settings or AdapterSettings())


def untrained_router(component: Component, leaves: Mapping[str, Leaf], seed: int, content: bool = True) -> Part:
    """A router that is told what its backbone has: pooled text, the image encoder's class feature, or the latents;
    without `content` the timestep alone."""
    model: Any = component.abstract
    config = component.config
    blocks = sum(model.stacks)
    if not content:
        return new_router(RouterConfig(content="none", features=0, blocks=blocks), seed)
    if isinstance(config, FluxConfig):
        return new_router(RouterConfig(content="pooled", features=config.pooled_width, blocks=blocks), seed)
    if config.image_width is not None:
        return new_router(RouterConfig(content="image", features=config.image_width, blocks=blocks), seed)
    features = 2 * config.out_channels + 1  # mean and deviation of each channel, and the change between frames
    return new_router(RouterConfig(content="latents", features=features, blocks=blocks), seed)


# What can be added -> how it is made for a transformer (component, leaves, seed, and by name what one of the kind may
# differ in); the name is that of its folder under `methods`.
KINDS: dict[str, Callable[..., Part]] = {
    ROUTER: untrained_router,
    Ddit.name: untrained_adapters,
}


def adapted(checkpoint: Checkpoint, names: list[str], seed: int) -> Checkpoint:
    """The checkpoint with new parts for each of its transformers; UserError for what is no pipeline."""
    if not checkpoint.is_pipeline:
        raise UserError(
            f"{checkpoint.place} is a lone model: expected a whole pipeline, whose folder has room for parts"
        )
    files = dict(checkpoint.files)
    for name in names:
        files = {place: file for place, file in files.items() if not place.startswith(f"{METHODS}/{name}/")}
        for component in transformers(checkpoint):
            part = KINDS[name](checkpoint.component(component), checkpoint.leaves(component), seed)
            files |= part_files({name: part}, component)
    return replace(checkpoint, files=files)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dit-adapt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", required=True, help="a checkpoint folder, a hub id org/name[@revision], demo-flux or demo-wan")
    add("--add", action="append", required=True, choices=list(KINDS), help="what to attach; repeatable")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to make")
    add("--seed", type=int, default=0, metavar="N", help="of the untrained weights")
    add("--overwrite", action="store_true", help="replace a checkpoint that is already at DIR")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    began = time.perf_counter()
    try:
        with warnings_in_lines(), progress_bar(unit="tensor") as bar:
            source = open_checkpoint(options.model)
            layout: CheckpointLayout = "native" if source.layout == "native" else "diffusers"
            target = adapted(source, list(dict.fromkeys(options.add)), options.seed)
            convert(target, options.out, layout, overwrite=options.overwrite, progress=bar)
    except UserError as error:
        print(f"dit-adapt: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dit-adapt: {error.filename or options.out}: {error.strerror or error}.", file=sys.stderr)
        return 2
    print(f"{options.out}: {layout} layout with {', '.join(options.add)}, {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
