"""The frames of CLEVR videos as a Dataset, its cache, and how they are split and shared out.

    python dataset.py data/demo              # what is in this folder, and what is wrong with it

Prints videos, frames, sizes and the classes present, and names each video that has a fault: the
exit status is 1 then.
"""

import hashlib
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.tv_tensors import Image, Mask

from classes import CLASS_NAMES, NUM_CLASSES
from files import atomic_write, delete_scraps
from utils import UserError, make_parser, run_script
from videos import (
    find_labelled,
    find_videos,
    frame_paths,
    in_threads,
    inspect_video,
    load_video,
    odd_sizes,
    pixels,
    read_frame,
    read_mask,
    read_video,
)

OPEN_MASKS = 256  # files that stay open where there is no cache; often 1024 are allowed
logger = logging.getLogger(__name__)


class CLEVRDataset(Dataset):
    """The frames of CLEVR videos, each with the class id of every pixel.

    Videos are folders at any depth below `path`; video7, video_7 and video_00007 are all names:

        train/video_7/image_0.png .. image_21.png   RGB
        train/video_7/mask.npy                      integers (22, H, W), ids 0..48

    An id decoded by hand: 29 is 1 + 28, and 28 = 16 * 1 + 8 * 1 + 4, so the second of three shapes,
    the second of two materials and the fifth of eight colours: a brown rubber sphere (classes.py).

    Args:
        path: a folder, of which every labelled video is taken, or a list of video folders.
        transform: transform(image, mask) returns both, changed jointly (torchvision v2); with
            labelled=False, transform(image).
        labelled: True takes the videos with mask.npy and checks them whole: one with a fault is
            named on stderr and kept with the reason in `skipped`, out of the data. False takes
            every video, neither checks nor caches, and an item is the frame alone.
        cache: where decoded videos are kept as raw bytes, 3.4 MB for 22 frames of 240 x 160; True
            is clevr-unet in $XDG_CACHE_HOME or ~/.cache, False decodes each time. A file holds one
            video and is named after its path and the sizes and times of its PNGs and mask, so all
            runs, and all splits of a data set, share it, and a change in the data is noticed.

    An item is (Image uint8 (3, H, W), Mask uint8 (H, W)) of tv_tensors, which torch.stack and
    DataLoader turn into plain tensors. Raises UserError if no video can be used, or later if a
    file has become unreadable.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        transform: Callable | None = None,
        labelled: bool = True,
        cache: str | Path | bool = True,
    ):
        self.transform, self.labelled = transform, labelled
        if isinstance(path, (str, Path)):
            videos = find_labelled(path) if labelled else find_videos(path)
        else:
            videos = [Path(video) for video in path]
        self.skipped: dict[Path, str] = {}
        self._cached: dict[Path, tuple[Path | None, tuple[int, ...]]] = {}  # file, (T, 4, H, W)
        self._opened: dict[int, Tensor | np.ndarray] = {}  # by this process, when first read
        if labelled:
            self._prepare(videos, _cache_root(cache))
        for reason in self.skipped.values():
            logger.warning("skipped %s", reason)
        self.videos = [video for video in videos if video not in self.skipped]
        self._names = [[frame.name for frame in frame_paths(video)] for video in self.videos]
        if not any(self._names):
            where = path if isinstance(path, (str, Path)) else ", ".join(map(str, videos[:3]))
            what = "labelled video without fault" if labelled else "frame"
            raise UserError(
                f"{where or 'an empty list'}: no {what}, see what python dataset.py says."
            )
        lengths = list(map(len, self._names))
        pairs = [np.arange(n) for n in lengths]
        # (N, 2): the position in `videos` and the frame within that video, for each item
        self.index = np.stack([np.repeat(np.arange(len(pairs)), lengths), np.concatenate(pairs)], 1)

    def _prepare(self, videos: list[Path], root: Path | None) -> None:
        """Check all videos; decode those that the cache does not hold yet."""
        files = {video: _cache_file(root, video) for video in videos}
        for file in filter(None, files.values()):
            delete_scraps(file.parent)
        found: dict[Path, Any] = {video: _cached_shape(files[video]) for video in videos}
        failures: list[OSError] = []

        def decode(video: Path) -> tuple[int, ...] | str:
            if shape := _cached_shape(files[video]):  # another process was first
                return shape
            report, block = load_video(video)
            if block is None:
                return " ".join(report.faults) or f"{video}: no mask.npy in it."
            unchanged = files[video] == _cache_file(root, video)  # while it was being read
            try:
                if files[video] and unchanged and not failures:
                    _save_whole(files[video], block)
            except OSError as error:
                failures.append(error)
            return block.shape

        todo = [video for video in videos if found[video] is None]
        random.Random().shuffle(todo)  # so that processes started together share the work
        found |= zip(todo, in_threads(decode, todo, "decoding"), strict=True)
        if failures:
            text = "cache %s cannot be written (%s): every epoch decodes the PNGs again"
            logger.warning(text, root, failures[0].strerror)
        faults = {video: shape for video, shape in found.items() if isinstance(shape, str)}
        self._cached = {v: (files[v], shape) for v, shape in found.items() if v not in faults}
        faults |= odd_sizes({v: tuple(shape[2:]) for v, (_, shape) in self._cached.items()})
        self.skipped = {video: faults[video] for video in videos if video in faults}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}  # a worker process opens its own

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Image, Mask] | Image:
        v, t = self.index[i]
        if not self.labelled:
            image = Image(read_frame(self.videos[v] / self._names[v][t]))
            return self.transform(image) if self.transform else image
        frame, mask = self._read(v, t)
        sample = Image(frame.clone()), Mask(mask.clone())  # the cache is not the caller's to change
        return self.transform(*sample) if self.transform else sample

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
        frame = read_frame(self.videos[v] / self._names[v][t])
        return frame, torch.from_numpy(block[t].astype(np.uint8))

    def _open(self, v: int) -> Tensor | np.ndarray:
        """Map a cached video, uint8 (T, 4, H, W), or without a cache its mask file, (T, H, W)."""
        file, shape = self._cached[self.videos[v]]
        with suppress(OSError, RuntimeError):  # a cache deleted since: back to the PNGs
            if file:  # not as np.memmap, which holds a file descriptor for each video
                data = torch.from_file(str(file), False, file.stat().st_size, dtype=torch.uint8)
                return data[-math.prod(shape) :].view(shape)
        if len(self._opened) >= OPEN_MASKS:
            self._opened.clear()
        if (mask := read_mask(self.videos[v])) is None:
            raise UserError(f"{self.videos[v]}: its mask.npy is gone, start again.")
        return mask


def split_videos(path: Path, seed: int) -> tuple[list[Path], list[Path]]:
    """Return the training and the validation videos, never parts of one video in both.

    They are those in path/train and path/val where there are both; else a tenth of all labelled
    ones, at least one, is chosen for validation.

    Raises:
        UserError: fewer than two labelled videos, or none in one of the two folders.
    """
    if (path / "train").is_dir() and (path / "val").is_dir():
        return find_labelled(path / "train"), find_labelled(path / "val")
    videos = find_labelled(path)
    if len(videos) < 2:
        raise UserError(
            f"{path} has 1 labelled video: give at least two, "
            "one to learn from and one to validate on"
        )
    chosen = set(random.Random(seed).sample(range(len(videos)), max(1, len(videos) // 10)))
    return (
        [video for i, video in enumerate(videos) if i not in chosen],
        [video for i, video in enumerate(videos) if i in chosen],
    )


def _cache_root(cache: str | Path | bool) -> Path | None:
    if cache is True:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clevr-unet"
    return Path(cache) if cache else None


def _digest(item: object) -> str:
    return hashlib.blake2b(repr(item).encode(), digest_size=16).hexdigest()


def _cache_file(root: Path | None, video: Path) -> Path | None:
    """Return root/<digest of the video's path>/<digest of its files' names, sizes, times>.npy."""
    try:
        with os.scandir(video) as entries:
            used = {e.name: e.stat() for e in entries if e.name.endswith((".png", ".npy"))}
    except OSError:  # a dangling link, say: checking the video will name it
        return None
    facts = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in sorted(used.items())]
    return root and root / _digest(os.path.realpath(video)) / f"{_digest(facts)}.npy"


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
    reports = list(in_threads(inspect_video, find_videos(path), "reading"))
    odd = odd_sizes({r.video: r.size for r in reports if r.labelled and not r.faults})
    kinds = Counter()
    for r in reports:
        r.faults += [odd[r.video]] if r.video in odd else []
        size = pixels(r.size) if r.size else "no readable frame"
        mask = "labelled" if r.labelled else "without mask.npy"
        kinds[f"{r.video.parent}", f"{r.frames} frames, {size}, {mask}"] += 1
    print(f"{path}: {len(reports)} videos, {sum(r.frames for r in reports)} frames")
    for (folder, kind), count in kinds.items():
        print(f"  {folder}: {count} x {kind}")
    present = Counter(i for r in reports for i in r.classes)
    titles = " (id, name, videos)" if present else ""
    print(f"classes present: {len(present)} of {NUM_CLASSES}{titles}")
    for i in sorted(present):
        print(f"  {i:2}  {CLASS_NAMES[i]:22}{present[i]:6}")
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
