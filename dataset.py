"""The frames of CLEVR videos as a Dataset, its cache, and how they are split.

    python dataset.py data/demo              # what is in this folder, and what is wrong with it

Prints videos, frames, sizes and the classes present, and names each video that has a fault: the
exit status is 1 then. That report, and the checks of a transform, make the file long.
"""

import copy
import logging
import math
import operator
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from classes import CLASS_NAMES, NUM_CLASSES
from decode import read_frame
from devices import in_threads
from files import atomic_write, delete_leftovers, digest, file_state
from proposals import check_names, file_name, has_proposals, load_proposed
from utils import UserError, counted, make_parser, run_script
from videos import (
    MASK,
    MASKS,
    Frame,
    Video,
    VideoReport,
    find_labelled,
    find_videos,
    inspect_video,
    list_video,
    load_video,
    odd_sizes,
    read_frames,
    read_mask,
    read_video,
    size_text,
)

OPEN_MASKS = 256  # files that stay open where there is no cache; often 1024 are allowed
PROPOSED_EVERY = 6  # of 128 frames of a clip of CLEVRER these make a video of 22
OF_OTHER_PROCESSES = []  # clips that a process was forked with
BAR = {"leave": False, "disable": None, "unit": "video"}  # no progress bar in a log file
logger = logging.getLogger(__name__)
_BOTH = "transform(image, mask) returns both, as the transforms of torchvision.transforms.v2 do"


