"""Videos on disk: find them, read frames and masks, and say what is wrong with them.

    path/train/video_7/image_0.png .. image_21.png   RGB
    path/train/video_7/mask.npy                      integers (22, H, W), ids 0..48; if labelled
    path/video_00007.mp4                             a clip; its masks go to video_00007/mask.npy

Frames may also be called frame_0.png or 0.png, or be .jpg. Whether a video can be used is decided
here alone, with one wording for each fault: so finding, frames and masks are one long file.
"""

import logging
import math
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from classes import NUM_CLASSES
from decode import MAX_PIXELS, SUFFIXES, count_frames, is_clip, must_be_file, read_clip, read_frame
from files import file_state
from utils import UserError

FRAME_NAME = re.compile(r"image_[0-9]+\.png")  # the usual name
OTHER_NAME = re.compile(r"(?:frame_|image_)?[0-9]+\.(?:png|jpe?g)", re.IGNORECASE)
NUMBER = re.compile(r"([0-9]+)\.[A-Za-z]+$")  # in the name of a frame
DATA_KINDS = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"), "pictures"),
    **dict.fromkeys((".npy", ".npz", ".h5", ".hdf5", ".pkl", ".pt"), "arrays"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"), "archives"),
    **dict.fromkeys((".mpg", ".mpeg", ".m4v", ".wmv", ".flv"), "videos of other formats"),
}
MASK = "mask.npy"
MASKS = MASK, "mask.npz"  # of which a folder has one
HOW_THEY_ARE_READ = (
    "frames are image_0.png, ... (else frame_0.png or 0.png, or .jpg), labels are mask.npy: "
    "unpack, rename or convert the others if they belong to a video"
)
REASON = 100  # characters of a library's own words, or of a mask's: headers can be endless
logger = logging.getLogger(__name__)
# What NumPy warns of in damaged files is said in a sentence here, or does no harm.
warnings.filterwarnings("ignore", "Reading `.npy` or `.npz` file required")
warnings.filterwarnings("ignore", category=SyntaxWarning, module="<unknown>")  # a mask's header
warnings.filterwarnings("ignore", "overflow encountered", module=r"numpy\._core\.memmap")


