"""Media brought to a bucket's shape, and those that no example can be made of."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from infer import media
from infer.moving_digits import ClipSpec, make_clips
from infer.similarity import psnr
from train.buckets import Bucket
from train.media_files import IMAGES, VIDEOS, UnusableError, media_in, place_of, read_picture, read_video

SQUARE, WIDE, SHORT = (Bucket(width=w, height=64, frames=f) for w, f in ((64, 9), (96, 9), (64, 5)))


@pytest.fixture(scope="module")
def clip():
    return make_clips(3, [0], "train", ClipSpec(frames=17, size=64))[0][0]


@pytest.fixture(scope="module")
def noise():
    """Frames that hardly compress, so that damage to a file is damage to them."""
    return np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)


def saved(path, frames, fps=8):
    media.save(path, frames, fps, {})
    return path


def encoded(path, frames, *, fps=8, options=None, **settings):
    """An MP4 whose codec and stream are told more than `media.save` tells them."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": "5"}
        if "rotation" in settings:
            stream.set_display_rotation(settings["rotation"])
        if "shape" in settings:
            stream.codec_context.sample_aspect_ratio = settings["shape"]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mov", "webm"])
def test_a_video_at_its_own_rate_is_itself(suffix, clip, tmp_path):
    bucket, frames = read_video(saved(tmp_path / f"a.{suffix}", clip), [SHORT, SQUARE], 8)
    assert bucket == SQUARE and frames.dtype == np.uint8
    assert frames.shape == (9, 64, 64, 3) and psnr(frames, clip[:9]) > 31  # chroma has half the resolution


@pytest.mark.parametrize(("fps", "expected"), [(4, [0, 2, 4, 6, 8]), (12, [0, 1, 1, 2, 3]), (16, [0, 0, 1, 1, 2])])
def test_another_rate_takes_the_frames_nearest_in_time(fps, expected, noise, tmp_path):
    _, frames = read_video(encoded(tmp_path / "a.mp4", noise[:9]), [SHORT], fps)
    gaps = np.abs(frames[:, None].astype(float) - noise[None, :9]).mean((2, 3, 4))
    found = gaps.argmin(1)
    ties = {(12, 1): (1, 2), (16, 1): (0, 1), (16, 3): (1, 2)}  # times in the middle of two frames
    assert all(one in ties.get((fps, k), (expected[k],)) for k, one in enumerate(found)), found


def test_rates_that_a_container_rounds_lose_no_frame(noise, tmp_path):
    """24 frames a second are no whole milliseconds, and 9 of them have to be 9."""
    _, frames = read_video(saved(tmp_path / "a.webm", noise[:9], fps=24), [SQUARE], 24)
    assert len(frames) == 9


def test_what_is_too_wide_loses_its_sides(clip, tmp_path):
    wide = np.concatenate([np.full_like(clip[:, :, :32], 255), clip, np.zeros_like(clip[:, :, :32])], axis=2)
    _, frames = read_video(saved(tmp_path / "a.mp4", wide), [SQUARE], 8)
    assert psnr(frames, clip[:9]) > 30
    large = clip.repeat(2, axis=1).repeat(2, axis=2)
    bucket, frames = read_video(saved(tmp_path / "b.mp4", large), [SQUARE, WIDE], 8)
    assert bucket == SQUARE and psnr(frames, clip[:9]) > 26


