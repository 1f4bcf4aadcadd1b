"""Label videos with a trained network: a folder of PNGs becomes a folder of masks.

    python infer.py --ckpt weights/clevr_unet.pt --out masks --data path
    python infer.py --ckpt checkpoints/Unet_checkpoint_best.pt --out masks  # the data it learned
    python infer.py --ckpt file --out masks --data path --resume            # after an interruption

Every folder below --data that holds image_*.png is a video; its masks go to the same relative path
below --out, mask.npy, uint8 (frames, height, width), ids 0..48. A video with a fault is named on
stderr and gets no mask; the others are done, and the exit status is 1.
"""

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from tqdm import tqdm

from dataset import FRAME_NAME, CLEVRDataset, DataError, find_videos, frame_paths, read_mask
from model import UNet
from utils import (
    UserError,
    atomic_write,
    choose_device,
    load_model,
    log_header,
    mixed_precision,
    run_script,
)

IN_FLIGHT = 2  # batches that the device works on while the one before them is unpacked
UNWRITTEN = 16  # masks that may wait for the disk
WRITERS = 4  # threads; each mask waits for its own flush to the disk

Batch = tuple[list[tuple[list[int], Tensor]], dict[int, str]]
Labels = np.ndarray | str  # (H, W) uint8, or why there are none


def find_data(data: Path | None, checkpoint: dict, ckpt: Path) -> Path:
    """Return the folder to label: `data`, or else the one that the checkpoint learned from."""
    if data is None:
        if not checkpoint.get("data"):
            raise UserError(f"{ckpt} does not say what it was trained on: give --data")
        data = Path(checkpoint["data"])
        if not data.is_dir():
            raise UserError(f"{ckpt} was trained on {data}, which is not here: give --data")
    return data


def plan(data: Path, out: Path) -> dict[Path, Path]:
    """Return where the masks of each video below `data` go.

    Raises:
        UserError: a mask would land among the frames, and perhaps the labels, of a video.
        DataError: there is no video.
    """
    targets = {video: out / video.relative_to(data) / "mask.npy" for video in find_videos(data)}
    videos = {video.resolve() for video in targets}
    for target in targets.values():
        folder = target.parent
        if folder.resolve() in videos or (folder.is_dir() and frame_paths(folder)):
            raise UserError(
                f"--out {out} would put masks over the labels in {folder}, a folder of frames: "
                "give a folder of its own"
            )
    return targets


def fault_of(video: Path) -> str | None:
    """Return what is wrong with the numbers of a video's frames, in a sentence, or None."""
    try:
        numbers = [int(FRAME_NAME.fullmatch(path.name)[1]) for path in frame_paths(video)]
    except DataError as error:
        return str(error)
    for expected, number in enumerate(numbers):
        if number > expected:
            return f"{video}: image_{expected}.png is missing, add it or remove the video."
        if number < expected:
            return f"{video}: image_{number}.png is there twice, remove one."
    return None


def unfinished(targets: dict[Path, Path]) -> dict[Path, Path]:
    """Return the targets that lack a whole mask, and delete what a killed run left of them."""
    rest = {video: target for video, target in targets.items() if not _is_done(video, target)}
    for target in rest.values():
        for part in target.parent.glob(f".{target.name}.*.tmp"):
            part.unlink(missing_ok=True)
    return rest


def _is_done(video: Path, target: Path) -> bool:
    try:
        mask = read_mask(target.parent)
        return mask is not None and len(mask) == len(frame_paths(video))
    except DataError:
        return False


class Frames(CLEVRDataset):
    """The frames of videos, with a sentence in place of each that cannot be read."""

    def __init__(self, videos: list[Path]):
        super().__init__(videos, labelled=False, cache=False)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the frames of each size, beside their positions in `indices`; and the faults."""
        by_size: dict[tuple[int, ...], dict[int, Tensor]] = {}
        faults: dict[int, str] = {}
        for position, i in enumerate(indices):
            try:
                frame = self[i]  # uint8 (3, H, W)
                by_size.setdefault(tuple(frame.shape), {})[position] = frame
            except DataError as error:
                faults[position] = str(error)
        stacks = [(list(frames), torch.stack(list(frames.values()))) for frames in by_size.values()]
        return stacks, faults


def default_workers(device: torch.device) -> int:
    """Return how many processes decode PNGs, at about 1,000 frames/s each.

    A GPU labels faster than many can decode; on a CPU they take from the network's time.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cpus if device.type == "cuda" else 1 + cpus // 8)


def predict(model: UNet, batches: Iterable[Batch], device: torch.device) -> Iterator[Labels]:
    """Yield the labels of each frame, in order; on CUDA the next batches are on their way."""
    cuda = device.type == "cuda"
    pending: deque[tuple] = deque()
    for stacks, faults in batches:
        labels = []
        for positions, frames in stacks:
            frames = frames.to(device, non_blocking=cuda)  # bytes; the network scales them
            with mixed_precision(device):
                found = model.predict(frames)  # (B, H, W) uint8
            labels.append((positions, found.to("cpu", non_blocking=cuda)))
        copied = torch.cuda.current_stream(device).record_event() if cuda else None
        pending.append((labels, faults, copied))
        if len(pending) > IN_FLIGHT:
            yield from _in_order(*pending.popleft())
    for batch in pending:
        yield from _in_order(*batch)