@dataclass(frozen=True)
class Video:
    """A folder of frames or a video file, as it was when it was listed.

    Attributes:
        path: The folder, or the file.
        target: Where its files go below a folder of masks.
        names: Those of its frames, by their numbers; empty for a file.
        labelled: Whether there is a mask.npy in it, even one that cannot be read.
        every: 6 where only every sixth frame is taken.
        missing: The first numbers that its frames leave out, of all of them.
        total: How many frames a folder holds, also those that `every` leaves out.
    """

    path: Path
    target: Path
    names: tuple[str, ...] = ()
    labelled: bool = False
    every: int = 1
    missing: tuple[int, ...] = ()
    total: int = 0

    @classmethod
    def of(cls, folder: Path, target: Path, names: Iterable[str], every: int = 1) -> "Video":
        """Return the video of a folder that holds files of these names.

        Where image_N.png is there, no other name counts.
        """
        names = list(names)
        frames = [name for name in names if FRAME_NAME.fullmatch(name)]
        frames = frames or [name for name in names if OTHER_NAME.fullmatch(name)]
        frames.sort(key=lambda name: (number_of(name), name))
        labelled, numbers = any(name in MASKS for name in names), set(map(number_of, frames))
        gaps = (n for n in range(max(numbers, default=0)) if n not in numbers)
        missing = tuple(islice(gaps, 4))
        taken = tuple(frames[::every])
        return cls(folder, target, taken, labelled, every, missing, len(frames))

    def every_nth(self, every: int) -> "Video":
        """Return the video of every so many-th of its frames."""
        return replace(self, names=self.names[::every], every=self.every * every)

    @property
    def is_clip(self) -> bool:
        """Whether it is a video file."""
        return not self.names and is_clip(self.path)

    @property
    def frames(self) -> list[Path]:
        """The files of its frames, by their numbers; of a clip the file itself."""
        return [self.path / name for name in self.names] or [self.path]

    @property
    def numbers(self) -> list[int]:
        """The numbers in the names of its frames."""
        return [number_of(name) for name in self.names]

    def count(self) -> int:
        """Return how many frames there are; a clip is opened, and UserError if it cannot be."""
        return -(-count_frames(self.path) // self.every) if self.is_clip else len(self.names)

    def state(self, ctime: bool = False) -> list[list[str | int] | None]:
        """Return the `file_state` of each of its files, by which a change in them is noticed."""
        return [file_state(frame, ctime) for frame in self.frames]

    def __str__(self) -> str:
        return str(self.path)


class Frame(NamedTuple):
    """One frame of a video."""

    pixels: Tensor  # uint8 (3, H, W), RGB
    number: int  # in its name; of a clip from 0
    seconds: float | None = None  # of a clip, since its first frame


def number_of(name: str) -> int:
    """Return the number in the name of a frame."""
    return int(NUMBER.search(name)[1])


def natural_key(path: str | Path) -> list[list[str | int]]:
    """Sort key in which numbers count as numbers: video_2 comes before video_10."""
    parts = [re.split(r"([0-9]+)", part) for part in Path(path).parts]
    return [[int(s) if i % 2 else s for i, s in enumerate(part)] for part in parts]


def find_videos(root: str | Path, every: int = 1) -> list[Video]:
    """Return every folder of frames and every video file at or below `root`, in natural order.

    Follows links, but takes each real folder once; leaves out hidden folders and files (".name").
    Warns of pictures, archives and the like that are not read. With `every` of 6, videos are of
    every sixth frame.

    Raises:
        UserError: there is nothing at `root`, or no video in it.
    """
    root = Path(root)
    if root.is_file() and is_clip(root):
        return [Video(root, Path(root.stem), every=every)]
    if root.is_file():
        raise UserError(f"{root}: no video file, give one of {', '.join(SUFFIXES)} or a folder.")
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder, give a folder of videos or a clip.")
    videos, seen, unread = [], set(), Counter()

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
            files = [name for name in files if not name.startswith(".")]
            path, target = Path(folder), Path(os.path.relpath(folder, root))
            video = Video.of(path, target, [*files, *below], every)
            if set(video.names) & set(files):
                videos.append(video)
            clips = [name for name in files if is_clip(Path(name))]
            if any(map(FRAME_NAME.fullmatch, files)):  # nothing else counts beside image_N.png
                unread["videos"] += len(clips)
                clips = []
            videos += [Video(path / c, target / Path(c).stem, every=every) for c in clips]
            unread.update(_unread(files))
            inner = sorted((d for d in below if not d.startswith(".")), reverse=True)
            folders += [os.path.join(folder, d) for d in inner]  # noqa: PTH118 - str is faster
    if unread := +unread:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(unread.items()))
        logger.warning("%s: not read: %s; %s", root, kinds, HOW_THEY_ARE_READ)
    if not videos:
        raise UserError(
            f"{root}: no video in it, a video is a folder that holds image_0.png, ... or a file "
            "such as .mp4"
        )
    return sorted(videos, key=lambda video: (natural_key(video.path), str(video)))


def find_in_all(roots: Sequence[Path], every: int = 1) -> list[Video]:
    """Return the videos of several folders or files; of several, each has a target of its name.

    Raises:
        UserError: as of `find_videos`, or two have the same name.
    """
    if len(roots) == 1:
        return find_videos(roots[0], every)
    videos, names = [], {}
    for root in roots:
        name = Path(os.path.abspath(root)).name  # noqa: PTH100 - the name of a link is its own
        if name in names:
            raise UserError(f"{names[name]} and {root} have the same name: label them apart")
        names[name] = root
        for video in find_videos(root, every):
            below = Path() if root.is_file() else Path(name)
            videos.append(replace(video, target=below / video.target))
    return videos


def _unread(files: list[str]) -> Counter[str]:
    """Count what looks like data in a folder and is neither frame, mask nor clip, by its kind."""
    frame = FRAME_NAME if any(map(FRAME_NAME.fullmatch, files)) else OTHER_NAME
    rest = [name for name in files if name not in MASKS and not frame.fullmatch(name)]
    kinds = [DATA_KINDS.get(Path(name).suffix.lower()) for name in rest]
    return Counter(kind for kind in kinds if kind)


def list_video(folder: str | Path) -> Video:
    """Return the video in one folder, or of one file. Raises UserError if that cannot be read."""
    folder = Path(folder)
    if is_clip(folder) and folder.is_file():
        return Video(folder, Path(folder.stem))
    try:
        return Video.of(folder, Path(folder.name), os.listdir(folder))  # noqa: PTH208 - names
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({error.strerror}).") from None


def has_mask(folder: str | Path) -> bool:
    """Return whether there is a mask.npy or .npz in a folder, even one that cannot be read."""
    return any(os.path.lexists(Path(folder, name)) for name in MASKS)


