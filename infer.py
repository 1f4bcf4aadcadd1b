"""Label videos with a trained network: a folder of PNGs becomes a folder of masks.

    python infer.py --ckpt weights/clevr_unet.pt --out masks --data path
    python infer.py --ckpt checkpoints/Unet_checkpoint_best.pt --out masks  # the data it learned
    python infer.py --ckpt file --out masks --data path --resume            # after an interruption
    torchrun --nproc-per-node=8 infer.py --ckpt file --out masks --data path  # on eight GPUs

Every folder below --data that holds image_*.png is a video; its masks go to the same relative path
below --out, mask.npy, uint8 (frames, height, width), ids 0..48. A video with a fault is named on
stderr and gets no mask; the others are done, and the exit status is 1.

Objects are followed through the video (objects.py), and each is one class. --objects writes them
beside mask.npy to objects.csv, a row for each object and frame; --no-consistency labels each frame
by itself. Frames of another size than the checkpoint learned from are scaled (scale.py).
"""

import argparse
import contextlib
import csv
import io
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from batches import WholeVideos, choose_workers, evenly, fill_batches, in_lanes, threads_shared
from checkpoints import load_checkpoint
from dataset import CLEVRDataset
from files import atomic_write
from model import UNet, for_labelling
from objects import TABLE, Row, Tracks, follow, table
from parts import gather, occupied
from records import RECORD, maker, makers, unfinished, write_record
from scale import AS_THEY_ARE, FRAME_SIZE, Scale, factor, fill, learned_size, outline, resize
from utils import (
    Processes,
    UserError,
    at_least,
    choose_device,
    compile_network,
    log_header,
    make_parser,
    mixed_precision,
    run_script,
)
from videos import find_videos, frame_paths, read_frame

MAX_AT_ONCE = 2**24  # pixels that the network sees together: some 2 GB, and more is no faster
LONELY = 2**18  # pixels; a smaller frame comes with another, as `utils.same_kernels` asks
MAX_WORKERS = 16  # processes that decode for a GPU


def find_data(data: Path | None, checkpoint: dict, ckpt: Path) -> Path:
    """Return the folder to label: `data`, or else the one that the checkpoint learned from."""
    if data is None:
        if not checkpoint.get("data"):
            raise UserError(f"{ckpt} does not say what it was trained on: give --data")
        data = Path(str(checkpoint["data"]))
        if not data.is_dir():
            raise UserError(f"{ckpt} was trained on {data}, which is not here: give --data")
    return data


