"""Thousands of videos, from their files to the files of their masks: the engine of infer.py.

`label_videos` reads short videos a batch at a time and long ones frame by frame, lets a Labeller
label them in worker threads, and writes what is found.
"""

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from batches import choose_workers, worker_start
from classes import FRAME_SIZE
from dataset import CLEVRDataset
from decode import read_frame
from devices import Processes, in_threads, shared_threads
from labelling import Labeller
from objects import Objects
from outputs import Outputs
from utils import UserError
from videos import Frame, Video, read_frames

MAX_WORKERS = 16  # processes that decode for a GPU, at about 1,000 frames/s each


class WholeVideo(NamedTuple):
    """A video with all of its frames, or with the sentence that says why it has none."""

    video: Video
    state: list[list[str | int] | None]  # of its files, before they were read
    frames: Tensor  # uint8 (T, 3, H, W)
    fault: str = ""


class WholeVideos(Dataset):
    """The videos of a CLEVRDataset, each as a WholeVideo."""

    def __init__(self, dataset: CLEVRDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.videos)

    def __getitem__(self, v: int) -> WholeVideo:
        video = self.dataset.videos[v]
        state = video.state()
        try:
            return WholeVideo(video, state, self.dataset.video(v))
        except UserError as error:
            return WholeVideo(video, state, torch.empty(0), str(error))


class Done(NamedTuple):
    """What one piece of work came to."""

    videos: int
    frames: int
    faults: list[str]  # why other videos have no mask
    messages: list[str]  # what was done to frames, for people to read


def label_videos(
    labeller: Labeller, dataset: CLEVRDataset, outputs: Outputs, workers: int = 0
) -> Iterator[Done]:
    """Label all videos of a data set and write what is found, a few videos at a time.

    Args:
        labeller: How.
        dataset: The videos; their labels, if they have any, are not looked at.
        outputs: Where their files go.
        workers: Processes that decode short videos ahead; long ones and clips are decoded by the
            worker threads. On a CPU 0 are best: its worker threads, of which each labels videos
            of its own, decode for themselves.

    Yields:
        What was done, as it is. A video that cannot be read is left out and named there. Until the
        generator is closed the process has fewer threads for each operation.
    """
    device, videos = labeller.device, WholeVideos(dataset)

    def label(read: list[WholeVideo]) -> Done:
        whole, messages, frames, count = [v for v in read if not v.fault], [], [], 0
        faults = [video.fault for video in read if video.fault]
        for _, alike in groupby(whole, key=lambda video: video.frames.shape[2:]):
            group = list(alike)
            numbers = [video.video.numbers for video in group]
            try:
                found = labeller.label([video.frames for video in group], numbers)
            except UserError as error:
                faults += [f"{video.video}: {error}" for video in group]
                continue
            for video, objects in zip(group, found, strict=True):
                outputs.save(video.video, objects, video.state)
                messages += remarks(video.video, objects)
            frames.append(sum(len(video.frames) for video in group))
            count += len(group)
        return Done(count, sum(frames), faults, messages)

    def read_and_label(numbers: list[int]) -> Done:
        return label([videos[v] for v in numbers if not outputs.is_done(dataset.videos[v])])

    def label_read(read: list[WholeVideo]) -> Done:
        return label([video for video in read if not outputs.is_done(video.video)])

    def label_long(video: Video) -> Done:
        if outputs.is_done(video):
            return Done(0, 0, [], [])
        state = video.state()

        def frames() -> Iterator[Frame]:
            for frame in read_frames(video):
                if stop.is_set():
                    raise UserError("stopped")
                yield frame

        try:
            objects = labeller.label_ahead(frames, pool, threads)
        except UserError as error:
            named = str(error).startswith(str(video))
            return Done(0, 0, [str(error) if named else f"{video}: {error}"], [])
        outputs.save(video, objects, state)
        return Done(1, len(objects.labels), [], remarks(video, objects))

    # Short videos fill a batch together; a long one, or a clip, comes alone and in batches.
    lengths, stop = [len(video.names) for video in dataset.videos], threading.Event()
    short = [v for v, length in enumerate(lengths) if 0 < length <= labeller.batch_size]
    long = [dataset.videos[v] for v in sorted(set(range(len(lengths))) - set(short))]
    groups = fill_batches([lengths[v] for v in short], labeller.batch_size)
    batches = [[short[i] for i in group] for group in groups]
    with shared_threads(device) as threads, ThreadPoolExecutor(threads) as pool:
        if workers or device.type != "cpu":
            loader = DataLoader(
                videos,
                batch_sampler=batches,
                num_workers=workers,
                multiprocessing_context=worker_start(workers),
                collate_fn=list,
                pin_memory=device.type not in ("cpu", "mps"),
            )
            yield from in_threads(label_read, loader, threads)
        else:
            yield from in_threads(read_and_label, batches, threads)
        yield from in_threads(label_long, long, threads, stop)


def remarks(video: Video, objects: Objects) -> list[str]:
    """Return what is to be said of a video: of its frames' form once for all videos of it."""
    return [f"{video}: {text}" if text.startswith("its ") else text for text in objects.remarks]


def fill_batches(lengths: Iterable[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of consecutive videos that together have at most `batch_size` frames.

    A longer video comes alone. No batch holds half a video.
    """
    group, frames = [], 0
    for v, length in enumerate(lengths):
        if group and frames + length > batch_size:
            yield group
            group, frames = [], 0
        group.append(v)
        frames += length
    if group:
        yield group


def choose_decoders(
    dataset: CLEVRDataset, requested: int | None, batch_size: int, processes: Processes
) -> int:
    """Return how many processes decode ahead: `requested`, or what the machine has room for.

    Each reads batches of `batch_size` frames ahead, as large as the first frame of the data set.
    """
    frame = 3 * math.prod(FRAME_SIZE)  # bytes
    with contextlib.suppress(UserError, StopIteration):
        first = next(video for video in dataset.videos if video.names)
        frame = read_frame(first.frames[0]).numel()
    ahead = batch_size * frame * processes.count
    return choose_workers(requested, ahead, processes, MAX_WORKERS)