def find_labelled(root: str | Path) -> list[Video]:
    """Return the labelled ones of `find_videos`. Raises UserError if there is none."""
    videos = [video for video in find_videos(root) if video.labelled]
    if not videos:
        raise UserError(f"{root}: no video in it is labelled, that is, has a mask.npy.")
    return videos


def read_mask(folder: str | Path, frames: int | None = None) -> np.ndarray | None:
    """Return the mask of a folder: integers (T, H, W), ids not checked; None if there is none.

    A mask.npy is memory-mapped. Of a mask.npz the header is looked at first: what it claims is
    inflated only where it is a mask, and of `frames` frames where these are given.

    Raises:
        UserError: there are two, or it is not a whole file of integers with three axes.
    """
    paths = [path for name in MASKS if os.path.lexists(path := Path(folder, name))]
    if not paths:
        return None
    if len(paths) > 1:
        raise UserError(f"{folder}: holds {' and '.join(MASKS)}, delete the one that is wrong.")
    (path,) = paths
    try:
        must_be_file(path)
        if path.name == MASK:
            mask = np.lib.format.open_memmap(path, mode="r")  # np.load, but never a pickle
            shape, dtype = mask.shape, mask.dtype
        else:
            shape, dtype = _npz_header(path)
    except Exception as error:  # damaged headers raise nearly anything
        raise UserError(_unreadable(path, error)) from None
    if dtype.kind not in "iu" or len(shape) != 3:
        what = f"{dtype} {shape}"[:REASON]
        raise UserError(f"{path}: holds {what}, not class ids (frames, height, width); replace it.")
    if path.name == MASK:
        return mask
    if faults := _shape_faults(path, shape, frames, None):
        raise UserError(" ".join(faults))
    try:
        return np.load(path)["mask"]
    except Exception as error:
        raise UserError(_unreadable(path, error)) from None


def _unreadable(path: Path, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0][:REASON]
    return f"{path}: unreadable mask ({reason}), replace the file."


