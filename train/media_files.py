"""Pictures and videos as training data: found, read, brought to a bucket's size and rate, or found unusable.

Shapes: T frames, H W pixels. Frames are uint8 [T, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import av
import numpy as np
from PIL import Image, ImageOps

from train.buckets import Bucket, choose_bucket

VIDEOS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_LATE = 0.1  # share of a video's length that may be missing at its end

Clip = tuple[Bucket, np.ndarray]


class UnusableError(Exception):
    """A medium that no example can be made of, and why."""


def media_in(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """The media under a folder by their places in it, sorted."""
    found = (file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    return sorted(file.relative_to(folder).as_posix() for file in found)


def place_of(folder: Path, name: str) -> Path:
    """Where a medium named in a captions file lies; UnusableError where that is nowhere in the folder."""
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        raise UnusableError("it lies outside the folder of the media")
    if not (folder / place).is_file():
        raise UnusableError("there is no such file")
    return folder / place


def read_picture(file: Path, buckets: Sequence[Bucket]) -> Clip:
    """A picture, turned as its EXIF data say, scaled to cover its bucket and cropped to the middle.

    Raises UnusableError for one that cannot be read to its end.
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many kinds for damaged files, SyntaxError among them
        raise UnusableError(f"the image cannot be read ({_reason(error)})") from error
    bucket = choose_bucket(buckets, image.size, 1)
    assert bucket is not None
    return bucket, np.asarray(_cover(image, bucket, 1.0))[None]


def read_video(file: Path, buckets: Sequence[Bucket], fps: float) -> Clip:
    """The beginning of a video at `fps` frames a second, scaled to cover its bucket and cropped to the middle.

    A frame is the one nearest in time. Display rotation and the shape of the pixels are heeded. Raises UnusableError
    for a video that is damaged or cut off within what is needed, or too short for every bucket.
    """
    try:
        return _read_video(file, buckets, fps)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UnusableError(f"the video cannot be read ({_reason(error)})") from error


def _read_video(file: Path, buckets: Sequence[Bucket], fps: float) -> Clip:
    longest = max(bucket.frames for bucket in buckets)
    stamps, seconds, shape = _frame_times(file, longest / fps)
    # Containers round times, some to milliseconds: the last frame may stand for a time a little behind it.
    available = int((seconds[-1] - seconds[0]) * fps + 0.25) + 1
    decoded = _decoded(file)
    stamp, first = next(decoded, (None, None))
    if first is None:
        raise UnusableError("no frame of the video can be decoded")
    turns = round(first.rotation / 90) % 4
    size: tuple[float, float] = (first.width * shape, first.height)
    if turns % 2:
        size, shape = size[::-1], 1 / shape
    bucket = choose_bucket(buckets, size, available)
    if bucket is None:
        shortest = min(bucket.frames for bucket in buckets)
        raise UnusableError(f"{available} frames at {fps:g} a second are too few: the shortest bucket has {shortest}")
    wanted = [stamps[index] for index in _nearest(seconds, bucket.frames, fps)]
    pictures: dict[int, np.ndarray] = {}
    frame: av.VideoFrame | None = first
    while frame is not None and stamp is not None:
        if stamp in wanted:
            image = Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
            pictures[stamp] = np.asarray(_cover(image, bucket, shape))
        if stamp == wanted[-1]:
            break
        stamp, frame = next(decoded, (None, None))
    if missing := set(wanted) - set(pictures):
        raise UnusableError(f"{len(missing)} of {bucket.frames} frames of the video cannot be decoded")
    return bucket, np.stack([pictures[stamp] for stamp in wanted])


def _nearest(seconds: np.ndarray, frames: int, fps: float) -> np.ndarray:
    """Which frames are nearest to the first's time + k / fps."""
    times = seconds[0] + np.arange(frames) / fps
    return np.searchsorted((seconds[1:] + seconds[:-1]) / 2, times - 1e-6)


def _frame_times(file: Path, needed: float) -> tuple[list[int], np.ndarray, float]:
    """Time stamps of the frames in the order of showing, their seconds, and the width of a pixel over its height.

    Of the first `needed` seconds and a little more, without decoding: headers tell lengths wrongly, or not at all.
    """
    with av.open(str(file)) as container:
        if not container.streams.video:
            raise UnusableError("the file holds no video")
        stream = container.streams.video[0]
        base, stamps = float(stream.time_base or 1), []
        whole = True
        for packet in container.demux(stream):
            stamp = packet.dts if packet.pts is None else packet.pts
            if packet.is_corrupt:
                raise UnusableError("the video is cut off")
            if stamp is None or packet.is_discard:
                continue
            stamps.append(stamp)
            if (stamp - min(stamps[0], stamp)) * base > needed + 2:
                whole = False
                break
        if not stamps:
            raise UnusableError("the video holds no frames")
        stamps.sort()
        seconds = np.array(stamps) * base
        if whole:
            _check_length(seconds - seconds[0], _told_length(container, stream))
        return stamps, seconds, float(stream.sample_aspect_ratio or 1)


def _told_length(container, stream) -> float:
    """Seconds that the header tells of the video; 0 where it tells none."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    only = len(container.streams) == 1 and container.duration
    return container.duration / av.time_base if only else 0.0


def _check_length(seconds: np.ndarray, told: float) -> None:
    interval = seconds[-1] / max(1, len(seconds) - 1)
    if seconds[-1] + 2 * interval < told * (1 - _LATE):
        raise UnusableError(f"the video is cut off: it ends after {seconds[-1]:.1f} of {told:.1f} seconds")


def _decoded(file: Path) -> Iterator[tuple[int | None, av.VideoFrame]]:
    """Time stamps and frames, decoded in the order of showing; UnusableError at the first that is damaged."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        # A decoder hides damage as it can: grey or smeared pictures, that nothing must learn from.
        stream.codec_context.options = {"err_detect": "explode"}
        stream.codec_context.thread_type = "NONE"  # several files are read at once
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise UnusableError("the video is damaged")
            yield (frame.dts if frame.pts is None else frame.pts), frame


def _cover(image: Image.Image, bucket: Bucket, shape: float) -> Image.Image:
    """The middle of an image that has the bucket's aspect ratio, at the bucket's size; `shape` of a pixel is its width
    over its height."""
    ratio = bucket.width / bucket.height / shape
    width, height = min(image.width, image.height * ratio), min(image.height, image.width / ratio)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.resize(bucket.size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return str(strerror or str(error).strip().partition("\n")[0] or type(error).__name__)
