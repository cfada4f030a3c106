"""Writes a small random LoRA of a model's transformer, to try the commands on:
`python -m convert.example_lora demo-wan out/example.safetensors`. `to-torch` then turns it into diffusers' style."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from convert.checkpoint import open_checkpoint
from convert.lora_keys import Module, Target
from convert.safetensors_files import Outgoing, write_safetensors
from dit_jax.config import UserError

PREFIXES = {"kohya": "lora_unet_", "comfyui": "diffusion_model."}


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 2 after one sentence on stderr for bad input."""
    parser = argparse.ArgumentParser(prog="python -m convert.example_lora", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder, a hub id, or demo-wan")
    parser.add_argument("file", metavar="FILE", type=Path, help="the .safetensors to write")
    parser.add_argument("--style", choices=sorted(PREFIXES), default="kohya")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        write_example(arguments.model, arguments.file, arguments.style, arguments.rank, arguments.seed)
    except UserError as error:
        print(f"example_lora: {error}", file=sys.stderr)
        return 2
    return 0


def write_example(model: str | Path, file: Path, style: str, rank: int = 4, seed: int = 0) -> None:
    """A random LoRA of every linear map in the blocks, with alpha twice the rank. Raises UserError if `file` exists."""
    if file.exists() or rank < 1:
        raise UserError(f"{file} exists or rank {rank} is below 1; expected a new file and a rank; choose others.")
    target = Target.of(open_checkpoint(model).component("transformer"))
    rng, tensors = np.random.default_rng(seed), []
    for module in target.modules.values():
        if module.layout != "original" or not module.is_matrix or "{i}" not in module.name:
            continue
        for block, (outputs, inputs) in enumerate(_block_shapes(target, module)):
            name = module.name.replace("{i}", str(block))
            key = PREFIXES[style] + (name.replace(".", "_") if style == "kohya" else name)
            down = rng.standard_normal((rank, inputs), np.float32) * inputs**-0.5
            up = rng.standard_normal((outputs, rank), np.float32) * rank**-0.5
            tensors += [_held(f"{key}.lora_down.weight", down), _held(f"{key}.lora_up.weight", up)]
            tensors.append(_held(f"{key}.alpha", np.array(2 * rank, np.float32)))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(file, tensors)


def _block_shapes(target: Target, module: Module) -> list[tuple[int, ...]]:
    row = module.weight[0]
    shape = (target.shapes or {})[row.ours]
    return [row.outside_shape(shape[1:], module.layout)] * shape[0]


def _held(key: str, array: np.ndarray) -> Outgoing:
    return Outgoing(key, array.dtype, array.shape, lambda: array)


if __name__ == "__main__":
    sys.exit(main())