def _in_order(
    labels: list[tuple[list[int], Tensor]], faults: dict[int, str], copied: torch.cuda.Event | None
) -> list[Labels]:
    if copied:
        copied.synchronize()
    found: dict[int, Labels] = dict(faults)
    for positions, stack in labels:
        found.update(zip(positions, stack.numpy(), strict=True))
    return [found[i] for i in range(len(found))]


def fault_in(video: Path, labels: list[Labels]) -> str | None:
    """Return why the frames of a video give no mask, in a sentence, or None."""
    for item in labels:
        if isinstance(item, str):
            return item
        if item.shape != labels[0].shape:
            (h, w), (height, width) = labels[0].shape, item.shape
            return f"{video}: its frames are of different sizes, {w} x {h} and {width} x {height}."
    return None


class Writer:
    """Writes masks in background threads; `write` waits while too many are unwritten.

    Leaving the `with` block waits for all of them. An error in a thread is raised by the next
    `write` or on leaving.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(WRITERS)
        self.unwritten: deque[Future] = deque()

    def write(self, target: Path, labels: list[np.ndarray]) -> None:
        """Save labels, one (H, W) for each frame, as one array."""
        while len(self.unwritten) >= UNWRITTEN or (self.unwritten and self.unwritten[0].done()):
            self.unwritten.popleft().result()
        self.unwritten.append(self.pool.submit(_save, target, labels))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self.pool.shutdown(cancel_futures=error_type is not None)
        while self.unwritten and error_type is None:
            self.unwritten.popleft().result()


def _save(target: Path, labels: list[np.ndarray]) -> None:
    try:
        with atomic_write(target) as file:
            np.save(file, np.stack(labels))
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}): "
            "make room or choose another --out, then go on with --resume"
        ) from None


def label_videos(
    model: UNet, targets: dict[Path, Path], device: torch.device, batch_size: int, workers: int
) -> tuple[int, int, list[str]]:
    """Write a mask for each video in `targets` that has no fault.

    Returns:
        The numbers of videos and frames labelled, and what is wrong with each other video.
    """
    faults = {video: fault for video in targets if (fault := fault_of(video))}
    videos = [video for video in targets if video not in faults]
    for fault in faults.values():
        tqdm.write(f"skipped: {fault}", file=sys.stderr)
    if not videos:
        return 0, 0, list(faults.values())
    dataset = Frames(videos)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=SequentialSampler(dataset),
        num_workers=workers,
        collate_fn=CLEVRDataset.collate,
        pin_memory=device.type == "cuda",
    )
    numbers = dataset.index[:, 0]  # the position in `videos` of each frame's video
    done = frames = 0
    progress = tqdm(total=len(dataset), unit="frame", disable=None)  # none in a log file
    with progress, Writer() as writer:
        labelled = zip(numbers, predict(model, loader, device), strict=True)
        for number, group in groupby(labelled, key=lambda item: item[0]):
            labels = [item for _, item in group]
            video = videos[number]
            progress.update(len(labels))
            if fault := fault_in(video, labels):
                faults[video] = fault
                tqdm.write(f"skipped: {fault}", file=sys.stderr)
                continue
            writer.write(targets[video], labels)
            done, frames = done + 1, frames + len(labels)
    return done, frames, list(faults.values())


def main() -> int:
    """Label every video; return 1 if some had a fault, else 0."""
    args = parse_args()
    device = choose_device(args.device)
    print(log_header(device), flush=True)
    model, checkpoint = load_model(UNet, args.ckpt)
    model = model.to(device, memory_format=torch.channels_last).eval()
    data = find_data(args.data, checkpoint, args.ckpt)
    targets = plan(data, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        found = len(targets)
        targets = unfinished(targets)
        print(f"{found - len(targets)} of {found} videos have their masks already")
    workers = default_workers(device) if args.workers is None else args.workers
    start = time.perf_counter()
    try:
        done, frames, faults = label_videos(model, targets, device, args.batch_size, workers)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a process that decodes frames was killed, for lack of memory or of space in /dev/shm: "
            "give fewer --workers and go on with --resume"
        ) from None
    seconds = time.perf_counter() - start
    print(
        f"{done} videos, {frames} frames in {seconds:.1f} s "
        f"({frames / seconds:.1f} frames/s) -> {args.out}"
    )
    if faults:
        print(f"{len(faults)} videos skipped, see above", file=sys.stderr)
    return 1 if faults else 0


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="weights: a file that train.py wrote")
    add("--out", type=Path, required=True, help="folder for the masks")
    add("--data", type=Path, help="folder of videos (default: what the weights were trained on)")
    add("--batch-size", type=_positive, default=22, help="frames at once (default: 22, one video)")
    add("--workers", type=_count, help="processes that decode frames; 0 for none beside this one")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--resume", action="store_true", help="keep the masks that --out holds, do the rest")
    return parser.parse_args()


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"give a whole number, at least {least}, not {text}")
    return int(text)


def _positive(text: str) -> int:
    return _count(text, least=1)


if __name__ == "__main__":
    run_script(main, DataError)