class CLEVRDataset(Dataset):
    """The frames of CLEVR videos, each with the class id of every pixel.

    Videos are folders at any depth below `path`; video7, video_7 and video_00007 are all names:

        train/video_7/image_0.png .. image_21.png   RGB
        train/video_7/mask.npy                      integers (22, H, W), ids 0..48

    An id decoded by hand: 29 is 1 + 28, and 28 = 16 * 1 + 8 * 1 + 4, so the second of three shapes,
    the second of two materials and the fifth of eight colours: a brown rubber sphere (classes.py).

    Args:
        path: a folder, of which every labelled video is taken, or a list of folders or Videos (of
            all frames, if they are labelled).
        transform: transform(image, mask) returns both, changed jointly (torchvision v2, whose
            tv_tensors Image and Mask it is given); with labelled=False, transform(image).
        labelled: True takes the videos with mask.npy and checks them whole: one with a fault is
            named on stderr and kept with the reason in `skipped`, out of the data. False takes
            every video, clips too, neither checks nor caches, and an item is the frame alone.
        cache: where decoded videos are kept as raw bytes, 3.4 MB for 22 frames of 240 x 160; True
            is clevr-unet in $XDG_CACHE_HOME or ~/.cache, False decodes each time. A file holds one
            video and is named after its path and the sizes and times of its PNGs and mask, so all
            runs, and all splits of a data set, share it, and a change in the data is noticed.
        proposals: a folder of CLEVRER's derender proposals, which serve as labels: videos are those
            that have some, of every sixth frame, brought to 240 x 160 (proposals.py).

    An item is a frame, uint8 (3, H, W), and its mask, uint8 (H, W). Raises UserError if no video
    can be used, or later if a file has become unreadable.

    Attributes:
        videos: Those that are used, as `videos.Video`, in natural order.
        skipped: What is wrong with the others, by their folder.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path | Video],
        transform: Callable | None = None,
        labelled: bool = True,
        cache: str | Path | bool = True,
        proposals: str | Path | None = None,
    ):
        _check_transform(transform, labelled)
        self.transform, self.labelled = transform, labelled
        self.skipped: dict[Path, str] = {}
        self._cached: dict[Path, tuple[Path | None, tuple[int, ...]]] = {}  # file, (T, 4, H, W)
        self._opened: dict[int, Tensor | np.ndarray] = {}  # by this process, when first read
        self._proposals = Path(proposals) if proposals else None
        if isinstance(path, (str, Path)):
            find = find_labelled if labelled else find_videos
            videos = find_proposed(path, self._proposals) if proposals else find(path)
        else:
            videos = self._list(path)
        if labelled:
            self._prepare(videos, _cache_root(cache))
        for reason in self.skipped.values():
            logger.warning("skipped %s", reason)
        self.videos = [video for video in videos if video.path not in self.skipped]
        if not any(video.names or video.is_clip for video in self.videos):
            where = path if isinstance(path, (str, Path)) else ", ".join(map(str, path[:3]))
            what = "labelled video without fault" if labelled else "frame"
            raise UserError(
                f"{where or 'an empty list'}: no {what}, see what python dataset.py says."
            )
        self._index: np.ndarray | None = None
        self._clip: tuple[int, int, Iterator[Frame]] | None = None  # process, video, what is next
        self._next = 0  # frame of that

    @property
    def index(self) -> np.ndarray:
        """(N, 2), of each item the position in `videos` and the frame within that video.

        Clips are opened for their number of frames when this is first asked for.
        """
        if self._index is None:
            lengths = [self._length(video) for video in self.videos]
            frames = np.concatenate([np.arange(length) for length in lengths])
            self._index = np.stack([np.repeat(np.arange(len(lengths)), lengths), frames], axis=1)
        return self._index

    def _length(self, video: Video) -> int:
        cached = self._cached.get(video.path)
        if cached:
            return cached[1][0]
        try:
            return video.count()
        except UserError as error:  # of a clip; the others are there to be read
            self.skipped[video.path] = str(error)
            logger.warning("skipped %s", error)
            return 0

    def _list(self, videos: Sequence[str | Path | Video]) -> list[Video]:
        """Return videos with the names of their frames; a folder that cannot be read is skipped."""
        found = []
        for video in videos:
            try:
                video = video if isinstance(video, Video) else list_video(video)
                stride = PROPOSED_EVERY if self._proposals and video.every == 1 else 1
                found.append(video.every_nth(stride))
            except UserError as error:
                if not self.labelled:
                    raise
                self.skipped[Path(video)] = str(error)
        return found

    def _prepare(self, videos: list[Video], root: Path | None) -> None:
        """Check all videos; decode those that the cache does not hold yet."""
        files = {video: self._cache_file(root, video) for video in videos}
        for file in filter(None, files.values()):
            delete_leftovers(file.parent)
        shapes = {video: _cached_shape(files[video]) for video in videos}
        failures: list[OSError] = []

        def decode(video: Video) -> tuple[tuple[int, ...] | None, str]:
            """Return the shape of a video that is whole, and what is wrong with another."""
            if shape := _cached_shape(files[video]):  # another process was first
                return shape, ""
            try:
                block = self._load(video)
            except UserError as error:
                return None, str(error)
            unchanged = files[video] == self._cache_file(root, video)  # while it was being read
            try:
                if files[video] and unchanged and not failures:
                    _save_whole(files[video], block)
            except OSError as error:
                failures.append(error)
            return block.shape, ""

        todo = [video for video in videos if shapes[video] is None]
        random.Random().shuffle(todo)  # so that processes started together share the work
        decoded = tqdm(in_threads(decode, todo), "decoding", len(todo), **BAR)
        for video, (shape, fault) in zip(todo, decoded, strict=True):
            shapes[video] = shape
            if fault:
                self.skipped[video.path] = fault
        if failures:
            text = "cache %s cannot be written (%s): every epoch decodes the PNGs again"
            logger.warning(text, root, failures[0].strerror)
        whole = {video: shape for video, shape in shapes.items() if shape}
        odd = odd_sizes({video: shape[2:] for video, shape in whole.items()})
        faults = self.skipped | {video.path: fault for video, fault in odd.items()}
        # In the order of the videos; then the folders that could not be listed.
        self.skipped = {v.path: faults[v.path] for v in videos if v.path in faults} | faults
        self._cached = {video.path: (files[video], shape) for video, shape in whole.items()}

    def _load(self, video: Video) -> np.ndarray:
        """Return a video with its labels, uint8 (T, 4, H, W). Raises UserError for a fault."""
        if self._proposals:
            return load_proposed(video, self._proposals)
        report, block = load_video(video)
        if block is None:
            raise UserError(" ".join(report.faults) or f"{video}: no {MASK} in it.")
        return block

    def _cache_file(self, root: Path | None, video: Video) -> Path | None:
        """Return root/<digest of the video's path>/<digest of names, sizes, times of files>.npy."""
        if root is None:
            return None
        masks = [video.path / name for name in MASKS]
        if self._proposals:
            masks = [self._proposals / file_name(video)]
        states = video.state(ctime=True) + [file_state(mask, ctime=True) for mask in masks]
        states += [video.every] if self._proposals else []
        folder = digest(repr(os.path.realpath(video.path)).encode())
        return root / folder / f"{digest(repr(states).encode())}.npy"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}, "_clip": None}  # a worker process opens its own

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor] | Tensor:
        try:
            v, t = self.index[operator.index(i)]
        except TypeError:  # a slice, a list
            raise UserError(
                "an item is one frame: give a number, or torch.utils.data.Subset(dataset, range(3))"
            ) from None
        if not self.labelled:
            clip = self.videos[v].is_clip
            sample = [self._read_clip(v, t) if clip else read_frame(self._file(v, t))]
        else:  # the cache is not the caller's to change
            sample = [part.clone() for part in self._read(v, t)]
        if self.transform:
            from torchvision.tv_tensors import Image, Mask  # a second; plain tensors need none

            kinds = zip((Image, Mask), sample, strict=False)
            changed = self.transform(*(kind(part) for kind, part in kinds))
            if self.labelled and not (isinstance(changed, (tuple, list)) and len(changed) > 1):
                raise UserError(f"{_BOTH}, not {type(changed).__name__}")
            return changed
        return tuple(sample) if self.labelled else sample[0]

    def part(self, videos: Iterable[Video]) -> "CLEVRDataset":
        """Return the data set of some of its videos, in their order; nothing is checked anew."""
        part = copy.copy(self)  # of what is opened, as of any copy, nothing
        part.videos = [video for video in videos if video.path not in self.skipped]
        part._index = None
        return part

    def video(self, v: int) -> Tensor:
        """Return all frames of self.videos[v], decoded and checked anew: uint8 (T, 3, H, W).

        Raises UserError if one of them is missing, unreadable or of another size.
        """
        return read_video(self.videos[v])

    def _read(self, v: int, t: int) -> tuple[Tensor, Tensor]:
        """Return frame t of video v and its mask: views, if they are cached."""
        if v not in self._opened:
            self._opened[v] = self._open(v)
        block = self._opened[v]
        if isinstance(block, Tensor):
            return block[t, :3], block[t, 3]
        return read_frame(self._file(v, t)), torch.from_numpy(block[t].astype(np.uint8))

    def _file(self, v: int, t: int) -> Path:
        return self.videos[v].path / self.videos[v].names[t]

    def _read_clip(self, v: int, t: int) -> Tensor:
        """Return frame t of a clip; in the order of frames each is decoded once."""
        here = os.getpid()
        if self._clip and self._clip[0] != here:  # not to be read or closed by a forked process
            OF_OTHER_PROCESSES.append(self._clip)
            self._clip = None
        if not self._clip or self._clip[:2] != (here, v) or t < self._next:
            self._clip, self._next = (here, v, read_frames(self.videos[v])), 0
        for frame in self._clip[2]:
            self._next += 1
            if self._next > t:
                return frame.pixels
        raise UserError(f"{self.videos[v]}: has no frame {t}, replace the file.")

    def _open(self, v: int) -> Tensor | np.ndarray:
        """Map a cached video, uint8 (T, 4, H, W), or without a cache its mask file, (T, H, W)."""
        folder = self.videos[v].path
        file, shape = self._cached[folder]
        with suppress(OSError, RuntimeError):  # a cache deleted since: back to the PNGs
            if file:  # not as np.memmap, which holds a file descriptor for each video
                data = torch.from_file(str(file), False, file.stat().st_size, dtype=torch.uint8)
                return data[-math.prod(shape) :].view(shape)
        if len(self._opened) >= (16 if self._proposals else OPEN_MASKS):  # the former are whole
            self._opened.clear()
        if self._proposals:  # decoded whole: so it should be cached
            return torch.from_numpy(self._load(self.videos[v]))
        if (mask := read_mask(folder)) is None:
            raise UserError(f"{folder}: its {MASK} is gone, start again.")
        return mask


