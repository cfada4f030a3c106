"""Videos and images in and out of files. Frames are uint8 [T, H, W, 3]."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from dit_jax.config import UserError

VIDEO_CODECS = {".mp4": "libx264", ".mov": "libx264", ".webm": "libvpx-vp9"}
IMAGE_TYPES = (".png",)
AVX2 = "MMX2,SSE2Fast,SSSE3,SSE4.2,AVX,FMA3,BMI2,AVX2"  # as x264 names what it may use
ANIMATIONS = (".gif", ".webp")
IN_EXIF = (".webp", ".jpg", ".jpeg")  # where the comment is UTF-8
MOST_JPEG_EXIF = 65_000  # bytes of a comment: with what is around it a JPEG's segment takes 65,533


def check_output(path: Path | str, frames: int | None = None) -> None:
    """Refuses an output name whose type cannot be written, before any work is done."""
    suffix = Path(path).suffix.lower()
    kinds = [*VIDEO_CODECS, *ANIMATIONS, *IMAGE_TYPES]
    if suffix not in kinds:
        raise UserError(
            f"cannot write {str(path)!r}: expected a name ending in {', '.join(kinds)}, found {suffix or 'no suffix'!r}"
        )
    if suffix in IMAGE_TYPES and frames not in (None, 1):
        raise UserError(
            f"cannot write {frames} frames to {str(path)!r}: a {suffix} holds one; name an .mp4 or ask for --frames 1"
        )


def make_room(path: Path | str) -> None:
    """Makes the folder of an output and tries to write there; UserError where that or the name itself is refused."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        reason = f"{path.parent} is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise UserError(
            f"cannot write {str(path)!r} ({reason}): expected a file name in a folder that can be "
            "written to; name another"
        ) from error


def save(path: Path | str, frames: np.ndarray, fps: int, metadata: dict[str, Any]) -> None:
    """Writes frames as the name's suffix says, with the metadata as JSON in the file's comment."""
    path = Path(path)
    check_output(path, len(frames))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, however long the name: a file system takes 255 bytes.
    partial = path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:16]}.partial{path.suffix}")
    try:
        if path.suffix.lower() in VIDEO_CODECS:
            _save_video(partial, frames, fps, json.dumps(metadata, sort_keys=True))
        else:
            _save_images(partial, frames, fps, metadata)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _save_video(path: Path, frames: np.ndarray, fps: int, comment: str) -> None:
    codec = VIDEO_CODECS[path.suffix.lower()]
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = comment
        stream = cast(av.VideoStream, container.add_stream(codec, rate=Fraction(fps)))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = _options(codec)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            # Left to the encoder, some of a hundred of these conversions come out otherwise when cores are busy.
            container.mux(stream.encode(picture.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())


def _options(codec: str) -> dict[str, Any]:
    """High quality. x264's code for AVX-512 makes another file of the same frames in some of a thousand tries, its code
    for AVX2 does not."""
    if codec != "libx264":
        return {"crf": "20"}
    return {"crf": "12"} | ({"x264-params": f"asm={AVX2}"} if _has_avx512() else {})


@lru_cache(maxsize=1)
def _has_avx512() -> bool:
    file = Path("/proc/cpuinfo")
    return file.exists() and " avx512f " in file.read_text()


def _save_images(path: Path, frames: np.ndarray, fps: int, metadata: dict[str, Any]) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    options = with_comment(path.suffix.lower().removeprefix("."), metadata)
    if path.suffix.lower() in ANIMATIONS:
        options |= {"save_all": True, "append_images": images[1:], "duration": round(1000 / fps), "loop": 0}
    if path.suffix.lower() == ".webp":
        options["lossless"] = True
    images[0].save(path, **options)


def with_comment(kind: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """What tells Pillow to put metadata into the comment of a png, gif, webp or jpeg, of which the last may hold less:
    the negative prompt is left out first, then the prompt, then whatever is longest."""
    comment = json.dumps(metadata, sort_keys=True)
    if kind == "png":
        text = PngInfo()
        text.add_text("Comment", comment)
        return {"pnginfo": text}
    if kind == "gif":
        return {"comment": comment.encode()}
    exif, kept = Image.Exif(), dict(metadata)
    while len(shown := _utf8(kept)) > MOST_JPEG_EXIF and kind == "jpeg":
        del kept[max(kept, key=lambda name: (name == "negative_prompt", name == "prompt", len(str(kept[name]))))]
    exif[ExifTags.Base.ImageDescription] = shown
    return {"exif": exif}


def _utf8(metadata: dict[str, Any]) -> bytes:
    """JSON that takes a third of the bytes of escaped emoji; halves of characters stay escaped."""
    return json.dumps(metadata, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace")


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The metadata that `save` or the server put into a file."""
    path = Path(path)
    if path.suffix.lower() in (*IMAGE_TYPES, *ANIMATIONS, *IN_EXIF):
        with Image.open(path) as image:
            return json.loads(_image_comment(image))
    with av.open(str(path)) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}
        return json.loads(tags["comment"])


def _image_comment(image: Image.Image) -> str | bytes:
    if image.format in ("WEBP", "JPEG"):
        return image.getexif()[ExifTags.Base.ImageDescription].encode("latin-1")  # as which Pillow reads it
    return image.info["comment" if image.format == "GIF" else "Comment"]


def open_image(path: Path | str) -> Image.Image:
    """An RGB image from a file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the image {str(path)!r}: {error}; give a PNG, JPEG or WebP file") from error
