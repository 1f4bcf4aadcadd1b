"""Thousands of videos, from their files to the files of their masks: the engine of infer.py.

`label_videos` reads short videos a batch at a time and long ones frame by frame, lets a Labeller
label them in worker threads, and writes what is found.
"""

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
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
    # Short videos fill a batch together; a long one, or a clip, comes alone and in batches.
    device, videos = labeller.device, WholeVideos(dataset)
    lengths = [len(video.names) for video in dataset.videos]
    short = [v for v, length in enumerate(lengths) if 0 < length <= labeller.batch_size]
    long = [dataset.videos[v] for v in sorted(set(range(len(lengths))) - set(short))]
    groups = fill_batches([lengths[v] for v in short], labeller.batch_size)
    batches = [[short[i] for i in group] for group in groups]
    work = Work(labeller, outputs)
    with shared_threads(device) as threads:
        if workers or device.type != "cpu":
            loader = DataLoader(
                videos,
                batch_sampler=batches,
                num_workers=workers,
                multiprocessing_context=worker_start(workers),
                collate_fn=list,
                pin_memory=device.type not in ("cpu", "mps"),
            )
            yield from in_threads(work.label_read, loader, threads)
        else:
            yield from in_threads(partial(work.read_and_label, videos), batches, threads)
        with ThreadPoolExecutor(threads) as pool:
            stop = threading.Event()
            label = partial(work.label_long, pool=pool, ahead=threads, stop=stop)
            yield from in_threads(label, long, threads, stop)


class Work(NamedTuple):
    """What the worker threads do with videos: label those that have no mask yet, and save it."""

    labeller: Labeller
    outputs: Outputs

    def read_and_label(self, videos: WholeVideos, numbers: Sequence[int]) -> Done:
        """Label the short videos of these numbers."""
        pending = [v for v in numbers if not self.outputs.is_done(videos.dataset.videos[v])]
        return self.label([videos[v] for v in pending])

    def label_read(self, read: Sequence[WholeVideo]) -> Done:
        """Label short videos that other processes have read."""
        return self.label([video for video in read if not self.outputs.is_done(video.video)])

    def label(self, read: Sequence[WholeVideo]) -> Done:
        """Label short videos, those of one frame size together."""
        whole, messages, frames, count = [v for v in read if not v.fault], [], 0, 0
        faults = [self.fault(video.video, video.fault) for video in read if video.fault]
        for _, alike in groupby(whole, key=lambda video: video.frames.shape[2:]):
            group = list(alike)
            numbers = [video.video.numbers for video in group]
            try:
                found = self.labeller.label([video.frames for video in group], numbers)
            except UserError as error:
                faults += [self.fault(video.video, str(error)) for video in group]
                continue
            for video, objects in zip(group, found, strict=True):
                self.outputs.save(video.video, objects, video.state)
                messages += remarks(video.video, objects)
            frames += sum(len(video.frames) for video in group)
            count += len(group)
        return Done(count, frames, faults, messages)

    def label_long(self, video: Video, pool: Executor, ahead: int, stop: threading.Event) -> Done:
        """Label a long video or a clip as it is read, `ahead` batches at a time, until `stop`."""
        if self.outputs.is_done(video):
            return Done(0, 0, [], [])
        state = video.state()

        def frames() -> Iterator[Frame]:
            for frame in read_frames(video):
                if stop.is_set():
                    raise UserError("stopped")
                yield frame

        try:
            objects = self.labeller.label_ahead(frames, pool, ahead)
        except UserError as error:
            return Done(0, 0, [self.fault(video, str(error))], [])
        self.outputs.save(video, objects, state)
        return Done(1, len(objects.labels), [], remarks(video, objects))

    def fault(self, video: Video, text: str) -> str:
        """Return why a video has no mask, with its name, and whether an old mask stays there."""
        text = text if text.startswith(str(video)) else f"{video}: {text}"
        if not self.outputs.has_files(video):
            return text
        return f"{text} What a former run wrote in {self.outputs.folder(video)} stays there."


def remarks(video: Video, objects: Objects) -> list[str]:
    """Return what was done to the frames of a video, for people to read.

    What is done to all frames of a size has no name in it, so that it is said once.
    """
    if not objects.stills:
        return list(objects.remarks)
    stills = f"{video}: its frames are pictures of different scenes, each is labelled alone"
    return [*objects.remarks, stills]


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
