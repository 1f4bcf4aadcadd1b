"""Videos on disk: find the folders, read frames and masks, and say what is wrong with them.

    path/train/video_7/image_0.png .. image_21.png   RGB
    path/train/video_7/mask.npy                      integers (22, H, W), ids 0..48; if labelled

Whether a video can be used is decided here alone, with one wording for each fault.
"""

import logging
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from classes import NUM_CLASSES
from files import file_state
from utils import UserError

FRAME_NAME = re.compile(r"image_([0-9]+)\.png")
MASK = "mask.npy"
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
REASON = 100  # characters of a library's own words, or of a mask's: headers can be endless
logger = logging.getLogger(__name__)
# What libraries warn of in damaged files is said in a sentence here, or does no harm.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Invalid APNG")
warnings.filterwarnings("ignore", "Reading `.npy` or `.npz` file required")
warnings.filterwarnings("ignore", category=SyntaxWarning, module="<unknown>")  # a mask's header
warnings.filterwarnings("ignore", "overflow encountered", module=r"numpy\._core\.memmap")


@dataclass(frozen=True)
class Video:
    """A folder of frames, as it was when it was listed.

    Attributes:
        path: The folder.
        names: Those of its frames image_Y.png, by the number Y.
        labelled: Whether there is a mask.npy in it, even one that cannot be read.
    """

    path: Path
    names: tuple[str, ...]
    labelled: bool

    @classmethod
    def of(cls, folder: Path, names: Iterable[str]) -> "Video":
        """Return the video of a folder that holds files of these names."""
        names = list(names)
        frames = sorted((int(m[1]), name) for name in names if (m := FRAME_NAME.fullmatch(name)))
        return cls(folder, tuple(name for _, name in frames), MASK in names)

    @property
    def frames(self) -> list[Path]:
        """The files of its frames, by their numbers."""
        return [self.path / name for name in self.names]

    def state(self, ctime: bool = False) -> list[list[str | int] | None]:
        """Return the `file_state` of each frame, by which a change in them is noticed."""
        return [file_state(frame, ctime) for frame in self.frames]

    def __str__(self) -> str:
        return str(self.path)


def natural_key(path: str | Path) -> list[list[str | int]]:
    """Sort key in which numbers count as numbers: video_2 comes before video_10."""
    parts = [re.split(r"([0-9]+)", part) for part in Path(path).parts]
    return [[int(s) if i % 2 else s for i, s in enumerate(part)] for part in parts]


