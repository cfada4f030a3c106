"""Requests that no server should serve: each must be refused with a 4xx."""

from __future__ import annotations

import functools
import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

IMAGES, VIDEOS = "/v1/images/generations", "/v1/videos"
NOWHERE = "video_" + "0" * 32
Call = dict[str, Any]  # what httpx's `request` takes

CHANGED: Mapping[str, Mapping[str, Any]] = {
    "an empty prompt": {"prompt": ""},
    "a prompt in a list": {"prompt": ["a red 7"]},
    "a prompt with half a character": {"prompt": "a red \ud800"},
    "a long prompt": {"prompt": "a red 7 " * 1000},
    "a prompt of a megabyte": {"prompt": "7" * 2**20},
    "an unknown option": {"sise": "64x64"},
    "an unknown model": {"model": "no-such-model"},
    "an unknown size": {"size": "127x131"},
    "a size in words": {"size": "large"},
    "a size of nothing": {"size": "0x128"},
    "a size without end": {"size": "9" * 400 + "x64"},
    "a size in powers": {"size": "²x²"},
    "an unknown quality": {"quality": "divine"},
    "an unknown plan": {"plan": "no-such-method:1"},
    "a plan that names a file": {"plan": "coredit:/etc/passwd"},
    "a plan that names a device": {"plan": "coredit:/dev/zero"},
    "a plan that is infinite": {"plan": "magcache:1:k=inf"},
    "steps that are not served": {"num_inference_steps": 999},
    "a seed in words": {"seed": "seven"},
    "a seed below 0": {"seed": -1},
    "a guidance scale that is no number": {"guidance_scale": float("nan")},
}
BODIES: Mapping[str, bytes] = {
    "no body": b"",
    "JSON that ends early": b'{"prompt": "a red 7", "si',
    "JSON that is a list": b"[1, 2]",
    "JSON without a prompt": b"{}",
    "JSON that is no UTF-8": b'{"prompt": "\xff\xfe"}',
    "JSON 50,000 lists deep": b"[" * 50_000,
}


@functools.cache
def png(size: str) -> bytes:
    """A picture WIDTHxHEIGHT as a PNG."""
    width, height = map(int, size.split("x"))
    file = io.BytesIO()
    Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(file, "PNG")
    return file.getvalue()


@functools.cache
def _bomb() -> bytes:
    """A small PNG whose header claims 50,000 pixels a side."""
    whole = png("64x64")
    header = whole[12:16] + struct.pack(">II", 50_000, 50_000) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def _uploaded(data: bytes) -> Call:
    files = {"prompt": (None, "a red 7"), "input_reference": ("picture.png", data, "image/png")}
    return {"method": "POST", "url": VIDEOS, "files": files}


def _posted(told: Mapping[str, Any], url: str = VIDEOS, method: str = "POST") -> Call:
    return {"method": method, "url": url, "json": {"prompt": "a red 7", **told}}


def _form(content: bytes, boundary: str = "") -> Call:
    headers = {"Content-Type": f"multipart/form-data{boundary}"}
    return {"method": "POST", "url": VIDEOS, "content": content, "headers": headers}


OTHERS: Mapping[str, Callable[[], Call]] = {
    "a wrong method": lambda: _posted({}, method="PUT"),
    "an unknown route": lambda: _posted({}, VIDEOS + "/make/one"),
    "an unknown video": lambda: {"method": "GET", "url": f"{VIDEOS}/{NOWHERE}"},
    "the content of an unknown video": lambda: {"method": "GET", "url": f"{VIDEOS}/{NOWHERE}/content"},
    "a cancel of an unknown video": lambda: {"method": "POST", "url": f"{VIDEOS}/{NOWHERE}/cancel"},
    "a path in place of an id": lambda: {"method": "GET", "url": VIDEOS + "/..%2F..%2Fetc%2Fpasswd/content"},
    "a page of a million": lambda: {"method": "GET", "url": VIDEOS, "params": {"limit": 1_000_000}},
    "frames and seconds": lambda: _posted({"frames": 17, "seconds": 1}),
    "a reference elsewhere": lambda: _posted({"input_reference": "http://192.0.2.1/picture.png"}),
    "a reference to a file": lambda: _posted({"input_reference": "file:///etc/passwd"}),
    "a form with another boundary": lambda: _form(b"--one\r\nname: value\r\n\r\na red 7", "; boundary=two"),
    "a form without a boundary": lambda: _form(b"prompt=a red 7"),
    "a PNG that ends early": lambda: _uploaded(png("64x64")[:-40]),
    "a PNG of 2.5 gigapixels": lambda: _uploaded(_bomb()),
    "an upload that is no picture": lambda: _uploaded(b"MZ" + bytes(1000)),
}
BAD = (*CHANGED, *BODIES, *OTHERS)


def bad_call(name: str, sound: Mapping[str, Any], video: bool) -> Call:
    """The malformed request of that name, made of what a sound one says."""
    if name in OTHERS:
        return OTHERS[name]()
    body = BODIES[name] if name in BODIES else json.dumps({**sound, **CHANGED[name]}).encode()
    headers = {"Content-Type": "application/json"}
    return {"method": "POST", "url": VIDEOS if video else IMAGES, "content": body, "headers": headers}
