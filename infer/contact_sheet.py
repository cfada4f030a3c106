"""One picture that shows a whole video: its frames side by side under its caption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _FAINT = (250, 250, 248), (25, 25, 30), (120, 120, 125)
_GAP, _BORDER = 8, 24
_CELL = 256
_MOST = 24


def contact_sheet(frames: np.ndarray, caption: str, path: str | Path, columns: int | None = None) -> Path:
    """Write the frames uint8 [T, H, W, 3] of a video, numbered, and its caption to a PNG; returns the path.

    Small frames are enlarged by a whole factor (128-pixel ones twice) and large ones shrunk, to about 256 pixels. Of
    more than 24 frames, 24 evenly spaced ones are shown. `columns` is the number of frames in a row: 6 by default.
    """
    shown = np.linspace(0, len(frames) - 1, min(len(frames), _MOST)).round().astype(int)
    columns = max(1, min(columns or 6, len(shown)))
    rows = -(-len(shown) // columns)
    width, height = _cell_size(frames.shape[2], frames.shape[1])
    title_font, number_font = ImageFont.load_default(size=26), ImageFont.load_default(size=15)
    across = max(columns * (width + _GAP) - _GAP, 480)
    title = _wrapped(caption, title_font, across)
    top = _BORDER + 34 * len(title) + 10
    row_height = height + 22 + _GAP
    sheet = Image.new("RGB", (across + 2 * _BORDER, top + rows * row_height - _GAP + _BORDER), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, text in enumerate(title):
        draw.text((_BORDER, _BORDER - 6 + 34 * line), text, font=title_font, fill=_INK)
    sampling = Image.Resampling.NEAREST if width >= frames.shape[2] else Image.Resampling.LANCZOS
    for place, index in enumerate(shown):
        x = _BORDER + place % columns * (width + _GAP)
        y = top + place // columns * row_height
        sheet.paste(Image.fromarray(np.asarray(frames[index])).resize((width, height), sampling), (x, y))
        draw.text((x + 1, y + height + 2), f"{index + 1} / {len(frames)}", font=number_font, fill=_FAINT)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
    return path


def _cell_size(width: int, height: int) -> tuple[int, int]:
    longer = max(width, height)
    if longer <= _CELL:
        return width * (_CELL // longer), height * (_CELL // longer)
    return max(1, round(width * _CELL / longer)), max(1, round(height * _CELL / longer))


def _wrapped(text: str, font, width: int) -> list[str]:
    """The text in lines no wider than `width` pixels (a longer word stands alone)."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
