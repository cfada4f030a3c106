"""Writes made-up training media with captions, as `dit-encode` reads them: clips of moving digits, or pictures.

Some of the captions are also in prompts.txt, one a line, for commands that calibrate on prompts.

python -m train.demo_media --clips 256 --out clips
python -m train.demo_media --pictures 256 --out pictures
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from convert.progress import progress_bar
from dit_jax.config import UserError
from infer.digit_pictures import make_pictures
from infer.media import save
from infer.moving_digits import make_clips

CAPTIONS = "metadata.jsonl"
PROMPTS, PROMPT_COUNT = "prompts.txt", 32  # some of the captions, to calibrate on
FPS = 8
VIDEO_SETTINGS = {"source": "train.demo_media"}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    parser = argparse.ArgumentParser("python -m train.demo_media", description=(__doc__ or "").partition("\n")[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--clips", type=int, metavar="N", help="videos of 17 frames of 128x128 pixels")
    kind.add_argument("--pictures", type=int, metavar="N", help="pictures of 128x128 pixels")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="other media (default 0)")
    options = parser.parse_args(arguments)
    try:
        write(options.out, options.clips or options.pictures, bool(options.clips), options.seed)
    except (UserError, OSError) as error:
        print(f"demo_media: {error}", file=sys.stderr)
        return 2
    return 0


def write(out: Path, count: int, clips: bool, seed: int) -> None:
    """`count` files and their captions in a new or old folder; UserError for no files."""
    if count < 1:
        raise UserError(f"{count} files are none: expected 1 or more")
    out.mkdir(parents=True, exist_ok=True)
    told = []
    for index in progress_bar(range(count), desc=str(out), unit="file"):
        if clips:
            made, captions, _ = make_clips(seed, [index], "train")
            name, frames = f"{index:06d}.mp4", made[0]
        else:
            made, captions, _ = make_pictures(seed, [index], "train")
            name, frames = f"{index:06d}.png", made
        save(out / name, frames, FPS, VIDEO_SETTINGS)
        told.append({"file_name": name, "text": captions[0]})
    prompts = dict.fromkeys(line["text"] for line in told)
    (out / PROMPTS).write_text("\n".join([*prompts][:PROMPT_COUNT]) + "\n", encoding="utf-8")
    (out / CAPTIONS).write_text("".join(json.dumps(line) + "\n" for line in told), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