def find_videos(root: str | Path) -> list[Video]:
    """Return every folder at or below `root` that holds image_Y.png, in natural order of paths.

    Follows links, but takes each real folder once; leaves out hidden folders (".name").
    Raises UserError if `root` is no folder or there is no video in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder, give a folder of videos.")
    videos, seen = [], set()

    def warn(error: OSError) -> None:
        logger.warning("%s: left out, the folder cannot be read", error.filename)

    folders = [str(root)]
    while folders:  # os.walk itself goes down by recursion before Python 3.12, and that ends
        folder = folders.pop()
        for _, below, files in islice(os.walk(folder, onerror=warn), 1):
            found = Path(folder).stat()
            real = found.st_dev, found.st_ino  # its path takes the square of the depth to resolve
            if real in seen:
                continue
            seen.add(real)
            video = Video.of(Path(folder), [*files, *below])
            if any(FRAME_NAME.fullmatch(name) for name in files):
                videos.append(video)
            inner = sorted((d for d in below if not d.startswith(".")), reverse=True)
            folders += [os.path.join(folder, d) for d in inner]  # noqa: PTH118 - str is faster
    if not videos:
        raise UserError(f"{root}: no video in it, a video is a folder that holds image_0.png, ...")
    return sorted(videos, key=lambda video: (natural_key(video.path), str(video)))


def list_video(folder: str | Path) -> Video:
    """Return the video in one folder. Raises UserError if that cannot be read."""
    try:
        return Video.of(Path(folder), os.listdir(folder))  # noqa: PTH208 - names, not paths
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({error.strerror}).") from None


def has_mask(folder: str | Path) -> bool:
    """Return whether there is a mask.npy in a folder, even one that cannot be read."""
    try:
        Path(folder, MASK).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # `read_mask` says what is wrong with it
        pass
    return True


def find_labelled(root: str | Path) -> list[Video]:
    """Return the labelled ones of `find_videos`. Raises UserError if there is none."""
    videos = [video for video in find_videos(root) if video.labelled]
    if not videos:
        raise UserError(f"{root}: no video in it is labelled, that is, has a mask.npy.")
    return videos


def read_frame(path: str | Path) -> Tensor:
    """Return one picture as uint8 (3, H, W), RGB. Raises UserError if it cannot be decoded."""
    path = Path(path)
    try:
        _must_be_file(path)
        with Image.open(path, formats=["PNG"]) as png:
            _check_shape(path, png.width, png.height)
            sixteen_bits = any("16" in str(tile.args) for tile in png.tile)
            if sixteen_bits or "transparency" in png.info:
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
        raise UserError(
            f"{path}: unreadable PNG{why}, replace the file or remove the video."
        ) from None
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _must_be_file(path: Path) -> None:
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
    at, packed = 8, b""
    while (name := png[at + 4 : at + 8]) not in (b"IEND", b""):
        end = at + 8 + int.from_bytes(png[at : at + 4])
        packed += png[at + 8 : end] if name == b"IDAT" else b""
        at = end + 4
    width, height, depth, colour, *_, interlaced = struct.unpack(">IIBBBBB", png[16:29])
    need = 0
    for step_x, step_y, x, y in PASSES[interlaced]:
        wide, high = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if wide > 0 and high > 0:
            need += high * (1 + -(-wide * depth * CHANNELS[colour] // 8))  # a row and its filter
    return len(zlib.decompressobj().decompress(packed, need)) == need


def read_mask(folder: str | Path) -> np.ndarray | None:
    """Return mask.npy, memory-mapped: integers (T, H, W), ids not checked; None if there is none.

    Raises UserError if it is not a whole .npy file of integers with three axes.
    """
    path = Path(folder, MASK)
    if not has_mask(folder):
        return None
    try:
        _must_be_file(path)
        mask = np.lib.format.open_memmap(path, mode="r")  # np.load, but never a zip or a pickle
    except Exception as error:  # damaged headers raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:REASON]
        raise UserError(f"{path}: unreadable mask ({reason}), replace the file.") from None
    if mask.dtype.kind not in "iu" or mask.ndim != 3:
        what = f"{mask.dtype} {mask.shape}"[:REASON]
        raise UserError(f"{path}: holds {what}, not class ids (frames, height, width); replace it.")
    return mask


def read_video(video: Video) -> Tensor:
    """Return all frames of a video, uint8 (T, 3, H, W). Raises UserError if one has a fault."""
    report = VideoReport(video)
    frames = _check_frames(report)
    if report.faults:
        raise UserError(" ".join(report.faults))
    return torch.stack(frames)


def read_labels(
    folder: Path, frames: int | None = None, size: Sequence[int] | None = None
) -> Tensor | None:
    """Return mask.npy of a folder as uint8 (T, H, W), or None if there is none.

    Args:
        folder: A video, or a folder that infer.py wrote.
        frames: How many masks it must hold.
        size: The height and width that they must have.

    Raises:
        UserError: not whole, not integers (T, H, W), an id outside 0..48, or another shape.
    """
    mask = read_mask(folder)
    if mask is None:
        return None
    if faults := _mask_faults(folder, mask, frames, size)[0]:
        raise UserError(" ".join(faults))
    return torch.from_numpy(mask.astype(np.uint8))


@dataclass
class VideoReport:
    """What a video holds; `faults` has one sentence for each thing that is wrong with it."""

    video: Video
    size: tuple[int, int] | None = None  # height, width
    classes: tuple[int, ...] = ()  # the ids that occur in the mask, background included
    faults: list[str] = field(default_factory=list)

    def attempt(self, read: Callable, path: Path) -> Any:
        """Return read(path), or None and keep the fault."""
        try:
            return read(path)
        except UserError as error:
            self.faults.append(str(error))
            return None


def inspect_video(video: Video) -> VideoReport:
    """Read every file of a video and return what it holds and what is wrong with it."""
    return load_video(video)[0]


def load_video(video: Video) -> tuple[VideoReport, np.ndarray | None]:
    """Return a report, and uint8 (T, 4, H, W), RGB and class id, if labelled and without fault."""
    report = VideoReport(video)
    frames = _check_frames(report)
    mask = report.attempt(read_mask, video.path)
    if mask is not None:
        faults, ids = _mask_faults(video.path, mask, len(video.names), report.size)
        report.classes = tuple(i for i in ids if 0 <= i < NUM_CLASSES)
        report.faults += faults
    if mask is None or report.faults:
        return report, None
    return report, np.concatenate([torch.stack(frames), mask[:, None].astype(np.uint8)], axis=1)


def _check_frames(report: VideoReport) -> list[Tensor]:
    """Return the frames that can be read; report their size and what is wrong with them."""
    video = report.video
    numbers = {int(FRAME_NAME.fullmatch(name)[1]) for name in video.names}
    gaps = (f"image_{n}.png" for n in range(max(numbers, default=1)) if n not in numbers)
    if names := _few(gaps):
        report.faults.append(f"{video}: missing frame: {names}.")
    if len(numbers) < len(video.names):
        report.faults.append(f"{video}: two frames have the same number.")
    found = [report.attempt(read_frame, path) for path in video.frames]
    frames = [frame for frame in found if frame is not None]
    sizes = list(dict.fromkeys(tuple(frame.shape[1:]) for frame in frames))
    if len(sizes) > 1:
        sentence = f"{video}: frames of different sizes: {_few(map(size_text, sizes))}."
        report.faults.append(sentence)
    report.size = sizes[0] if sizes else None
    return frames


def _mask_faults(
    folder: Path, mask: np.ndarray, frames: int | None, size: Sequence[int] | None
) -> tuple[list[str], list[int]]:
    """Return what is wrong with a mask, a sentence each, and its ids.

    They are not looked at where it is larger than it must be and than a frame can be: a file of
    terabytes may have no content on the disk.
    """
    path, faults, ids = folder / MASK, [], []
    if mask.size == 0:
        faults.append(f"{path}: holds no mask ({mask.shape}), replace the file.")
    if frames is not None and len(mask) != frames:
        kind = "short" if len(mask) < frames else "long"
        faults.append(f"{path}: too {kind}: {len(mask)} masks, {frames} frames.")
    if size is not None and mask.shape[1:] != tuple(size):
        faults.append(f"{path} is {size_text(mask.shape[1:])}, frames are {size_text(size)}.")
    if mask[0:1].size > MAX_PIXELS:
        faults.append(f"{path}: {size_text(mask.shape[1:])} pixels are too many.")
    if not faults or mask.size <= MAX_PIXELS:
        ids = sorted({i for frame in mask for i in np.unique(frame).tolist()})
    if names := _few(i for i in ids if not 0 <= i < NUM_CLASSES):
        faults.append(f"{path}: holds ids outside 0..{NUM_CLASSES - 1}: {names}.")
    return faults, ids


def odd_sizes(sizes: dict[Video, tuple[int, ...]]) -> dict[Video, str]:
    """Return a fault for each video whose (height, width) is not that of most videos."""
    if not sizes:
        return {}
    most = Counter(sizes.values()).most_common(1)[0][0]
    text = f"{{}}: frames are {{}}, those of most labelled videos {size_text(most)}."
    return {v: text.format(v, size_text(size)) for v, size in sizes.items() if size != most}


def _few(items: Iterable) -> str:
    first = [str(item) for item in islice(items, 4)]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def size_text(size: Sequence[int]) -> str:
    """Return a (height, width) as people read it: width x height."""
    return f"{size[1]} x {size[0]}"
