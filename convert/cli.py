"""dit-convert: checkpoints between the layouts of diffusers, of the models' authors and of this project."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from convert.checkpoint import Checkpoint, CheckpointLayout, open_checkpoint
from convert.lora_backbones import is_lora
from convert.lora_export import convert_lora
from convert.lora_extract import convert_to_lora
from convert.lora_summary import summarise_lora
from convert.progress import progress_bar
from convert.sizes import parse_bytes
from convert.stopping import cleaned_up_when_stopped
from convert.summary import summarise
from convert.transfer import MAX_SHARD_BYTES, convert
from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError

_SOURCE = "folder, file of weights or of a LoRA, hub id org/name[@revision], demo-wan or demo-flux"


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 2 after one sentence on stderr for bad input.

    An interrupt or a polite kill raises SystemExit with 128 and the signal's number, once everything is cleaned up.
    """
    arguments = parser().parse_args(argv)
    try:
        with cleaned_up_when_stopped():
            if arguments.command == "inspect":
                _inspect(arguments.source, arguments.json)
            else:
                _convert(arguments)
    except UserError as error:
        print(f"dit-convert: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # A failing write names no file, a failing read does.
        place = error.filename or getattr(arguments, "destination", arguments.source)
        print(f"dit-convert: {place}: {error.strerror or error}.", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(prog="dit-convert", description=__doc__)
    commands = options.add_subparsers(dest="command", required=True)
    to_jax = commands.add_parser("to-jax", help="to a native checkpoint: the diffusers folder with Orbax weights")
    to_torch = commands.add_parser("to-torch", help="to safetensors that PyTorch code reads")
    for command in (to_jax, to_torch):
        command.add_argument("source", metavar="SRC", help=_SOURCE)
        command.add_argument("destination", metavar="DST", type=Path, help="folder to make")
        command.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already at DST")
        command.add_argument("--base", metavar="MODEL", help="name what this model has too, instead of copying it")
        command.add_argument(
            "--lora-rank", type=int, metavar="N",
            help="with --base: the transformer as the nearest LoRA of this rank, to be merged into the base's",
        )  # fmt: skip
    to_torch.add_argument("--layout", choices=("diffusers", "original"), default="diffusers")
    to_torch.add_argument("--allow-unmatched", action="store_true", help="leave out a LoRA's keys that match no layer")
    to_torch.add_argument(
        "--max-shard-size",
        type=parse_bytes,
        default=MAX_SHARD_BYTES,
        metavar="SIZE",
        help="split files above it (default 5GB)",
    )
    inspect = commands.add_parser("inspect", help="say what a checkpoint is")
    inspect.add_argument("source", metavar="SRC", help=_SOURCE)
    inspect.add_argument("--json", action="store_true", help="one JSON object")
    return options


def _convert(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    if is_lora(arguments.source):
        of_model = (arguments.base, arguments.lora_rank) != (None, None)
        if getattr(arguments, "layout", "native") != "diffusers" or of_model:
            raise UserError(
                f"{arguments.source} is a LoRA: expected `dit-convert to-torch --layout diffusers` without --base, the "
                "one form that LoRAs are written in; the file itself can be given to --lora."
            )
        with warnings_in_lines():
            file = convert_lora(arguments.source, arguments.destination, arguments.overwrite, arguments.allow_unmatched)
        print(f"{file}: diffusers style, {time.perf_counter() - start:.1f} s")
        return
    source = open_checkpoint(arguments.source)
    layout: CheckpointLayout = "native" if arguments.command == "to-jax" else arguments.layout
    if arguments.lora_rank is not None:
        _convert_to_lora(source, layout, arguments)
        return
    with progress_bar(unit="tensor") as bar:
        convert(
            source,
            arguments.destination,
            layout,
            overwrite=arguments.overwrite,
            max_shard_bytes=getattr(arguments, "max_shard_size", MAX_SHARD_BYTES),
            progress=bar,
            base=arguments.base,
        )
    print(f"{arguments.destination}: {layout} layout, {time.perf_counter() - start:.1f} s")


def _convert_to_lora(source: Checkpoint, layout: CheckpointLayout, arguments: argparse.Namespace) -> None:
    rank, base = arguments.lora_rank, arguments.base
    if base is None:
        raise UserError("--lora-rank goes with --base MODEL: what the LoRA is to be merged into")
    share = convert_to_lora(source, arguments.destination, layout, base, rank, overwrite=arguments.overwrite)
    print(f"{arguments.destination}: {base} and a LoRA of rank {rank}, {share:.1%} of the squared difference")


def _inspect(source: str, as_json: bool) -> None:
    summary = summarise_lora(source) if is_lora(source) else summarise(open_checkpoint(source))
    print(json.dumps(summary.as_dict()) if as_json else "\n".join(summary.lines()))


if __name__ == "__main__":
    sys.exit(main())
