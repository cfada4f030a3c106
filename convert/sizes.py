"""Sizes of files as people write them."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str) -> int:
    """Bytes from `5GB`, for an option of a command; ArgumentTypeError for what is no size."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|TB)?", text.strip().upper())
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected a number with KB, MB, GB or TB, such as 5GB")
    return int(match[1]) * _UNITS[match[2] or ""]
