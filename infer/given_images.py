"""`--image` and `--last-image` of a command: what its videos begin and end with."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


def image_options(options: argparse.ArgumentParser) -> None:
    """Adds both options."""
    add = options.add_argument
    each = "one for all prompts, or one for each in their order"
    add("--image", nargs="+", metavar="FILE", help=f"the first frame, for an image-to-video model: {each}")
    add("--last-image", nargs="+", metavar="FILE", help="likewise the last frame, for a model that draws between two")


def given_images(options: argparse.Namespace) -> dict[str, Any]:
    """`image` and `last_image` of a `Request`; UserError for a file that cannot be read."""
    return {"image": _opened(options.image), "last_image": _opened(options.last_image)}


def _opened(files: list[str] | None) -> Image | list[Image] | None:
    from infer.media import open_image

    images = [open_image(file) for file in files or []]
    return images[0] if len(images) == 1 else images or None
