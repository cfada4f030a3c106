"""`dit-encode`: training data from media and captions: latents, text and image embeddings, in shards with a manifest.

dit-encode --model demo-wan --videos clips --captions clips/metadata.jsonl --out data
dit-encode --model demo-flux --images pictures --captions captions.csv --buckets 128x128,96x160 --out data

Run it again and it goes on where it was stopped. Media that cannot be used are warned of and listed in the manifest.
docs/data.md tells the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from convert.stopping import cleaned_up_when_stopped
from convert.warning_lines import warnings_in_lines
from dit_jax.config import UserError
from infer.caches import keep_compiled_programs

BATCHES = {True: 1, False: 8}  # videos, pictures
PORTION = 256


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dit-encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", required=True, help="a checkpoint folder, a hub id org/name[@revision], demo-flux or demo-wan")
    media = options.add_mutually_exclusive_group(required=True)
    media.add_argument("--videos", type=Path, metavar="DIR", help="folder of the videos")
    media.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures")
    add("--captions", required=True, type=Path, metavar="F", help="JSON lines, or a .csv, with file_name and text")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to make, or to go on with")
    add(
        "--buckets", default="model", metavar="SHAPES",
        help="shapes to crop to: WIDTHxHEIGHTxFRAMES joined by commas (of pictures WIDTHxHEIGHT), or the usual aspect "
        "ratios at the area of 480p, 720p, 1024 or the model (default)",
    )  # fmt: skip
    add("--fps", type=float, metavar="N", help="frames a second that videos are brought to (default: the model's)")
    add("--batch", type=int, metavar="N", help="examples encoded at a time (default: 1 video, 8 pictures)")
    add(
        "--shard-size", type=int, default=PORTION, metavar="N",
        help=f"captions that are done or not done as one, and make one shard of each bucket (default {PORTION})",
    )  # fmt: skip
    add("--part", default="1/1", metavar="I/N", help="of N hosts, make what is host I's (from 1) alone")
    add("--mesh", metavar="AXES", help="devices by axis, such as data=4")
    add("--json", action="store_true", help="print one JSON object")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    try:
        with warnings_in_lines(), cleaned_up_when_stopped():
            report = encode(options)
    except UserError as error:
        print(f"dit-encode: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dit-encode: {error.filename or options.out}: {error.strerror or error}.", file=sys.stderr)
        return 2
    print(json.dumps(report) if options.json else _sentence(options, report))
    return 0


def encode(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the parsed command; returns what `--json` prints."""
    began = time.perf_counter()
    folder: Path = options.videos or options.images
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: expected one of media; name another")
    _check_numbers(options)
    part, parts = _part(options.part)
    from train.captions_file import read_captions

    captions = read_captions(options.captions)

    from dit_jax.sharding import make_mesh, parse_mesh
    from train.buckets import parse_buckets
    from train.encoders import load_encoders
    from train.encoding import Encoding, Job

    keep_compiled_programs()
    video = options.videos is not None
    encoders = load_encoders(options.model, make_mesh(parse_mesh(options.mesh)) if options.mesh else None)
    if video and not encoders.defaults.video:
        raise UserError(f"{options.model} makes pictures, found --videos: expected --images; or choose a video model")
    job = Job(
        out=options.out,
        media=folder,
        captions=captions,
        buckets=parse_buckets(options.buckets, encoders.defaults, encoders.limits, video=video),
        batch=options.batch or BATCHES[video],
        portion=options.shard_size,
        fps=(options.fps or float(encoders.defaults.fps)) if video else 0.0,
    )
    manifest = Encoding(job, encoders).run(job.of_part(part, parts))
    report: dict[str, Any] = {"finished": manifest is not None, "seconds": round(time.perf_counter() - began, 1)}
    if manifest is None:
        return report
    of_buckets = {bucket.name: 0 for bucket in manifest.buckets}
    for shard in manifest.shards:
        of_buckets[shard.bucket] += shard.records
    counts = {"examples": manifest.examples, "shards": len(manifest.shards), "skipped": len(manifest.skipped)}
    return report | counts | {"buckets": of_buckets}


def _check_numbers(options: argparse.Namespace) -> None:
    for name, value in (("--batch", options.batch), ("--shard-size", options.shard_size), ("--fps", options.fps)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} is {value}: expected a number above 0; change it")
    if options.images and options.fps:
        raise UserError("--fps is for videos, found --images: leave it out")


def _part(text: str) -> tuple[int, int]:
    """`2/4` -> (1, 4)."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise UserError(f"--part {text!r} is not understood: expected I/N with I from 1 to N, such as 2/4")
    return int(number) - 1, int(count)


def _sentence(options: argparse.Namespace, report: dict[str, Any]) -> str:
    if not report["finished"]:
        return (
            f"{options.out}: part {options.part} is done, {report['seconds']} s; the manifest is written by whoever "
            "finds that the other parts are there"
        )
    used = sum(count > 0 for count in report["buckets"].values())
    return (
        f"{options.out}: {report['examples']} examples in {used} buckets and {report['shards']} shards, "
        f"{report['skipped']} media left out, {report['seconds']} s"
    )


if __name__ == "__main__":
    sys.exit(main())
