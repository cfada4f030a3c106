"""`--guidance`, `--true-cfg` and `--shift` of a command: how samples are guided, and where noise levels lie."""

from __future__ import annotations

import argparse
from typing import Any


def scale_options(options: argparse.ArgumentParser) -> None:
    """Adds the three options."""
    add = options.add_argument
    add(
        "--guidance", metavar="G",
        help="guidance scale; 1 turns guidance off; HIGH,LOW for the two experts of Wan 2.2 (default: the model's)",
    )  # fmt: skip
    add(
        "--true-cfg", type=float, metavar="G",
        help="FLUX: scale of real guidance against the negative prompt; 1 is off (default: the model's)",
    )  # fmt: skip
    shift_option(options)


def shift_option(options: argparse.ArgumentParser) -> None:
    """Adds `--shift` alone."""
    options.add_argument(
        "--shift", type=float, metavar="S", help="constant shift of the noise levels (default: the model's)"
    )


def given_scales(options: argparse.Namespace) -> dict[str, Any]:
    """`guidance`, `true_cfg` and `shift` of a `Request`; UserError for a guidance that is no number or pair."""
    from infer.request import parse_guidance

    guidance = parse_guidance(options.guidance) if options.guidance else None
    return {"guidance": guidance, "true_cfg": options.true_cfg, "shift": options.shift}