def _npz_header(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and type of what a mask.npz holds, without inflating it."""
    with zipfile.ZipFile(path) as archive, archive.open("mask.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[version[0]](file)
        if math.prod(shape) * dtype.itemsize != archive.getinfo("mask.npy").file_size - file.tell():
            raise ValueError("its size is not that of its header")
        return shape, dtype


def read_frames(video: Video) -> Iterator[Frame]:
    """Yield the frames of a video, in the order of their numbers, each when it is read.

    Raises:
        UserError: with all that is wrong with it, after the last frame before the first fault.
    """
    faults: list[str] = []
    for frame in _frames(video, faults):
        if not faults:
            yield frame
    if faults:
        raise UserError(" ".join(faults))


def read_video(video: Video) -> Tensor:
    """Return all frames of a video, uint8 (T, 3, H, W). Raises UserError if one has a fault."""
    return torch.stack([frame.pixels for frame in read_frames(video)])


def _frames(video: Video, faults: list[str]) -> Iterator[Frame]:
    """Yield the frames that can be read; add what is wrong with the video to `faults`."""
    if video.is_clip:
        try:
            for number, frame in enumerate(read_clip(video.path, video.every)):
                if frame:
                    yield Frame(frame.pixels, number, frame.seconds)
        except UserError as error:
            faults.append(str(error))
        return
    faults += _name_faults(video)
    sizes: dict[tuple[int, ...], None] = {}
    for number, path in zip(video.numbers, video.frames, strict=True):
        try:
            pixels = read_frame(path)
        except UserError as error:
            faults.append(str(error))
            continue
        sizes[tuple(pixels.shape[1:])] = None
        if len(sizes) == 1:
            yield Frame(pixels, number)
    if len(sizes) > 1:
        faults.append(f"{video}: frames of different sizes: {_few(map(size_text, sizes))}.")


def _name_faults(video: Video) -> list[str]:
    """Return what is wrong with the names of the frames of a folder.

    A gap is a fault where there are labels: equal counts may hide that they are shifted.
    """
    faults, numbers = [], set(video.numbers)
    kinds = {re.sub(r"[0-9]+", "0", name): name for name in video.names}
    if len(kinds) > 1:
        faults.append(f"{video}: frames of several kinds: {_few(kinds.values())}: keep one.")
    if video.labelled and video.missing:
        names = _few(_renumbered(video.names[0], n) for n in video.missing)
        faults.append(f"{video}: missing frame: {names}.")
    if len(numbers) < len(video.names):
        faults.append(f"{video}: two frames have the same number.")
    return faults


def _renumbered(name: str, number: int) -> str:
    """Return the name of a frame with another number, of as many digits if it begins with 0."""
    digits = NUMBER.search(name)
    width = len(digits[1]) if digits[1].startswith("0") else 1
    return f"{name[: digits.start()]}{number:0{width}}{name[digits.end(1) :]}"


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
    mask = read_mask(folder, frames)
    if mask is None:
        return None
    if faults := _mask_faults(folder, mask, frames, size)[0]:
        raise UserError(" ".join(faults))
    return torch.from_numpy(mask.astype(np.uint8))


def read_truth(video: Video, size: Sequence[int] | None = None) -> Tensor | None:
    """Return the true labels of the frames of a video that are taken, or None if it has none.

    Raises UserError as `read_labels`: all its frames must have a mask.
    """
    truth = read_labels(video.path, video.total or None, size)
    return None if truth is None else truth[:: video.every]


@dataclass
class VideoReport:
    """What a video holds; `faults` has one sentence for each thing that is wrong with it."""

    video: Video
    count: int = 0  # frames
    size: tuple[int, int] | None = None  # height, width
    classes: tuple[int, ...] = ()  # the ids that occur in the mask, background included
    faults: list[str] = field(default_factory=list)
    gray: bool = False  # no frame has a colour


def inspect_video(video: Video) -> VideoReport:
    """Read every file of a video and return what it holds and what is wrong with it."""
    report = VideoReport(video)
    for frame in _frames(video, report.faults):
        red, *others = frame.pixels
        report.gray = (report.gray or not report.count) and all(red.equal(c) for c in others)
        report.count += 1
        report.size = report.size or tuple(frame.pixels.shape[1:])
    report.count = len(video.names) or report.count
    _check_mask(report)
    return report


def load_video(video: Video) -> tuple[VideoReport, np.ndarray | None]:
    """Return a report, and uint8 (T, 4, H, W), RGB and class id, if labelled and without fault."""
    report = VideoReport(video, len(video.names))
    frames = [frame.pixels for frame in _frames(video, report.faults)]
    report.size = tuple(frames[0].shape[1:]) if frames else None
    mask = _check_mask(report)
    if mask is None or report.faults:
        return report, None
    return report, np.concatenate([torch.stack(frames), mask[:, None].astype(np.uint8)], axis=1)


def _check_mask(report: VideoReport) -> np.ndarray | None:
    """Return the mask of a video, if it has one that can be read; report what is wrong with it."""
    folder = report.video.path
    try:
        mask = read_mask(folder, report.count)
    except UserError as error:
        report.faults.append(str(error))
        return None
    if mask is not None:
        faults, ids = _mask_faults(folder, mask, report.count, report.size)
        report.classes = tuple(i for i in ids if 0 <= i < NUM_CLASSES)
        report.faults += faults
    return mask


def _mask_faults(
    folder: Path, mask: np.ndarray, frames: int | None, size: Sequence[int] | None
) -> tuple[list[str], list[int]]:
    """Return what is wrong with a mask, a sentence each, and its ids.

    They are not looked at where it is larger than it must be and than a frame can be: a file of
    terabytes may have no content on the disk.
    """
    path = folder / (MASK if os.path.lexists(folder / MASK) else MASKS[1])
    faults, ids = _shape_faults(path, mask.shape, frames, size), []
    if not faults or mask.size <= MAX_PIXELS:
        ids = sorted({i for frame in mask for i in np.unique(frame).tolist()})
    if names := _few(i for i in ids if not 0 <= i < NUM_CLASSES):
        faults.append(f"{path}: holds ids outside 0..{NUM_CLASSES - 1}: {names}.")
    return faults, ids


def _shape_faults(
    path: Path, shape: tuple[int, ...], frames: int | None, size: Sequence[int] | None
) -> list[str]:
    """Return what is wrong with the shape (T, H, W) of a mask, a sentence each."""
    faults = []
    if not math.prod(shape):
        faults.append(f"{path}: holds no mask ({shape}), replace the file.")
    if frames is not None and shape[0] != frames:
        kind = "short" if shape[0] < frames else "long"
        faults.append(f"{path}: too {kind}: {shape[0]} masks, {frames} frames.")
    if size is not None and shape[1:] != tuple(size):
        faults.append(f"{path} is {size_text(shape[1:])}, frames are {size_text(size)}.")
    if math.prod(shape[1:]) > MAX_PIXELS:
        faults.append(f"{path}: {size_text(shape[1:])} pixels are too many.")
    return faults


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