def find_proposed(root: str | Path, proposals: Path) -> list[Video]:
    """Return the videos below `root` that have proposals, of every sixth frame.

    Raises:
        UserError: there is none.
    """
    videos = [v for v in find_videos(root, PROPOSED_EVERY) if has_proposals(v, proposals)]
    check_names(videos)
    if not videos:
        raise UserError(
            f"{root}: no video in it has a file such as proposal_00000.json below {proposals}."
        )
    return videos


def split_data(
    path: Path, seed: int, proposals: Path | None = None, cache: bool = True
) -> tuple[CLEVRDataset, CLEVRDataset, list[Video]]:
    """Return the training and the validation frames, and all videos that were set aside.

    They are those of `split_videos`, checked together, so that all are of one size. Where faults
    leave no video to learn from or to validate on, others are chosen, unless folders say which.

    Raises:
        UserError: as of `split_videos` and CLEVRDataset.
    """
    parts = split_videos(path, seed, proposals)
    data = CLEVRDataset([*parts[0], *parts[1]], cache=cache, proposals=proposals)
    if not all(data.part(part).videos for part in parts) and not _has_parts(path):
        parts = _choose(path, data.videos, seed, " without fault")
    training, validation = (data.part(part) for part in parts)
    for part, folder in ((training, "train"), (validation, "val")):
        if not part.videos:
            raise UserError(
                f"{path / folder}: no labelled video without fault, of the size of most, "
                "see what python dataset.py says."
            )
    return training, validation, parts[1]


