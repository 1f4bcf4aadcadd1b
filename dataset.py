"""CLEVR videos on disk: class names and ids, finding and checking videos, and a fast Dataset.

    python dataset.py data/demo              # what is in this folder, and what is wrong with it

Prints videos, frames, sizes and the classes present. Exits 0 if all is well, 1 if a video has a
fault (each is named), 2 if there is no video to look at.
"""

import argparse
import hashlib
import logging
import math
import os
import random
import re
import sys
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_png
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask
from tqdm import tqdm

SHAPES = ("cube", "sphere", "cylinder")
MATERIALS = ("metal", "rubber")
COLOURS = ("gray", "red", "blue", "green", "brown", "cyan", "purple", "yellow")
# The position of a name is its class id: 1 + 16 * shape + 8 * material + colour.
CLASS_NAMES = ("background",) + tuple(
    f"{colour} {material} {shape}"
    for shape in SHAPES
    for material in MATERIALS
    for colour in COLOURS
)
NUM_CLASSES = len(CLASS_NAMES)  # 49

FRAME_NAME = re.compile(r"image_([0-9]+)\.png")
logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be used: one sentence that names the file and says what to do."""


def class_id(shape: str, material: str, colour: str) -> int:
    """Return the id, 1..48, of a kind of object. Raises ValueError for a name not in the table."""
    kind = 16 * SHAPES.index(shape) + 8 * MATERIALS.index(material)
    return 1 + kind + COLOURS.index(colour)


def natural_key(path: str | Path) -> list[list[str | int]]:
    """Sort key in which numbers count as numbers: video_2 comes before video_10."""
    parts = [re.split(r"([0-9]+)", part) for part in Path(path).parts]
    return [[int(s) if i % 2 else s for i, s in enumerate(part)] for part in parts]


def find_videos(root: str | Path) -> list[Path]:
    """Return every folder at or below `root` that holds image_Y.png, in natural order.

    Follows links, but takes each real folder once; leaves out hidden folders (".name").
    Raises DataError if `root` is no folder or there is no video in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder, give a folder of videos.")
    videos, seen = [], set()

    def warn(error: OSError) -> None:
        logger.warning("%s: left out, the folder cannot be read", error.filename)

    for folder, below, files in os.walk(root, onerror=warn, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [] if real in seen else sorted(d for d in below if not d.startswith("."))
        if real not in seen and any(FRAME_NAME.fullmatch(name) for name in files):
            videos.append(Path(folder))
        seen.add(real)
    if not videos:
        raise DataError(f"{root}: no video in it, a video is a folder that holds image_0.png, ...")
    return sorted(videos, key=lambda video: (natural_key(video), str(video)))


def frame_paths(video: str | Path) -> list[Path]:
    """Return the image_Y.png of one video, by the number Y. Raises DataError for no folder."""
    try:
        paths = list(Path(video).iterdir())
    except OSError as error:
        raise DataError(f"{video}: the folder cannot be read ({error.strerror}).") from None
    frames = [(int(m[1]), path) for path in paths if (m := FRAME_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(frames)]


def numbering_faults(paths: Sequence[Path]) -> list[str]:
    """Return what is wrong with the numbers of a video's image_Y.png, a sentence each."""
    faults = []
    numbers = {int(FRAME_NAME.fullmatch(path.name)[1]) for path in paths}
    if names := _few(f"image_{n}.png" for n in range(max(numbers, default=1)) if n not in numbers):
        faults.append(f"missing frame: {names}.")
    if len(numbers) < len(paths):
        faults.append("two frames have the same number.")
    return faults


def read_frame(path: str | Path) -> Tensor:
    """Return one picture as uint8 (3, H, W), RGB. Raises DataError if it cannot be decoded."""
    try:
        data = Path(path).read_bytes()
        chunks = _png_chunks(data)
        frame = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except (OSError, RuntimeError, ValueError, MemoryError):
        raise DataError(f"{path}: unreadable PNG, replace the file or remove the video.") from None
    if frame.dtype != torch.uint8 or b"tRNS" in chunks:  # a palette with tRNS is decoded wrongly
        raise DataError(f"{path}: not plain 8-bit RGB, convert the file.")
    return frame


def _png_chunks(data: bytes) -> list[bytes]:
    """Return the names of a PNG's chunks. Raises ValueError if a checksum is wrong.

    Needed because torchvision 0.29 dies of a segmentation fault on damaged pixel data.
    """
    names, start = [], 8
    while names[-1:] != [b"IEND"]:
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        chunk, checksum = data[start + 4 : end], data[end : end + 4]
        if len(checksum) < 4 or zlib.crc32(chunk) != int.from_bytes(checksum, "big"):
            raise ValueError("wrong checksum")
        names.append(chunk[:4])
        start = end + 4
    return names


def read_mask(video: str | Path) -> np.ndarray | None:
    """Return mask.npy, memory-mapped: integers (T, H, W), ids not checked; None if there is none.

    Raises DataError if it is not a whole .npy file of integers with three axes.
    """
    path = Path(video, "mask.npy")
    if not os.path.lexists(path):
        return None
    try:
        mask = np.lib.format.open_memmap(path, mode="r")  # np.load, but never a zip or a pickle
    except Exception as error:  # damaged headers raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: unreadable mask ({reason}), replace the file.") from None
    if mask.dtype.kind not in "iu" or mask.ndim != 3:
        what = f"{mask.dtype} {mask.shape}"
        raise DataError(f"{path}: holds {what}, not class ids (frames, height, width); replace it.")
    return mask


@dataclass
class VideoReport:
    """What one video folder holds; `faults` has one sentence for each thing wrong with it."""

    video: Path
    frames: int = 0
    size: tuple[int, int] | None = None  # height, width
    labelled: bool = False
    classes: tuple[int, ...] = ()  # the ids that occur in the mask, background included
    faults: list[str] = field(default_factory=list)


def inspect_video(video: str | Path) -> VideoReport:
    """Read every file of a video and return what it holds and what is wrong with it."""
    return _load_video(Path(video))[0]


def _load_video(video: Path) -> tuple[VideoReport, np.ndarray | None]:
    """Return a report, and uint8 (T, 4, H, W), RGB and class id, if labelled and without fault."""
    report = VideoReport(video, labelled=os.path.lexists(video / "mask.npy"))

    def attempt(read: Callable, path: Path) -> Any:
        try:
            return read(path)
        except DataError as error:
            report.faults.append(str(error).removeprefix(f"{video}{os.sep}"))

    paths = attempt(frame_paths, video) or []
    report.frames = len(paths)
    report.faults += numbering_faults(paths)
    frames = [frame for path in paths if (frame := attempt(read_frame, path)) is not None]
    sizes = list(dict.fromkeys(tuple(frame.shape[1:]) for frame in frames))
    report.size = sizes[0] if sizes else None
    if len(sizes) > 1:
        report.faults.append(f"frames of different sizes: {_few(map(_size_text, sizes))}.")
    mask = attempt(read_mask, video)
    if mask is not None:
        if len(mask) != len(paths):
            kind = "short" if len(mask) < len(paths) else "long"
            report.faults.append(f"mask.npy too {kind}: {len(mask)} masks, {len(paths)} frames.")
        if report.size and mask.shape[1:] != report.size:
            masks, pictures = _size_text(mask.shape[1:]), _size_text(report.size)
            report.faults.append(f"mask.npy is {masks}, frames are {pictures}.")
        ids = np.unique(mask).tolist()
        report.classes = tuple(i for i in ids if 0 <= i < NUM_CLASSES)
        if names := _few(i for i in ids if not 0 <= i < NUM_CLASSES):
            report.faults.append(f"mask.npy holds ids outside 0..{NUM_CLASSES - 1}: {names}.")
    if mask is None or report.faults:
        return report, None
    return report, np.concatenate([torch.stack(frames), mask[:, None].astype(np.uint8)], axis=1)


def _few(items: Iterable) -> str:
    first = [str(item) for item in islice(items, 4)]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def _size_text(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"


def _odd_sizes(sizes: dict[Path, tuple[int, ...]]) -> dict[Path, str]:
    """Return a fault for each video whose (height, width) is not that of most videos."""
    if not sizes:
        return {}
    most = Counter(sizes.values()).most_common(1)[0][0]
    text = f"frames are {{}}, those of most labelled videos {_size_text(most)}."
    return {v: text.format(_size_text(size)) for v, size in sizes.items() if size != most}


def _in_threads(job: Callable, videos: Sequence[Path], label: str) -> Iterator:
    """Yield job(video) for each video, in order; decoding frees the GIL."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = pool.map(job, videos)
        yield from tqdm(results, label, len(videos), leave=False, disable=None, unit="video")


class CLEVRDataset(Dataset):
    """The frames of CLEVR videos, each with the class id of every pixel.

    Videos are folders at any depth below `path`; video7, video_7 and video_00007 are all names:

        train/video_7/image_0.png .. image_21.png   RGB
        train/video_7/mask.npy                      integers (22, H, W), ids 0..48

    A label decoded by hand: id 29 is 1 + 28, and 28 = 16 * 1 + 8 * 1 + 4, so SHAPES[1],
    MATERIALS[1] and COLOURS[4]: a brown rubber sphere.

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

    An item is (Image uint8 (3, H, W), Mask uint8 (H, W)) of tv_tensors. A DataLoader fetches
    whole batches at once, for which it needs `collate_fn=CLEVRDataset.collate`.
    Raises DataError if no video can be used, or later if a file has become unreadable.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        transform: Callable | None = None,
        labelled: bool = True,
        cache: str | Path | bool = True,
    ):
        self.transform, self.labelled = transform, labelled
        is_folder = isinstance(path, (str, Path))
        videos = find_videos(path) if is_folder else [Path(video) for video in path]
        if is_folder and labelled:
            videos = [video for video in videos if os.path.lexists(video / "mask.npy")]
        self.skipped: dict[Path, str] = {}
        self._cached: dict[Path, tuple[Path | None, tuple[int, ...]]] = {}  # file, (T, 4, H, W)
        self._opened: dict[int, Tensor | np.ndarray] = {}  # by this process, when first read
        if labelled:
            self._prepare(videos, _cache_root(cache))
        for video, reason in self.skipped.items():
            logger.warning("%s: skipped, %s", video, reason)
        self.videos = [video for video in videos if video not in self.skipped]
        self._names = [[frame.name for frame in frame_paths(video)] for video in self.videos]
        if not any(self._names):
            where = path if is_folder else f"{len(videos)} folders given"
            what = "video with mask.npy and without fault" if labelled else "frame"
            raise DataError(f"{where}: no {what} in it, see what python dataset.py says of it.")
        lengths = [len(names) for names in self._names]
        pairs = [np.arange(n) for n in lengths]
        # (N, 2): the position in `videos` and the frame within that video, for each item
        self.index = np.stack([np.repeat(np.arange(len(pairs)), lengths), np.concatenate(pairs)], 1)

    def _prepare(self, videos: list[Path], root: Path | None) -> None:
        """Check all videos; decode those that the cache does not hold yet."""
        files = {video: _cache_file(root, video) for video in videos}
        found: dict[Path, Any] = {video: _cached_shape(files[video]) for video in videos}
        failures: list[OSError] = []

        def decode(video: Path) -> tuple[int, ...] | str:
            if shape := _cached_shape(files[video]):  # another process was first
                return shape
            report, block = _load_video(video)
            if block is None:
                return " ".join(report.faults) or "no mask.npy in it."
            unchanged = files[video] == _cache_file(root, video)  # while it was being read
            try:
                if files[video] and unchanged and not failures:
                    _save_whole(files[video], block)
            except OSError as error:
                failures.append(error)
            return block.shape

        todo = [video for video in videos if found[video] is None]
        random.Random().shuffle(todo)  # so that processes started together share the work
        found |= zip(todo, _in_threads(decode, todo, "decoding"), strict=True)
        if failures:
            text = "cache %s cannot be written (%s): every epoch decodes the PNGs again"
            logger.warning(text, root, failures[0].strerror)
        faults = {video: shape for video, shape in found.items() if isinstance(shape, str)}
        self._cached = {v: (files[v], shape) for v, shape in found.items() if v not in faults}
        faults |= _odd_sizes({v: tuple(shape[2:]) for v, (_, shape) in self._cached.items()})
        self.skipped = {video: faults[video] for video in videos if video in faults}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}  # a worker process opens its own

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Image, Mask] | Image:
        if not self.labelled:
            image = Image(self._read(*self.index[i]))
            return self.transform(image) if self.transform else image
        frame, mask = self._read(*self.index[i])
        sample = Image(frame.clone()), Mask(mask.clone())  # the cache is not the caller's to change
        return self.transform(*sample) if self.transform else sample

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | Tensor:
        """Return a batch, uint8 (B, 3, H, W), and if labelled its masks, uint8 (B, H, W)."""
        samples = [self[i] if self.transform else self._read(*self.index[i]) for i in indices]
        if not self.labelled:
            return torch.stack(samples)
        frames, masks = zip(*samples, strict=True)
        return torch.stack(frames), torch.stack(masks)

    @staticmethod
    def collate(batch: Any) -> Any:
        """Return a batch as __getitems__ made it: pass this to DataLoader as collate_fn."""
        return batch

    def _read(self, v: int, t: int) -> tuple[Tensor, Tensor] | Tensor:
        """Return frame t of video v and, if labelled, its mask: views, if they are cached."""
        if self.labelled and v not in self._opened:
            self._opened[v] = self._open(v)
        block = self._opened.get(v)
        if isinstance(block, Tensor):
            return block[t, :3], block[t, 3]
        frame = read_frame(self.videos[v] / self._names[v][t])
        return (frame, torch.from_numpy(block[t].astype(np.uint8))) if self.labelled else frame

    def _open(self, v: int) -> Tensor | np.ndarray:
        """Map a cached video, uint8 (T, 4, H, W), or without a cache its mask file, (T, H, W)."""
        file, shape = self._cached[self.videos[v]]
        with suppress(OSError, RuntimeError):  # a cache deleted since: back to the PNGs
            if file:  # not as np.memmap, which holds a file descriptor for each video
                data = torch.from_file(str(file), False, file.stat().st_size, dtype=torch.uint8)
                return data[-math.prod(shape) :].view(shape)
        if len(self._opened) >= 256:  # these do hold descriptors, and often 1024 are allowed
            self._opened.clear()
        if (mask := read_mask(self.videos[v])) is None:
            raise DataError(f"{self.videos[v]}: its mask.npy is gone, start again.")
        return mask


