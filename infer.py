"""Label videos with a trained network: a folder of PNGs becomes a folder of masks.

    python infer.py --ckpt weights/clevr_unet.pt --out masks --data path
    python infer.py --ckpt checkpoints/Unet_checkpoint_best.pt --out masks  # the data it learned
    python infer.py --ckpt file --out masks --data path --resume            # after an interruption
    torchrun --nproc-per-node=8 infer.py --ckpt file --out masks --data path  # on eight GPUs

Every folder below --data that holds image_*.png is a video; its masks go to the same relative path
below --out, mask.npy, uint8 (frames, height, width), ids 0..48. A video with a fault is named on
stderr and gets no mask; the others are done, and the exit status is 1.

The classes of a video are estimated from all of its frames together before any pixel gets its
label: an object never changes its class, so a class that turns up here and there on others is not
in the video. --no-consistency labels each frame by itself.
"""

import argparse
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

from dataset import (
    CLEVRDataset,
    DataError,
    find_videos,
    frame_paths,
    numbering_faults,
    read_mask,
)
from model import FACTOR_SIZES, UNet
from utils import (
    Processes,
    UserError,
    atomic_write,
    choose_device,
    compile_network,
    load_model,
    log_header,
    mixed_precision,
    run_script,
)

NUM_KINDS = math.prod(FACTOR_SIZES)  # 48 classes of objects
SAMPLE = 2048  # object pixels of a video that its classes are estimated from
ROUNDS = 50  # of that estimate; stray classes fade slowly, fewer than 20 leave some
DOUBTFUL = 30  # object pixels, in all frames together, that halve the doubt in a class
FRAME_SIZE = 160, 240  # height and width in most CLEVR videos, which --compile makes ready for
LANES = 16  # batches at once on a CPU, at most
UNWRITTEN = 16  # masks that may wait for the disk
WRITERS = 4  # threads; each mask waits for its own flush to the disk

Batch = tuple[list[tuple[list[int], Tensor]], dict[int, str]]
# What is known of a frame: labels (H, W) uint8; or where its objects are, (H, W) bool, and the
# evidence of their classes, (object pixels, 13 or 48); or why there is nothing, in a sentence.
Frame = Tensor | tuple[Tensor, Tensor] | str


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
        faults = numbering_faults(frame_paths(video))
    except DataError as error:
        return str(error)
    return f"{video}: {' '.join(faults)} Mend that or remove the video." if faults else None


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

    A GPU labels faster than many can decode; on a CPU each core decodes what it labels.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cpus) if device.type == "cuda" else 0


@torch.inference_mode()
def look(model: UNet, frames: Tensor, consistency: bool) -> list[Frame]:
    """Return what the network makes of each of `frames`, (B, 3, H, W) uint8."""
    with mixed_precision(frames.device):
        if not consistency:
            return list(model.predict(frames))
        objects, evidence = model.evidence(frames)
    counts = objects.flatten(1).sum(dim=1).tolist()
    return list(zip(objects, evidence.half().split(counts), strict=True))


def predict(
    model: UNet,
    batches: Iterable[Any],
    read: Callable[[Any], Batch],
    device: torch.device,
    consistency: bool,
) -> Iterator[Frame]:
    """Yield what the network makes of each frame of read(batch), in order.

    On a CPU each core reads and labels batches of its own: that loses less than sharing one.
    """

    def label(batch: Any) -> list[Frame]:
        stacks, faults = read(batch)
        found: dict[int, Frame] = dict(faults)
        for positions, frames in stacks:
            frames = frames.to(device, non_blocking=device.type == "cuda")  # bytes
            found.update(zip(positions, look(model, frames, consistency), strict=True))
        return [found[i] for i in range(len(found))]

    threads = torch.get_num_threads()
    lanes = 1 if device.type == "cuda" else min(LANES, threads)
    torch.set_num_threads(threads // lanes)  # of this thread and of those to come
    try:
        with ThreadPoolExecutor(lanes) as pool:
            ahead: deque[Future] = deque()
            for batch in batches:
                ahead.append(pool.submit(label, batch))
                if len(ahead) > lanes:
                    yield from ahead.popleft().result()
            for labelled in ahead:
                yield from labelled.result()
    finally:
        torch.set_num_threads(threads)


def membership(channels: int) -> Tensor:
    """Return which channels of the evidence each class adds up, (channels, 48), 0 or 1."""
    kind = torch.arange(NUM_KINDS)
    if channels == NUM_KINDS:
        return F.one_hot(kind).float()
    factors = kind // 16, kind // 8 % 2, kind % 8  # shape, material, colour
    return torch.cat([F.one_hot(factor) for factor in factors], dim=1).float().T


@torch.inference_mode()
def consistent_labels(objects: Tensor, evidence: Tensor) -> Tensor:
    """Label the object pixels of one video by what they and all the others say together.

    The share of each class among the object pixels is estimated by expectation maximisation
    (Saerens, Latinne and Decaestecker 2002, https://doi.org/10.1162/089976602753284446): classes
    that only come second, or first on scattered pixels, fade. For the labels, any class with
    clearly more than DOUBTFUL pixels then counts alike, so that an object which is seen briefly
    holds its own against one that is seen always.

    Args:
        objects: (T, H, W) bool, where there is an object; that does not change.
        evidence: (N, 13 or 48), for each such pixel the logits of 3 shapes, 2 materials and 8
            colours, or of the classes.

    Returns:
        (T, H, W) uint8, ids 0..48.
    """
    labels = objects.to(torch.uint8)
    if not len(evidence):
        return labels
    members = membership(evidence.shape[1]).to(evidence.device)
    sample = evidence[:: 1 + len(evidence) // SAMPLE].float()
    p = (sample @ members).softmax(dim=1)  # (n, 48), of a class in a pixel of an object
    share = torch.full_like(p[0], 1 / NUM_KINDS)
    for _ in range(ROUNDS):
        share = share * (p.T @ (1 / (p @ share))) / len(p)
    pixels = share * len(evidence)  # in all frames
    classes = (pixels >= pixels.max().clamp(max=0.5)).nonzero()[:, 0]
    prior = (pixels / (pixels + DOUBTFUL)).log()[classes]
    best = [  # a part at a time, which bounds the memory for long videos
        (part.float() @ members[:, classes] + prior).argmax(dim=1) for part in evidence.split(2**18)
    ]
    return labels.masked_scatter(objects, (classes + 1).to(torch.uint8)[torch.cat(best)])


def combine(frames: list[Frame]) -> Tensor:
    """Return the labels of one video, (T, H, W) uint8, from what is known of its frames."""
    if isinstance(frames[0], Tensor):
        return torch.stack(frames)
    objects, evidence = zip(*frames, strict=True)
    return consistent_labels(torch.stack(objects), torch.cat(evidence))


def fault_in(video: Path, frames: list[Frame]) -> str | None:
    """Return why the frames of a video give no mask, in a sentence, or None."""
    sizes = []
    for frame in frames:
        if isinstance(frame, str):
            return frame
        height, width = (frame if isinstance(frame, Tensor) else frame[0]).shape
        sizes.append(f"{width} x {height}")
    odd = [size for size in sizes if size != sizes[0]]
    return f"{video}: its frames are of different sizes, {sizes[0]} and {odd[0]}." if odd else None


def save(target: Path, labels: Tensor, copied: torch.cuda.Event | None) -> None:
    """Write labels (T, H, W), once they are copied from the GPU."""
    if copied:
        copied.synchronize()
    try:
        with atomic_write(target) as file:
            np.save(file, labels.numpy())
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}): "
            "make room or choose another --out, then go on with --resume"
        ) from None


