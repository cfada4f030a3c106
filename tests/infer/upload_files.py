"""Uploads to try: sound pictures and videos, and ways to spoil an MP4's boxes."""

import io
import struct

import av
import numpy as np
from PIL import Image

ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
WIDTH, HEIGHT = 96, 64  # red above left, green above right, blue below left, white below right
CORNERS = {(0, 0): (250, 0, 0), (1, 0): (0, 250, 0), (0, 1): (0, 0, 250), (1, 1): (250, 250, 250)}


def corners(width=WIDTH, height=HEIGHT):
    picture = Image.new("RGB", (2, 2))
    for place, colour in CORNERS.items():
        picture.putpixel(place, colour)
    return picture.resize((width, height), Image.Resampling.NEAREST)


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def video(first=None, codec="h264", frames=8):
    """An MP4 whose first frame is given; it darkens."""
    first = np.asarray(first or corners())
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(ENCODERS.get(codec, codec), rate=8)
        stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], "yuv420p"
        stream.options = {"x265-params": "log-level=none"} if codec == "hevc" else {}
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(first // (number + 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def sound():
    """Name -> a sound upload of each kind."""
    picture = corners()
    files = {
        "grey.png": encoded(picture.convert("L"), "PNG"),
        "palette.png": encoded(picture.convert("P"), "PNG", transparency=1),
        "alpha.png": encoded(picture.convert("RGBA"), "PNG"),
        "plain.jpg": encoded(picture, "JPEG"),
        "progressive.jpg": encoded(picture.convert("CMYK"), "JPEG", progressive=True),
        "lossy.webp": encoded(picture, "WEBP"),
        "lossless.webp": encoded(picture.convert("RGBA"), "WEBP", lossless=True),
        "moving.webp": encoded(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)]),
    }
    return files | {f"{codec}.mp4": video(codec=codec) for codec in ENCODERS}


def patched(data, box, offset, new):
    """A file with other bytes so far after the name of its first box of that name."""
    place = data.index(box) + 4 + offset
    return data[:place] + new + data[place + len(new) :]


def many_samples(data, samples):
    """An MP4 that claims so many samples of one byte, all in its first chunk."""
    data = patched(data, b"stsz", 4, struct.pack(">II", 1, samples))
    return patched(data, b"stsc", 12, struct.pack(">I", samples))


def turned(data):
    """An MP4 that is to be shown a quarter further clockwise."""
    one = 0x10000
    return patched(data, b"tkhd", 40, struct.pack(">5i", 0, one, 0, -one, 0))


def referring(data, path):
    """An MP4 without a video of its own, whose samples lie in another file."""
    name = str(path).encode()
    name += b"\0" * (len(name) % 2)
    alias = bytes(150) + struct.pack(">HH", 2, len(name)) + name + b"\xff\xff\0\0"
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    at = data.index(b"dref") + 12  # of its only entry, twelve bytes long
    grown = data[:at] + entry + data[at + 12 :]
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = grown.index(box) - 4
        size = int.from_bytes(grown[place : place + 4], "big") + len(entry) - 12
        grown = grown[:place] + size.to_bytes(4, "big") + grown[place + 4 :]
    start, end = grown.index(b"mdat") + 4, grown.index(b"moov") - 4
    assert start < end
    return grown[:start] + bytes(end - start) + grown[end:]
