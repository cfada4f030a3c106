"""Pictures and videos that strangers upload: what they become, and what is refused."""

import io

import av
import numpy as np
import pytest
from PIL import Image
from upload_checks import CLOSE, LIMITS, like, refused
from upload_files import CORNERS, HEIGHT, WIDTH, corners, encoded, sound, turned, video

from infer import uploads
from infer.uploads import UploadLimits, read_reference

RESAVE = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}


@pytest.fixture(scope="module")
def files():
    return sound()


@pytest.mark.parametrize("kind", RESAVE)
def test_pictures(kind):
    picture = read_reference(encoded(corners(), kind, **RESAVE[kind]), LIMITS)
    assert picture.size == (WIDTH, HEIGHT) and like(picture, close=0 if kind != "JPEG" else CLOSE)


@pytest.mark.parametrize("codec", uploads.CODECS)
def test_videos(files, codec):
    picture = read_reference(files[f"{codec}.mp4"], LIMITS)
    assert picture.size == (WIDTH, HEIGHT) and like(picture)


@pytest.mark.parametrize("kind", RESAVE)
def test_of_many_pictures_the_first_counts(kind):
    many = {"save_all": True, "append_images": [corners().rotate(180)]}
    if kind == "JPEG":
        assert like(read_reference(encoded(corners(), "MPO", **many), LIMITS))
    else:
        assert like(read_reference(encoded(corners(), kind, **many, **RESAVE[kind]), LIMITS))


@pytest.mark.parametrize("kind", RESAVE)
def test_orientation(kind):
    for orientation, turn in uploads.UPRIGHT.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        stored = corners().transpose(_inverse(turn))
        picture = read_reference(encoded(stored, kind, exif=exif, **RESAVE[kind]), LIMITS)
        assert picture.size == (WIDTH, HEIGHT) and like(picture), orientation


def _inverse(turn):
    quarters = [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270]
    return quarters[1 - quarters.index(turn)] if turn in quarters else turn


def test_a_phone_s_upright_picture():
    """Orientation 6: the first stored row is the right side of what was seen."""
    exif = Image.Exif()
    exif[0x112] = 6
    picture = read_reference(encoded(corners(), "JPEG", exif=exif), LIMITS)
    quarter = {(1, 0): CORNERS[0, 0], (1, 1): CORNERS[1, 0], (0, 0): CORNERS[0, 1], (0, 1): CORNERS[1, 1]}
    assert picture.size == (HEIGHT, WIDTH) and like(picture, quarter)
    picture = read_reference(turned(video()), LIMITS)
    assert picture.size == (HEIGHT, WIDTH) and like(picture, quarter)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"\xff" * 100])
def test_exif_data_that_is_none_does_no_harm(exif):
    assert like(read_reference(encoded(corners(), "JPEG", exif=exif), LIMITS))


def test_kinds_of_colour(files):
    grey = {place: (round(0.299 * r + 0.587 * g + 0.114 * b),) * 3 for place, (r, g, b) in CORNERS.items()}
    assert like(read_reference(files["grey.png"], LIMITS), grey, 1)
    assert like(read_reference(encoded(corners().convert("1"), "PNG"), LIMITS), {(1, 1): (255, 255, 255)}, 0)
    assert like(read_reference(encoded(corners().quantize(4), "PNG"), LIMITS), close=1)
    assert like(read_reference(encoded(corners().convert("CMYK"), "JPEG"), LIMITS))
    deep = np.asarray(corners().convert("L")).astype(np.uint16) * 257
    assert like(read_reference(encoded(Image.fromarray(deep), "PNG"), LIMITS), grey, 1)
    assert like(read_reference(encoded(Image.fromarray(deep), "PNG", transparency=0), LIMITS), grey, 1)


def test_what_is_transparent_is_white():
    picture = corners().convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, WIDTH // 2, HEIGHT // 2))
    picture.paste((0, 0, 0, 51), (WIDTH // 2, 0, WIDTH, HEIGHT // 2))
    expected = CORNERS | {(0, 0): (255,) * 3, (1, 0): (204,) * 3}
    for kind in ("PNG", "WEBP"):
        assert like(read_reference(encoded(picture, kind, **RESAVE[kind]), LIMITS), expected, 1)
    palette = encoded(corners().quantize(4), "PNG", transparency=corners().quantize(4).getpixel((0, 0)))
    assert like(read_reference(palette, LIMITS), CORNERS | {(0, 0): (255,) * 3}, 1)
    half = encoded(corners().convert("LA"), "PNG")
    assert read_reference(half, LIMITS).mode == "RGB"


OTHER_TYPES = {
    "gif": encoded(corners(), "GIF"),
    "tiff": encoded(corners(), "TIFF"),
    "bmp": encoded(corners(), "BMP"),
    "eps": encoded(corners(), "EPS"),
    "pdf": encoded(corners(), "PDF"),
    "avif": b"\0\0\0 ftypavif" + bytes(100),
    "heic": b"\0\0\0 ftypheic" + bytes(100),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "playlist": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/secret\n",
    "script": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "text": b"hello",
    "one byte": b"\x89",
}


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_other_types(name):
    refused(
        OTHER_TYPES[name], "another type", "PNG, JPEG or WebP picture or an MP4 video", OTHER_TYPES[name][:12].hex()
    )


def test_a_kind_is_decoded_as_nothing_else():
    """The first bytes choose the decoder, whatever follows them."""
    for start in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"\0\0\0 ftypisom"):
        for rest in (encoded(corners(), "GIF"), encoded(corners(), "TIFF"), OTHER_TYPES["playlist"], b""):
            refused(start + rest, "damaged or incomplete")


def test_videos_of_other_codecs_and_without_video(tmp_path):
    refused(video(codec="mpeg4"), "holds mpeg4", "expected video in h264, hevc, vp9, av1")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    refused(file.getvalue(), "holds no video")


def test_size_in_bytes():
    refused(b"", "the upload is empty")
    refused(bytes(1001), "1,001 bytes", "at most 1,000", limits=UploadLimits(bytes=1000))