def label_videos(
    model: UNet,
    targets: dict[Path, Path],
    device: torch.device,
    batch_size: int,
    workers: int,
    consistency: bool = True,
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
    batches: Iterable = BatchSampler(range(len(dataset)), batch_size, drop_last=False)
    read = dataset.__getitems__
    if workers or device.type == "cuda":
        batches = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=CLEVRDataset.collate,
            pin_memory=device.type == "cuda",
        )
        read = CLEVRDataset.collate  # they come as they are to be
    numbers = dataset.index[:, 0]  # the position in `videos` of each frame's video
    done = frames = 0
    progress = tqdm(total=len(dataset), unit="frame", disable=None)  # none in a log file
    unwritten: deque[Future] = deque()
    with progress, ThreadPoolExecutor(WRITERS) as pool:
        labelled = zip(numbers, predict(model, batches, read, device, consistency), strict=True)
        for number, group in groupby(labelled, key=lambda item: item[0]):
            found = [frame for _, frame in group]
            video = videos[number]
            progress.update(len(found))
            if fault := fault_in(video, found):
                faults[video] = fault
                tqdm.write(f"skipped: {fault}", file=sys.stderr)
                continue
            labels = combine(found).to("cpu", non_blocking=device.type == "cuda")
            copied = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
            unwritten.append(pool.submit(save, targets[video], labels, copied))
            if len(unwritten) > UNWRITTEN:
                unwritten.popleft().result()
            done, frames = done + 1, frames + len(found)
        for future in unwritten:
            future.result()
    return done, frames, list(faults.values())


def main() -> int:
    """Label every video; return 1 if some had a fault, else 0."""
    args = parse_args()
    processes = Processes(choose_device(args.device))
    device = processes.device
    if processes.first:
        print(log_header(device), flush=True)
    model, checkpoint = load_model(UNet, args.ckpt)
    model = model.to(device, memory_format=torch.channels_last).eval().fuse()
    if args.compile:
        size = (args.batch_size, 3, *FRAME_SIZE)
        compile_network(model, torch.zeros(size, dtype=torch.uint8, device=device))
    data = find_data(args.data, checkpoint, args.ckpt)
    targets = plan(data, args.out)
    targets = dict(list(targets.items())[processes.rank :: processes.count])
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        found = len(targets)
        targets = unfinished(targets)
        print(f"{found - len(targets)} of {found} videos have their masks already")
    workers = default_workers(device) if args.workers is None else args.workers
    start = time.perf_counter()
    try:
        done, frames, faults = label_videos(
            model, targets, device, args.batch_size, workers, not args.no_consistency
        )
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a process that decodes frames was killed, for lack of memory or of space in /dev/shm: "
            "give fewer --workers and go on with --resume"
        ) from None
    totals = torch.tensor([done, frames, len(faults)], device=device)
    processes.add_up(totals)
    done, frames, skipped = totals.tolist()
    seconds = time.perf_counter() - start
    if processes.first:
        print(
            f"{done} videos, {frames} frames in {seconds:.1f} s "
            f"({frames / seconds:.1f} frames/s) -> {args.out}"
        )
        if skipped:
            print(f"{skipped} videos skipped, see above", file=sys.stderr)
    return 1 if skipped else 0


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
    add("--workers", type=_count, help="processes that decode frames; 0: this one alone")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--compile", action="store_true", help="torch.compile: a minute more to start, then faster")
    add("--no-consistency", action="store_true", help="label each frame by itself")
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
