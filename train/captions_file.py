"""A captions file: which medium is told by which words."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dit_jax.config import UserError

COLUMNS = ("file_name", "text")  # of the Hugging Face convention for folders of images and videos


class Caption(NamedTuple):
    """A medium, by its place in the folder of the media, and its caption."""

    file: str
    text: str


def read_captions(file: Path) -> list[Caption]:
    """The captions of a file of JSON lines, or of a .csv, with `file_name` and `text`; a medium may have several.

    Raises UserError naming the line that is none.
    """
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the captions in {str(file)!r}: {error}; expected JSON lines or a .csv") from error
    rows = _csv_rows(content, file) if file.suffix.lower() == ".csv" else _json_rows(content, file)
    captions = [_caption(row, f"{file}, line {line}") for line, row in rows]
    if not captions:
        raise UserError(f"{str(file)!r} holds no caption: expected one a line, with {' and '.join(COLUMNS)}")
    return captions


def _json_rows(content: str, file: Path) -> Iterator[tuple[int, Any]]:
    # Not splitlines: JSON strings may hold U+2028 and the like.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{file}, line {number} is no JSON ({error}): expected one object a line, with {' and '.join(COLUMNS)}"
            ) from error


def _csv_rows(content: str, file: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(content, newline=""))
    if not set(COLUMNS) <= set(reader.fieldnames or ()):
        raise UserError(
            f"{file} has the columns {', '.join(reader.fieldnames or ()) or 'none'}: expected {' and '.join(COLUMNS)} "
            "in its first line; add them"
        )
    for row in reader:
        yield reader.line_num, row


def _caption(row: Any, place: str) -> Caption:
    values = [row.get(name) for name in COLUMNS] if isinstance(row, dict) else [None]
    if not all(isinstance(value, str) for value in values) or not values[0]:
        raise UserError(f"{place} lacks {' or '.join(COLUMNS)}: expected both, as strings; mend that line")
    return Caption(*values)