def test_what_is_cropped_is_the_middle(tmp_path):
    """A picture of its own coordinates: columns in red, rows in green."""
    rows, columns = np.mgrid[:160, :240]
    Image.fromarray(np.stack([columns, rows, rows * 0], -1).astype(np.uint8)).save(tmp_path / "a.png")
    for width, height, left, top in ((160, 160, 40, 0), (240, 80, 0, 40), (240, 160, 0, 0), (100, 160, 70, 0)):
        _, frames = read_picture(tmp_path / "a.png", [Bucket(width=width, height=height, frames=1)])
        np.testing.assert_array_equal(frames[0, 0, :, 0], np.arange(left, left + width))
        np.testing.assert_array_equal(frames[0, :, 0, 1], np.arange(top, top + height))


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_a_turned_video_is_turned_back(rotation, clip, tmp_path):
    tall = clip[:, :, 8:56]
    stored = np.rot90(tall, -rotation // 90, axes=(1, 2))
    bucket, frames = read_video(
        encoded(tmp_path / "a.mp4", stored, rotation=rotation),
        [Bucket(width=48, height=64, frames=9), Bucket(width=64, height=48, frames=9)], 8,
    )  # fmt: skip
    assert bucket.size == (48, 64) and psnr(frames, tall[:9]) > 30


def test_pixels_that_are_not_square_are_stretched(clip, tmp_path):
    narrow = clip[:, :, ::2]
    bucket, frames = read_video(encoded(tmp_path / "a.mp4", narrow, shape=Fraction(2)), [SQUARE, WIDE], 8)
    assert bucket == SQUARE and psnr(frames, clip[:9]) > 18


def reason(read, *arguments):
    with pytest.raises(UnusableError) as raised:
        read(*arguments)
    return str(raised.value)


def test_a_video_too_short_for_every_bucket(noise, tmp_path):
    told = reason(read_video, saved(tmp_path / "a.mp4", noise[:8]), [SQUARE, WIDE], 8)
    assert told == "8 frames at 8 a second are too few: the shortest bucket has 9"


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def test_a_video_that_is_cut_off(noise, tmp_path):
    """With its index at the end, at the start, or in no place of its own."""
    assert "cannot be read" in reason(read_video, cut(saved(tmp_path / "a.mp4", noise), 0.6), [SHORT], 8)
    early = cut(encoded(tmp_path / "b.mp4", noise, options={"movflags": "faststart"}), 0.6)
    assert "cut off" in reason(read_video, early, [SHORT], 8)
    assert "cut off" in reason(read_video, cut(saved(tmp_path / "c.webm", noise), 0.5), [SHORT], 8)


def test_damage_within_a_video_is_seen(noise, tmp_path):
    """Decoders conceal it: without being told, they give smeared frames and no error."""
    path = saved(tmp_path / "a.mp4", noise)
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 2000
    content[start : start + 400] = bytes(400)
    path.write_bytes(content)
    assert "cannot be read" in reason(read_video, path, [SHORT], 8)


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_what_is_no_medium(content, tmp_path):
    for name, read in (("a.mp4", lambda file: read_video(file, [SHORT], 8)), ("a.png", lambda f: read_picture(f, []))):
        (tmp_path / name).write_bytes(content)
        assert "cannot be read" in reason(read, tmp_path / name)


STILL = Bucket(width=64, height=64, frames=1)


def test_pictures_of_every_mode(clip, tmp_path):
    for mode in ("RGB", "RGBA", "L", "P", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(clip[0]).convert(mode).save(tmp_path / f"a.{suffix}")
        bucket, frames = read_picture(tmp_path / f"a.{suffix}", [STILL])
        assert bucket == STILL and frames.shape == (1, 64, 64, 3)
        if mode in ("RGB", "RGBA"):
            np.testing.assert_array_equal(frames[0], clip[0])


def test_a_turned_picture_is_turned_back(clip, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    tall = clip[0][:, 8:56]
    Image.fromarray(np.rot90(tall).copy()).save(tmp_path / "a.jpg", exif=exif, quality=98)
    buckets = [Bucket(width=w, height=h, frames=1) for w, h in ((64, 48), (48, 64))]
    bucket, frames = read_picture(tmp_path / "a.jpg", buckets)
    assert bucket.size == (48, 64) and psnr(frames[0], tall) > 26


def test_damaged_pictures(noise, tmp_path):
    Image.fromarray(noise[0]).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    (tmp_path / "c.png").write_bytes(damaged)
    for name in ("b.png", "c.png"):
        assert "the image cannot be read" in reason(read_picture, tmp_path / name, [STILL])


def test_where_media_lie(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("b.mp4", "in/a.MP4", "c.png", "metadata.jsonl"):
        (tmp_path / name).touch()
    assert media_in(tmp_path, VIDEOS) == ["b.mp4", "in/a.MP4"] and media_in(tmp_path, IMAGES) == ["c.png"]
    assert place_of(tmp_path, "in/a.MP4") == tmp_path / "in/a.MP4"
    assert reason(place_of, tmp_path, "d.mp4") == "there is no such file"
    for outside in ("../x.mp4", str(tmp_path / "b.mp4"), "in/../../x.mp4"):
        assert "outside" in reason(place_of, tmp_path, outside)


def test_nothing_is_printed_for_damaged_media(noise, tmp_path, capfd):
    reason(read_video, cut(saved(tmp_path / "a.mp4", noise), 0.6), [SHORT], 8)
    assert capfd.readouterr().err == ""
