"""Uploads that are made to do harm: bombs, false claims, damage, ways to other files; time and memory are bounded."""

import random
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace

import av
import mutated_uploads
import pytest
from PIL import Image
from upload_checks import LIMITS, environment, like, picture_or_sentence, refused
from upload_files import HEIGHT, WIDTH, corners, encoded, many_samples, patched, referring, sound, video

from dit_jax.config import UserError
from infer import uploads
from infer.uploads import read_reference


@pytest.fixture(scope="module")
def files():
    return sound()


def png(width, height, rows=b""):
    """A PNG that says it is so large."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_pixel_bombs(files):
    small = replace(LIMITS, pixels=WIDTH * HEIGHT)
    smaller = replace(LIMITS, pixels=WIDTH * HEIGHT - 1)
    for name in ("plain.jpg", "lossless.webp", "grey.png", "h264.mp4"):
        assert read_reference(files[name], small).size == (WIDTH, HEIGHT)
        refused(files[name], f"{WIDTH}×{HEIGHT} pixels", "at most 6,143", limits=smaller)
    start = time.monotonic()
    refused(png(50_000, 50_000), "PNG upload is 50000×50000 pixels", "at most 16,777,216")
    refused(png(2**31 - 1, 2**31 - 1), "PNG")
    jpeg = files["plain.jpg"]
    frame = jpeg.index(b"\xff\xc0")
    refused(jpeg[: frame + 5] + b"\xff\xdc\xff\xdc" + jpeg[frame + 9 :], "JPEG upload is 65500×65500 pixels")
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\0" * 2
    webp = b"RIFF" + struct.pack("<I", 4 + len(canvas) + 8) + b"WEBP" + canvas + b"VP8 " + bytes(4)
    refused(webp, "WEBP")
    assert time.monotonic() - start < 60


def test_a_video_larger_than_its_header_says():
    large, small, tiny = corners(640, 640), replace(LIMITS, pixels=400_000), replace(LIMITS, pixels=100_000)
    for codec, box in (("h264", b"avc1"), ("vp9", b"vp09"), ("av1", b"av01"), ("hevc", b"hev1")):
        data = video(large, codec=codec)
        assert like(read_reference(data, LIMITS))
        start = data.index(b"stsd")
        lying = data[:start] + patched(data[start:], box, 24, struct.pack(">HH", 64, 64))
        refused(data, "640×640 pixels", limits=small)
        for limits in (small, tiny):
            refused(lying, "MP4 upload", limits=limits)


def test_a_video_whose_header_says_it_is_large(files):
    data, start = files["vp9.mp4"], files["vp9.mp4"].index(b"stsd")
    lying = data[:start] + patched(data[start:], b"vp09", 24, b"\xff\xff\xff\xff")
    assert picture_or_sentence(lying) is None or like(read_reference(lying, LIMITS))


def test_claims_of_four_gigabytes(files):
    """Every 32-bit size in an MP4, one after the other."""
    data = files["h264.mp4"]
    whole, start = read_reference(data, LIMITS).tobytes(), time.monotonic()
    for box in (b"ftyp", b"mdat", b"moov", b"trak", b"stsd", b"stts", b"stsz", b"stco", b"avcC"):
        place = data.index(box) - 4
        for claim in (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"):
            assert picture_or_sentence(data[:place] + claim + data[place + 4 :]) in (None, whole)
    refused(patched(data, b"stsz", 4, b"\0\0\0\0\xff\xff\xff\xff"), "damaged or incomplete")
    refused(b"\xff\xd8\xff\xe1\xff\xff", "damaged or incomplete")
    refused(b"RIFF\xff\xff\xff\xffWEBPVP8L\xff\xff\xff\xff/", "damaged or incomplete")
    refused(b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR", "damaged or incomplete")
    assert time.monotonic() - start < 120


def test_memory_is_bounded(files):
    """60 million samples in 2 KB: without bounds the reader takes 3.5 GB."""
    measured = (
        "import re, sys; from infer.uploads import *; from infer.uploads import _confine\n"
        "data, status = sys.stdin.buffer.read(), open('/proc/self/status'); _confine(UploadLimits())\n"
        "try: decoded(data, 'MP4', UploadLimits())\n"
        "except UserError: print(re.search(r'VmHWM:\\s+(\\d+)', status.read())[1])\n"
    )
    bomb = many_samples(files["h264.mp4"], 60_000_000)
    run = subprocess.run(
        [sys.executable, "-c", measured], input=bomb, env=environment(), capture_output=True, check=True
    )
    assert int(run.stdout) < LIMITS.memory / 1024
    refused(bomb, "MP4 upload")
    large = encoded(corners(2000, 2000), "PNG")
    refused(large, "PNG upload needs more than 20 s and 160 MiB", limits=replace(LIMITS, memory=160 * 2**20))
    assert like(read_reference(large, LIMITS))


def test_time_is_bounded():
    """A progressive JPEG of many scans over the same 16 million pixels."""
    jpeg = encoded(Image.new("L", (4000, 4000), 100), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    bomb = jpeg[:-2] + scan * (2**20 // len(scan)) + jpeg[-2:]
    start = time.monotonic()
    refused(bomb, "JPEG upload needs more than 2 s", limits=replace(LIMITS, seconds=2))
    assert time.monotonic() - start < 30


def test_a_decoder_that_dies_or_cannot_start(monkeypatch, files):
    def ended(code):
        monkeypatch.setattr(
            subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code, b"", b"why")
        )

    ended(-11)
    refused(files["grey.png"], "stops the decoder")
    ended(1)  # a fault of the installation, not of the upload
    with pytest.raises(RuntimeError, match="ended with 1: why"):
        read_reference(files["grey.png"], LIMITS)


def test_truncated_files(files):
    """A file without its end is refused; where only later frames are lost, the first is whole."""
    for name in ("plain.jpg", "grey.png", "lossless.webp", "h264.mp4"):
        whole = read_reference(files[name], LIMITS).tobytes()
        for part in (0.1, 0.5, 0.9):
            assert picture_or_sentence(files[name][: int(len(files[name]) * part)]) in (None, whole)
    picture = Image.effect_noise((WIDTH, HEIGHT), 90).convert("RGB")
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(picture, kind)
        for end in range(12, len(data) - 20, len(data) // 50):
            with pytest.raises(UserError):
                uploads.decoded(data[:end], kind, LIMITS)


def test_a_video_cut_off_behind_its_header(tmp_path):
    """The header first, as for the web, then ever less of the frames."""
    picture = Image.effect_noise((WIDTH, HEIGHT), 90).convert("RGB")
    (tmp_path / "plain.mp4").write_bytes(video(picture))
    options = {"movflags": "faststart"}
    with (
        av.open(str(tmp_path / "plain.mp4")) as source,
        av.open(str(tmp_path / "web.mp4"), "w", options=options) as web,
    ):
        stream = web.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                web.mux(packet)
    data = (tmp_path / "web.mp4").read_bytes()
    whole = uploads.decoded(data, "MP4", LIMITS).tobytes()
    assert data.index(b"moov") < data.index(b"mdat")
    ends = range(data.index(b"mdat"), len(data), len(data) // 100)
    found = {picture_or_sentence(data[:end], lambda part, limits: uploads.decoded(part, "MP4", limits)) for end in ends}
    assert found == {None, whole}


def test_a_video_does_not_lead_to_other_files(tmp_path, monkeypatch):
    (tmp_path / "secret.mp4").write_bytes(video())
    data = referring(video(), tmp_path / "secret.mp4")
    (tmp_path / "leads.mp4").write_bytes(data)
    followed = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(tmp_path / "leads.mp4"), options=followed) as container:  # where it is allowed, it works
        assert like(next(container.decode(video=0)).to_image())
    refused(data, "damaged or incomplete")
    asked = []
    monkeypatch.setattr(uploads, "_refused", lambda url, *_: asked.append(url))
    with pytest.raises(UserError):
        uploads.decoded(data, "MP4", LIMITS)
    assert asked == []


def test_a_video_that_is_led_elsewhere_finds_the_way_closed(tmp_path, monkeypatch):
    """The second lock: opening anything is refused, even where data references are followed."""
    (tmp_path / "secret.mp4").write_bytes(video())
    data, opened, asked = referring(video(), tmp_path / "secret.mp4"), av.open, []
    options = {"enable_drefs": "1", "use_absolute_path": "1"}
    refuse = uploads._refused
    monkeypatch.setattr(uploads, "_refused", lambda url, *rest: (asked.append(url), refuse(url, *rest)))
    monkeypatch.setattr(
        av, "open", lambda *rest, container_options, **named: opened(*rest, container_options=options, **named)
    )
    with pytest.raises(UserError):
        uploads.decoded(data, "MP4", LIMITS)
    assert asked == [str(tmp_path / "secret.mp4")]


def test_the_decoding_process_can_open_nothing(tmp_path):
    """The third lock, of the system."""
    code = (
        "import os, socket, sys; from infer.uploads import UploadLimits, _confine\n"
        "_confine(UploadLimits())\n"
        "for open_it in (lambda: open('/etc/passwd'), lambda: open(sys.argv[1], 'w'), socket.socket, os.pipe):\n"
        "    try: print(open_it())\n"
        "    except OSError as error: print(error.errno)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["24"] * 4  # too many open files


@pytest.mark.parametrize(("count", "seed"), [(250, 0), pytest.param(5000, 1, marks=pytest.mark.long)])
def test_mutants(tmp_path, files, count, seed):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, mutated_uploads.__file__, str(tmp_path), str(count), str(seed)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    pictures, refusals = map(int, run.stdout.split())
    assert pictures + refusals == count * len(files) and pictures > count and refusals > count


def test_mutants_through_the_process(files):
    for name, data in files.items():
        upload = mutated_uploads.mutant(data, random.Random(name))
        picture_or_sentence(upload)
