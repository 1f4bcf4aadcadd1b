"""One file becomes pixels: PNG and JPEG by Pillow, video files by PyAV, which has its own FFmpeg.

A frame is uint8 (3, H, W), RGB, wherever it comes from. Of a clip, pixels are those of a plain
conversion to rgb24, which the command `ffmpeg -i clip.mp4 %d.png` writes too. What cannot be
decoded whole is a fault: a PNG has checksums; h264 has none, so what FFmpeg refuses, flags or ends
early is refused, and half a clip does not pass for a whole one.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils import UserError, no_memory

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"  # as FFmpeg calls them
SILENT_END = 0.5  # seconds that sound may go on after the last frame
EDITED = 0.75  # frames between what an edit list leaves and the duration that it tells
LONGER = 2**20  # frames that a header may claim: eleven hours
MAX_PIXELS = 2**25  # of one frame, 7680 x 4320 and a little more: a larger one is a bomb
MAX_RATIO = 16  # of its sides, unless both are below LONG: brought to the network's width, a sliver
LONG = 2048  # pixels; as high as the rest allows would take tens of gigabytes
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of the colour types of PNG
# Steps and starts, of columns and of rows, of the passes of a plain and of an interlaced PNG.
PASSES = (
    ((1, 1, 0, 0),),
    (
        *((8, 8, 0, 0), (8, 8, 4, 0), (4, 8, 0, 4), (4, 4, 2, 0), (2, 4, 0, 2)),
        *((2, 2, 1, 0), (1, 2, 0, 1)),
    ),
)
# What Pillow warns of in damaged files is said in a sentence here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Invalid APNG")


def read_frame(path: str | Path) -> Tensor:
    """Return one picture as uint8 (3, H, W), RGB. Raises UserError if it cannot be decoded."""
    path = Path(path)
    try:
        must_be_file(path)
        if path.suffix.lower() in (".jpg", ".jpeg"):
            return _read_jpeg(path)
        with Image.open(path, formats=["PNG"]) as png:
            _check_shape(path, png.width, png.height)
            sixteen_bits = any("16" in str(tile.args) for tile in png.tile)
            # Of plain RGB one colour may be transparent, as Pillow writes a GIF: it is a colour.
            if sixteen_bits or ("transparency" in png.info and png.mode != "RGB"):
                raise UserError(f"{path}: not plain 8-bit RGB, convert the file.")
            png.fp.seek(12)
            if png.fp.read(4) != b"IHDR":  # pixels before it are decoded into nonsense
                raise ValueError("no header")
            png.verify()  # the checksums of the pixels, which decoding alone does not look at
        with Image.open(path, formats=["PNG"]) as png:
            raw = np.asarray(png)
            pixels = raw if png.mode == "RGB" else np.asarray(png.convert("RGB"))
        # Rows that are not there stay zeros; the last two are the last of any order of rows.
        if not all(row.any() for row in raw[-2:]) and not _has_all_rows(path.read_bytes()):
            raise ValueError("rows are missing")
    except (UserError, MemoryError):  # for which a frame of this size is never to blame
        raise
    except Exception as error:  # damaged files raise nearly anything
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
        raise UserError(
            f"{path}: unreadable {kind}{why}, replace the file or remove the video."
        ) from None
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _read_jpeg(path: Path) -> Tensor:
    """Return the pixels of a JPEG; raises nearly anything for a damaged one, but not for all."""
    with Image.open(path, formats=["JPEG"]) as jpeg:
        _check_shape(path, jpeg.width, jpeg.height)
        pixels = np.asarray(jpeg.convert("RGB"))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def must_be_file(path: Path) -> None:
    """Raise OSError for a pipe, which would be waited for, a folder or a device."""
    if not path.is_file():
        raise OSError("not a file")


def _check_shape(path: Path, width: int, height: int) -> None:
    """Raise UserError for a size that no frame has."""
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: {width} x {height} pixels are too many.")
    short, long = sorted((width, height))
    if long > max(LONG, MAX_RATIO * short):
        raise UserError(f"{path}: {width} x {height} pixels are no shape of a frame.")


def _has_all_rows(png: bytes) -> bool:
    """Return whether the pixels of a PNG that Pillow has decoded go on to its last row."""
    at, packed = 8, []
    while (name := png[at + 4 : at + 8]) not in (b"IEND", b""):
        end = at + 8 + int.from_bytes(png[at : at + 4])
        if name == b"IDAT":
            packed.append(png[at + 8 : end])
        at = end + 4
    width, height, depth, colour, *_, interlaced = struct.unpack(">IIBBBBB", png[16:29])
    need = 0
    for step_x, step_y, x, y in PASSES[interlaced]:
        wide, high = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if wide > 0 and high > 0:
            need += high * (1 + -(-wide * depth * CHANNELS[colour] // 8))  # a row and its filter
    return len(zlib.decompressobj().decompress(b"".join(packed), need)) == need


class ClipFrame(NamedTuple):
    """One frame of a clip."""

    pixels: Tensor  # uint8 (3, H, W), RGB
    seconds: float | None  # its time stamp, where it has one


def is_clip(path: Path) -> bool:
    """Return whether a file is a video by its name."""
    return path.suffix.lower() in SUFFIXES


def count_frames(path: Path) -> int:
    """Return how many frames a clip shows: by its header and packets, else what can be decoded.

    Raises:
        UserError: it cannot be read.
    """
    with _opened(path) as (container, stream):
        if 0 < stream.frames <= LONGER:  # less those that an edit list leaves out
            return stream.frames - sum(packet.is_discard for packet in container.demux(stream))
    return sum(1 for _ in read_clip(path, every=LONGER))


def read_clip(path: Path, every: int = 1) -> Iterator[ClipFrame | None]:
    """Yield every `every`-th frame of a clip, in the order of time, and None for the others.

    Args:
        path: The file.
        every: 1 for all frames.

    Raises:
        UserError: it cannot be read, is damaged, or ends before its header says.
    """
    from av.video.reformatter import VideoReformatter

    with _opened(path) as (container, stream):
        if stream.width:
            _check_shape(path, stream.width, stream.height)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        stamped = container.format.name != "avi"  # whose time stamps are FFmpeg's guess
        convert, size, first, last, count, discarded = VideoReformatter(), None, None, None, 0, 0
        for packet in container.demux(stream):
            discarded += packet.is_discard  # frames that an edit list leaves out
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise UserError(f"{path}: frame {count} is damaged, replace the file.")
                size = size or (frame.width, frame.height)
                if size != (frame.width, frame.height):
                    raise UserError(f"{path}: its frames have different sizes.")
                time = frame.time if stamped else count / float(stream.average_rate or 25)
                if None not in (last, time) and time <= last:
                    raise UserError(f"{path}: its time stamps do not rise, replace the file.")
                first, last, count = time if first is None else first, time, count + 1
                if (count - 1) % every:
                    yield None
                    continue
                # In one thread: more would wait for each other, and for ever in a forked process.
                pixels = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
                pixels = np.rot90(pixels, frame.rotation // 90)
                seconds = None if time is None else time - first
                yield ClipFrame(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), seconds)
        _check_end(path, container, stream, count, discarded, last)


def _check_end(
    path: Path, container: Any, stream: Any, count: int, discarded: int, last: float | None
) -> None:
    """Raise UserError for a clip that ends after `count` frames, before its header says."""
    if not count:
        raise UserError(f"{path}: no frame in it can be decoded, replace the file.")
    if count + discarded < stream.frames:
        raise UserError(f"{path}: ends after {count} of {stream.frames} frames, replace the file.")
    if discarded:  # an edit list of so many frames leaves the others out; or a time is damaged
        seconds, rate = (container.duration or 0) / 1e6, float(stream.average_rate or 0)
        whole = abs(seconds * rate - count) < EDITED
    elif container.format.name == "gif":
        whole = path.read_bytes().rstrip(b"\0").endswith(b";")
    elif stream.frames or last is None or not container.duration:
        return
    else:  # mkv and webm tell how long they are, not how many frames that is
        whole = container.duration / 1e6 - last < SILENT_END
    if not whole:
        raise UserError(f"{path}: ends after {count} frames, before its end, replace the file.")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a clip for one thread; yields its container and its stream of pictures.

    Whatever FFmpeg says against it, here or in the block, is a UserError.
    """
    try:
        import av
    except ImportError:
        raise UserError(f"{path} is a video file: pip install av, which reads them.") from None
    av.logging.set_level(av.logging.PANIC)  # what it warns of is said here
    try:
        must_be_file(path)
        # An absolute path is no address, and other formats could name other files.
        options = {"format_whitelist": FORMATS}
        with av.open(os.path.abspath(path), options=options) as container:  # noqa: PTH100
            if not container.streams.video:
                raise ValueError("no video stream in it")
            stream = container.streams.video[0]
            stream.thread_count = 1
            yield container, stream
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # damaged files raise nearly anything
        if no_memory(error) and not isinstance(error, av.FFmpegError):  # which a header can claim
            raise
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = text.splitlines()[0]
        raise UserError(f"{path}: unreadable video ({reason}), replace the file.") from None