def split_videos(
    path: Path, seed: int, proposals: Path | None = None
) -> tuple[list[Video], list[Video]]:
    """Return the training and the validation videos; a warning names what links put in both.

    They are those in path/train and path/val where there are both; else a tenth of all labelled
    ones, at least one, is chosen for validation. With `proposals` those count as labels.

    Raises:
        UserError: fewer than two labelled videos, or none in one of the two folders.
    """

    def find(folder: Path) -> list[Video]:
        return find_proposed(folder, proposals) if proposals else find_labelled(folder)

    if not _has_parts(path):
        return _choose(path, find(path), seed)
    training, validation = find(path / "train"), find(path / "val")
    learned = {os.path.realpath(video.path) for video in training}
    if both := [video for video in validation if os.path.realpath(video.path) in learned]:
        count = counted(len(both), "validation video")
        logger.warning("warning: %s, such as %s, are learned from as well", count, both[0])
    return training, validation


def _has_parts(path: Path) -> bool:
    """Return whether folders say which videos validate."""
    return (path / "train").is_dir() and (path / "val").is_dir()


def _choose(
    path: Path, videos: list[Video], seed: int, which: str = ""
) -> tuple[list[Video], list[Video]]:
    """Set a tenth of the videos aside, at least one."""
    if len(videos) < 2:
        raise UserError(
            f"{path} has 1 labelled video{which}: give at least two, "
            "one to learn from and one to validate on"
        )
    chosen = set(random.Random(seed).sample(range(len(videos)), max(1, len(videos) // 10)))
    return (
        [video for i, video in enumerate(videos) if i not in chosen],
        [video for i, video in enumerate(videos) if i in chosen],
    )


def _check_transform(transform: Callable | None, labelled: bool) -> None:
    """Raise UserError for one that does not take an image, and a mask if `labelled`."""
    if transform is None:
        return
    what = _BOTH if labelled else "with labelled=False transform(image) gets an image alone"
    if type(transform).__module__.startswith("albumentations"):
        raise UserError(
            f"{what}; Albumentations' take NumPy arrays by name: call them in a function of yours"
        )
    call = transform.forward if isinstance(transform, nn.Module) else transform
    try:
        signature(call, follow_wrapped=False).bind(*range(1 + labelled))
    except TypeError:
        name = getattr(transform, "__qualname__", type(transform).__qualname__)
        raise UserError(f"{what}: {name} does not take that") from None
    except ValueError:  # nothing says what it takes
        return


def _cache_root(cache: str | Path | bool) -> Path | None:
    if cache is True:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clevr-unet"
    return Path(cache) if cache else None


def _cached_shape(file: Path | None) -> tuple[int, ...] | None:
    try:
        return np.lib.format.open_memmap(file, mode="r").shape if file else None
    except Exception:  # not there yet, or damaged: to be made anew
        return None


def _save_whole(file: Path, block: np.ndarray) -> None:
    """Write a video's .npy so that no reader sees half of it, and delete those it replaces."""
    with atomic_write(file) as stream:
        np.save(stream, block)
    with suppress(FileNotFoundError):  # another process deletes them too
        for old in set(file.parent.glob("*.npy")) - {file}:
            old.unlink()


def print_report(path: str | Path) -> int:
    """Print what the videos below `path` hold and their faults; return how many have a fault."""
    videos = find_videos(path)
    reports: list[VideoReport] = list(
        tqdm(in_threads(inspect_video, videos), "reading", len(videos), **BAR)
    )
    odd = odd_sizes({r.video: r.size for r in reports if r.video.labelled and not r.faults})
    kinds = Counter()
    for r in reports:
        r.faults += [odd[r.video]] if r.video in odd else []
        size = size_text(r.size) if r.size else "no readable frame"
        mask = "labelled" if r.video.labelled else f"without {MASK}"
        kinds[f"{r.video.path.parent}", f"{r.count} frames, {size}, {mask}"] += 1
    frames = counted(sum(r.count for r in reports), "frame")
    print(f"{path}: {counted(len(reports), 'video')}, {frames}")
    for (folder, kind), count in kinds.items():
        print(f"  {folder}: {count} x {kind}")
    present = Counter(i for r in reports for i in r.classes)
    titles = " (id, name, videos)" if present else ""
    print(f"classes present: {len(present)} of {NUM_CLASSES}{titles}")
    for i in sorted(present):
        print(f"  {i:2}  {CLASS_NAMES[i]:22}{present[i]:6}")
    if gray := [str(r.video) for r in reports if r.gray]:
        print(
            f"gray, so that nobody can tell the colour of an object: {counted(len(gray), 'video')}"
        )
        print("\n".join(f"  {video}" for video in gray))
    faulty = [r for r in reports if r.faults]
    print(f"videos with faults: {len(faulty)}")
    for r in faulty:
        print("\n".join(f"  {fault}" for fault in r.faults))
    return len(faulty)


def main() -> int:
    """Read the command line, print the report, return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("path", help="folder with videos, at any depth")
    return 1 if print_report(parser.parse_args().path) else 0


if __name__ == "__main__":
    run_script(main)