class RandomObjectCrops(v2.Transform):
    """Cut several square crops around random objects out of every frame of a batch.

    Every kind of object in a frame is as likely as any other, however small; it lies anywhere in
    the crop, which is scaled and stretched at random. Nothing is mirrored: CLEVR's masks sit half
    a pixel to the left of the picture, and a mirrored one would sit half a pixel to the right.
    """

    def __init__(self, crops: int, size: int):
        super().__init__()
        self.crops, self.size = crops, size

    def make_params(self, flat_inputs: list[Tensor]) -> dict[str, Tensor]:
        """Return the sampling grid, (B, crops * size, size, 2) in the units of grid_sample."""
        mask = flat_inputs[1]
        device, (batch, height, width) = mask.device, mask.shape
        size = min(self.size, height, width)
        half = size / 2

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(batch, self.crops, 1, device=device)

        ids = mask[:, ::2, ::2].flatten(1).long()
        area = ids.new_zeros(batch, NUM_CLASSES).scatter_add_(1, ids, torch.ones_like(ids))
        weight = torch.where(ids > 0, 1 / area.gather(1, ids), 1e-9)  # empty frames: anywhere
        chosen = torch.multinomial(weight, self.crops, replacement=True)[..., None]
        columns = (width + 1) // 2
        x, y = 2 * (chosen % columns), 2 * (chosen // columns)
        half_x = half * torch.exp(uniform(-0.22, 0.22))
        half_y = half_x * torch.exp(uniform(-0.05, 0.05))
        x = x + uniform(-0.7, 0.7) * half_x
        y = y + uniform(-0.7, 0.7) * half_y
        x = torch.maximum(torch.minimum(x, width - half_x), half_x)  # stay inside the frame
        y = torch.maximum(torch.minimum(y, height - half_y), half_y)
        line = (torch.arange(size, device=device) + 0.5) / half - 1  # -1..1 over the crop
        x = (x + half_x * line) * 2 / width - 1  # (B, crops, size)
        y = (y + half_y * line) * 2 / height - 1
        grid = torch.stack(torch.broadcast_tensors(x[:, :, None], y[..., None]), dim=-1)
        return {"grid": grid.flatten(1, 2)}

    def transform(self, inpt: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Sample an image bilinearly to float [0, 1], a mask by the nearest pixel."""
        is_mask = isinstance(inpt, Mask)
        planes = inpt[:, None] if is_mask else inpt
        mode = "nearest" if is_mask else "bilinear"
        sampled = F.grid_sample(
            planes.as_subclass(Tensor).float(),
            params["grid"],
            mode,
            padding_mode="border",
            align_corners=False,
        )
        size = sampled.shape[-1]
        crops = sampled.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)  # (B*crops, C, ...)
        return Mask(crops[:, 0].to(inpt.dtype)) if is_mask else Image(crops / 255)


class RandomCamera(v2.Transform):
    """Vary exposure, contrast, saturation, white balance, sharpness and noise of every image.

    All stay so small that no colour is taken for another; channels are never swapped, hues never
    turned.
    """

    def transform(self, inpt: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Change a float image batch (B, 3, H, W), [0, 1]; leave a mask as it is."""
        if isinstance(inpt, Mask):
            return inpt
        x = inpt.as_subclass(Tensor)

        def uniform(low: float, high: float, channels: int = 1) -> Tensor:
            shape = (len(x), channels, 1, 1)
            return low + (high - low) * torch.rand(shape, device=x.device)

        x = torch.lerp(x.mean(dim=1, keepdim=True), x, uniform(0.75, 1.25))  # saturation
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        contrast, exposure = uniform(0.8, 1.2), uniform(0.85, 1.15)
        balance = uniform(0.96, 1.04, channels=3)
        x = torch.addcmul(mean * (exposure - contrast) * balance, x, contrast * balance)
        blurred = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        x = torch.lerp(x, blurred, uniform(-0.3, 0.6)).addcmul_(
            torch.randn_like(x), uniform(0, 0.012)
        )
        return Image(x.clamp_(0, 1))


def augmentation(crops: int = 4, size: int = 96) -> v2.Transform:
    """Return the training augmentation: (Image (B, 3, H, W), Mask (B, H, W)) uint8 to crops.

    It works on whole batches, on whichever device they are, and gives Image float in [0, 1]
    (crops * B, 3, size, size) and Mask uint8 (crops * B, size, size), changed jointly. No change
    can turn one class into another.
    """
    return v2.Compose([RandomObjectCrops(crops, size), RandomCamera()])


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
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as stream:
            np.save(stream, block)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    with suppress(FileNotFoundError):  # another process deletes them too
        for old in set(file.parent.iterdir()) - {file}:
            # a part that is an hour old has lost its writer
            if old.suffix == ".npy" or time.time() - old.stat().st_mtime > 3600:
                old.unlink()


def print_report(path: str | Path) -> int:
    """Print what the videos below `path` hold and their faults; return how many have a fault."""
    reports = list(_in_threads(inspect_video, find_videos(path), "reading"))
    labelled = {r.video: r.size for r in reports if r.labelled and not r.faults}
    odd = _odd_sizes(labelled)
    kinds = Counter()
    for r in reports:
        r.faults += [odd[r.video]] if r.video in odd else []
        size = _size_text(r.size) if r.size else "no readable frame"
        mask = "labelled" if r.labelled else "without mask.npy"
        kinds[f"{r.video.parent}", f"{r.frames} frames, {size}, {mask}"] += 1
    print(f"{path}: {len(reports)} videos, {sum(r.frames for r in reports)} frames")
    for (folder, kind), count in kinds.items():
        print(f"  {folder}: {count} x {kind}")
    present = Counter(i for r in reports for i in r.classes)
    print(
        f"classes present: {len(present)} of {NUM_CLASSES}" + " (id, name, videos)" * bool(present)
    )
    for i in sorted(present):
        print(f"  {i:2}  {CLASS_NAMES[i]:22}{present[i]:6}")
    faulty = [r for r in reports if r.faults]
    print(f"videos with faults: {len(faulty)}")
    for r in faulty:
        print("\n".join(f"  {r.video}: {fault}" for fault in r.faults))
    return len(faulty)


def main() -> int:
    """Read the command line, print the report, return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="folder with videos, at any depth")
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        return 1 if print_report(parser.parse_args().path) else 0
    except DataError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