def plan(data: Path, out: Path) -> dict[Path, Path]:
    """Return where the masks of each video below `data` go.

    Raises:
        UserError: there is no video, or a mask would land among the frames, and perhaps the
            labels, of one.
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


@torch.inference_mode()
def label(
    model: UNet,
    videos: Sequence[Tensor],
    device: torch.device,
    batch_size: int,
    consistency: bool,
    scale: Scale = AS_THEY_ARE,
) -> list[Tracks]:
    """Return the labels of videos that have frames of one size.

    Args:
        model: In evaluation mode, on `device`.
        videos: Of each, frames uint8 (T, 3, H, W).
        device: Where the network runs.
        batch_size: Frames at once.
        consistency: Whether objects are followed through the video; else each frame has the
            labels that the network gives it, and nothing is known of objects.
        scale: At which the network sees the frames; the labels have their own size.
    """
    sizes = scale.sizes(*videos[0].shape[2:])
    found, evidence, outlines = [], [], []
    pixels = math.prod(sizes[-1] if sizes else videos[0].shape[2:])
    at_once = min(max(batch_size, 2 if pixels < LONELY else 1), max(1, MAX_AT_ONCE // pixels))
    for frames in evenly(torch.cat(list(videos)), at_once):
        whole = frames.to(device, non_blocking=True)  # bytes
        if len(frames) == 1 and pixels < LONELY:
            whole = whole.repeat(2, 1, 1, 1)
        with mixed_precision(device):
            stages = model.stages(resize(whole, sizes[0]) if sizes else whole)
            answer = model.evidence(stages) if consistency else (model.labels(stages),)
            if sizes:
                answer = (*answer, outline(model, whole, stages[-1].thing, sizes[1:]))
        answer = [part[: len(frames)].to("cpu", non_blocking=True) for part in answer]
        if device.type != "cpu":  # this lane waits, while others launch
            arrived = torch.Event(device)
            arrived.record()
            arrived.synchronize()
        found.append(answer[0])
        if consistency:
            evidence.append(gather(*answer[:2]))
        outlines += answer[-1:] if sizes else ()
    lengths = [len(video) for video in videos]
    parts = torch.cat(found).split(lengths)
    if consistency:
        counts = [int(occupied(objects).sum()) for objects in parts]
        cells = torch.cat(evidence).split(counts)
        tracks = [follow(*both) for both in zip(parts, cells, strict=True)]
    else:
        tracks = [Tracks(labels, {}) for labels in parts]
    if not sizes:
        return tracks
    of_video = zip(tracks, parts, torch.cat(outlines).split(lengths), strict=True)
    return [t._replace(labels=fill(t.labels, part > 0, edges)) for t, part, edges in of_video]


def save(target: Path, tracks: Tracks, with_table: bool, made_by: dict | None = None) -> None:
    """Write the labels of a video; before them the table of its objects, after them the record.

    A table or a record of the mask that was there before does not outlive it. Raises OSError with
    the name of what cannot be written.
    """
    for name in (RECORD, TABLE):
        target.with_name(name).unlink(missing_ok=True)
    rows = None
    if with_table:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([Row._fields, *table(tracks)])
        rows = text.getvalue().encode()
        with atomic_write(target.with_name(TABLE)) as file:
            file.write(rows)
    mask = io.BytesIO()
    np.save(mask, tracks.labels.numpy())
    with atomic_write(target) as file:
        file.write(mask.getbuffer())
    if made_by:
        write_record(target, made_by, mask.getvalue(), rows)


def decoders(targets: dict[Path, Path], asked: int | None, size: int, processes: Processes) -> int:
    """Return how many processes decode PNGs, at about 1,000 frames/s each; on a CPU lanes do.

    Each reads batches of `size` frames ahead, as large as the first frame of the first target.
    """
    frame = 3 * math.prod(FRAME_SIZE)  # bytes
    with contextlib.suppress(UserError, StopIteration):
        frame = read_frame(frame_paths(next(iter(targets)))[0]).numel()
    return choose_workers(asked, size * frame * processes.count, processes, MAX_WORKERS)


def label_videos(
    model: UNet,
    targets: dict[Path, Path],
    device: torch.device,
    batch_size: int,
    workers: int,
    consistency: bool = True,
    with_table: bool = False,
    scale: Scale = AS_THEY_ARE,
    made_by: Mapping[Path, dict[str, Any]] | None = None,
    tell: Callable[[str], None] = tqdm.write,
) -> tuple[int, int, list[str]]:
    """Write a mask, and maybe a table of objects, for each video in `targets` that has no fault.

    Tells once of each size of frames that is not seen as it is what is done to it. Of each video
    what makes its mask, as of `records.makers`, is written beside that.

    Returns:
        The numbers of videos and frames labelled, and what is wrong with each other video.
    """
    if not targets:
        return 0, 0, []
    dataset = CLEVRDataset(list(targets), labelled=False)
    videos = WholeVideos(dataset)
    batches, read = list(fill_batches(np.bincount(dataset.index[:, 0]), batch_size)), videos.read
    if workers or device.type != "cpu":  # other processes read ahead
        pin = device.type not in ("cpu", "mps")
        batches, read = videos.loader(batches, workers, pin), list

    def job(batch: Any) -> tuple[int, int, list[str], list[str]]:
        """Read, label and write a few videos."""
        items = read(batch)
        whole = [(v, frames) for v, frames, fault in items if not fault]
        notes = []
        for size, group in groupby(whole, key=lambda item: item[1].shape[2:]):
            numbers, frames = zip(*group, strict=True)
            notes.append(scale.describe(*size))
            found = label(model, frames, device, batch_size, consistency, scale)
            for v, tracks in zip(numbers, found, strict=True):
                video = dataset.videos[v]
                save(targets[video], tracks, with_table, made_by and made_by[video])
        faults = [fault for *_, fault in items if fault]
        return len(whole), sum(len(f) for _, f in whole), faults, notes

    done, frames, faults, told = 0, 0, [], {""}
    bar = tqdm(total=len(dataset), unit="frame", disable=None)  # none in a log file
    with threads_shared(device) as lanes, bar as progress:
        for videos_done, frames_done, new_faults, notes in in_lanes(job, batches, lanes):
            progress.update(frames_done)
            done, frames, faults = done + videos_done, frames + frames_done, faults + new_faults
            for fault in new_faults:
                tqdm.write(f"skipped: {fault}", file=sys.stderr)
            for note in notes:
                if note not in told:
                    tell(note)
                told.add(note)
    return done, frames, faults


def main() -> int:
    """Label every video; return 1 if some had a fault, else 0."""
    args = parse_args()
    processes = Processes(choose_device(args.device))
    device = processes.device
    if processes.first:
        print(log_header(device), flush=True)
    checkpoint = load_checkpoint(args.ckpt)
    model = UNet.from_checkpoint(checkpoint, args.ckpt)
    scale = Scale(learned_size(checkpoint, args.ckpt), args.scale)
    model = make_ready(model, device, args.batch_size, args.compile)
    options = {"consistency": not args.no_consistency, "scale": args.scale}
    made_by = maker(checkpoint.get("digest"), **options)
    targets: dict[Path, Path] = {}
    if processes.first:  # what is done is left out before the rest is shared
        data = find_data(args.data, checkpoint, args.ckpt)
        targets = plan(data, args.out)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.resume:
            found = len(targets)
            targets, reasons = unfinished(targets, made_by, args.objects)
            print(f"{found - len(targets)} of {found} videos have their masks already")
            for reason, count in reasons.items():
                print(f"masks of {count} videos are made again: {reason}")
    targets = dict(processes.share_out(list(targets.items())))
    workers = decoders(targets, args.workers, args.batch_size, processes)
    start, told = time.perf_counter(), []

    def tell(note: str) -> None:
        told.append(note)
        if processes.first:
            tqdm.write(note)

    how = not args.no_consistency, args.objects, scale, makers(made_by, targets), tell
    done, frames, faults = label_videos(model, targets, device, args.batch_size, workers, *how)
    totals = torch.tensor([done, frames, len(faults)], device=device)
    processes.add_up(totals)
    done, frames, skipped = totals.tolist()
    notes = dict.fromkeys(processes.collect(told))
    if processes.first:
        for note in list(notes)[len(told) :]:  # of sizes that only others met
            print(note)
        seconds = time.perf_counter() - start
        rate = f"{seconds:.1f} s ({frames / seconds:.1f} frames/s)"
        print(f"{done} videos, {frames} frames in {rate} -> {args.out}")
        look = ["python", "preview.py", "--masks", args.out, "--data", data, "--out", "preview"]
        print(f"look at them: {shlex.join(map(str, look))}")
        if skipped:
            print(f"{skipped} videos skipped, see above", file=sys.stderr)
    return 1 if skipped else 0


def make_ready(model: UNet, device: torch.device, batch_size: int, compiled: bool) -> UNet:
    """Return the network on its device, fused and, if it can be, compiled."""
    model = for_labelling(model, device)
    if compiled:
        size = (batch_size, 3, *FRAME_SIZE)
        with threads_shared(device):  # for another number of threads it would be made anew
            compile_network(model, torch.zeros(size, dtype=torch.uint8, device=device))
    return model


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--ckpt", type=Path, required=True, help="weights: a file that train.py wrote")
    add("--out", type=Path, required=True, help="folder for the masks")
    add("--data", type=Path, help="folder of videos (default: what the weights were trained on)")
    add("--objects", action="store_true", help="also write the objects that were followed")
    add("--resume", action="store_true", help="keep the masks that --out holds, do the rest")
    add = parser.add_argument_group("labelling").add_argument
    add("--no-consistency", action="store_true", help="label each frame by itself")
    add(
        "--scale",
        type=factor,
        help="of the frames for the network, 0.5 for half as wide (default: as it learned)",
    )
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=at_least(1), default=22, help="frames at once (default: %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: CUDA if available)")
    add(
        "--workers",
        type=at_least(0),
        help="processes that decode frames (default: on a CPU 0, else up to 16)",
    )
    add("--compile", action="store_true", help="torch.compile: a minute more to start, then faster")
    args = parser.parse_args()
    if args.objects and args.no_consistency:
        parser.error("--objects are those that are followed: leave out --no-consistency")
    return args


if __name__ == "__main__":
    run_script(main)
