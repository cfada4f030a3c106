"""Pictures and videos that strangers upload: each becomes one picture, or one sentence that says why not.

Each is decoded in a process of its own, which can open no file and no connection and has little time and memory: an MP4
of 2 KB may have its reader build an index of 4 GB for half a minute, and no option forbids it.
"""

from __future__ import annotations

import importlib
import io
import resource
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import ExifTags, Image

from dit_jax.config import UserError

ACCEPTED = "a PNG, JPEG or WebP picture or an MP4 video"
LATE = (  # modules that are otherwise loaded when they are needed
    "PIL.MpoImagePlugin",
    "PIL.TiffImagePlugin",
    "PIL.WebPImagePlugin",
    "av.subtitles.codeccontext",
    "av.subtitles.stream",
)
CODECS = ("h264", "hevc", "vp9", "av1")
STILL_BRANDS = (b"avif", b"avis", b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """What one upload may take: bytes as sent, pixels of its picture, seconds and bytes of memory to decode it."""

    bytes: int = 32 * 2**20
    pixels: int = 2**24
    seconds: int = 20
    memory: int = 2**30


def read_reference(data: bytes, limits: UploadLimits) -> Image.Image:
    """The picture in an upload, or the first of several or of a video, in RGB and upright; else UserError.

    What is transparent is laid on white, 16 bits become 8, colour profiles and uneven pixels are taken for ordinary.
    """
    kind = _kind(data, limits)
    command = [sys.executable, "-m", "infer.uploads", kind, str(limits.pixels), str(limits.seconds), str(limits.memory)]
    home = Path(__file__).parents[1]
    try:
        run = subprocess.run(command, input=data, capture_output=True, cwd=home, timeout=limits.seconds)
    except subprocess.TimeoutExpired:
        raise _too_much(kind, limits) from None
    if run.returncode == 0:
        return Image.frombytes("RGB", struct.unpack(">II", run.stdout[:8]), run.stdout[8:])
    if run.returncode == 2:
        raise UserError(run.stdout.decode())
    if run.returncode < 0:
        raise _too_much(kind, limits)
    raise RuntimeError(f"decoding an upload ended with {run.returncode}: {run.stderr.decode(errors='replace')[-2000:]}")


def _kind(data: bytes, limits: UploadLimits) -> str:
    if not data:
        raise UserError(f"the upload is empty: expected {ACCEPTED}")
    if len(data) > limits.bytes:
        raise UserError(f"the upload has {len(data):,} bytes: expected at most {limits.bytes:,}; send a smaller one")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and data[8:12] not in STILL_BRANDS:
        return "MP4"
    raise UserError(f"the upload is of another type: expected {ACCEPTED}, found one that begins with {data[:12].hex()}")


def _too_much(kind: str, limits: UploadLimits) -> UserError:
    most = f"{limits.seconds} s and {limits.memory / 2**20:,.0f} MiB of memory"
    return UserError(
        f"the {kind} upload needs more than {most} to be decoded, or stops the decoder: send a simpler one"
    )


def decoded(data: bytes, kind: str, limits: UploadLimits) -> Image.Image:
    """What `read_reference` returns, or MemoryError; for a process that is bounded, since a decoder itself is not."""
    try:
        return _first_frame(data, limits) if kind == "MP4" else _picture(data, kind, limits)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever their damaged data leads them to
        raise UserError(f"the {kind} upload is damaged or incomplete: expected {ACCEPTED}, whole") from error


def _check_size(kind: str, width: int, height: int, limits: UploadLimits) -> None:
    if width * height > limits.pixels:
        raise UserError(
            f"the {kind} upload is {width}×{height} pixels: expected at most {limits.pixels:,} in all; send fewer"
        )


def _picture(data: bytes, kind: str, limits: UploadLimits) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=(kind,)) as image:
        _check_size(kind, *image.size, limits)
        image.load()
        orientation = _orientation(image)
        opaque = _opaque(image)
        return opaque.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else opaque


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif()[ExifTags.Base.Orientation]
    except Exception:  # there is none, or what stands for it is damaged: the picture may be sound all the same
        return 1


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image.info.pop("transparency", None)  # of 16 bits, which no conversion understands
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _first_frame(data: bytes, limits: UploadLimits) -> Image.Image:
    bounds = {"max_pixels": str(2 * limits.pixels)}  # of a frame with its margins, whatever the header says
    alone = {"enable_drefs": "0"}
    with av.open(
        io.BytesIO(data), "r", format="mp4", options=bounds, container_options=alone, io_open=_refused
    ) as video:
        contexts = [stream.codec_context for stream in video.streams.video]
        names = [context.codec.canonical_name if context else "an unknown codec" for context in contexts]
        chosen = next((place for place, name in enumerate(names) if name in CODECS), None)
        if chosen is None:
            found = ", ".join(names) or "no video"
            raise UserError(f"the MP4 upload holds {found}: expected video in {', '.join(CODECS)}")
        context = contexts[chosen]
        _check_size("MP4", context.width, context.height, limits)
        context.options, context.thread_count = bounds, 1
        frame = next(video.decode(video=chosen))
        if frame.is_corrupt:
            raise ValueError("the first frame is damaged")
        _check_size("MP4", frame.width, frame.height, limits)
        image = frame.to_image()
        return image.rotate(frame.rotation, expand=True) if frame.rotation % 90 == 0 else image


def _refused(url: str, *_) -> None:
    raise PermissionError(f"an upload refers to {url!r}")


def _confine(limits: UploadLimits) -> None:
    """Loads what decoding may need; from here on this process can open nothing, and has so much time and memory."""
    Image.preinit()
    for name in LATE:
        importlib.import_module(name)
    bounds = {
        resource.RLIMIT_NOFILE: 3,  # standard input, output and error are all
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limits.seconds,
        resource.RLIMIT_AS: limits.memory,
    }
    for bound, most in bounds.items():
        resource.setrlimit(bound, (most, most))


def _main(kind: str, pixels: int, seconds: int, memory: int) -> int:
    limits = UploadLimits(pixels=pixels, seconds=seconds, memory=memory)
    Image.MAX_IMAGE_PIXELS = None  # ours is checked, and told with the size that was found
    av.logging.set_level(None)
    data = sys.stdin.buffer.read()
    _confine(limits)
    try:
        image = decoded(data, kind, limits)
        answer, code = struct.pack(">II", *image.size) + image.tobytes(), 0
    except UserError as error:
        answer, code = str(error).encode(), 2
    except MemoryError:
        answer, code = str(_too_much(kind, limits)).encode(), 2
    sys.stdout.buffer.write(answer)
    return code


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], *map(int, sys.argv[2:])))
