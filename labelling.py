"""Whole videos in, objects out: the engine of infer.py, and of whoever labels from Python.

    labeller = Labeller.load("weights/clevr_unet.pt")
    (objects,) = labeller.label([frames])  # uint8 (T, 3, H, W), all frames of a video
    objects.labels                         # uint8 (T, H, W), ids 0..48

`Labeller.label` sees, follows and enlarges: the network looks at all frames, objects are followed
through the video, and frames of another scale get masks in their own size. `label_videos` does
that for thousands of videos, in worker threads, and writes what is found.
"""

import contextlib
import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from batches import choose_workers, worker_start
from checkpoints import load_checkpoint
from classes import FRAME_SIZE
from dataset import CLEVRDataset
from decode import read_frame
from devices import Processes, compile_network, in_threads, mixed_precision, shared_threads
from model import UNet, for_labelling
from objects import Objects, by_frame, follow
from outputs import Outputs
from scale import USUAL_SCALE, Scale, fill, learned_size, outline, pack, resize
from tracks import gather, occupied
from utils import UserError
from videos import Frame, Video, read_frames

BATCH_SIZE = 22  # frames at once: those of a video of the usual length
MAX_AT_ONCE = 2**24  # pixels that the network sees together: some 2 GB, and more is no faster
MAX_ON_CPU = 2**20  # such pixels on a CPU, whose caches hold no more
MAX_WORKERS = 16  # processes that decode for a GPU, at about 1,000 frames/s each


class Seen(NamedTuple):
    """What the network sees in N frames, on the CPU; cells are 2 x 2 pixels of what it looks at."""

    size: tuple[int, ...]  # the frames' own H and W
    objects: Tensor  # (N, h, w) bool, where there is an object
    evidence: Tensor  # (n, 13) logits of attributes of the cells that hold one, in order
    outlines: Tensor | None = None  # packed: objects in the frames' own size, if that differs


class Labeller:
    """A network, and how it labels.

    Args:
        model: Is changed: fused, cast and moved to the device.
        device: Where it runs.
        batch_size: Frames at once.
        tracking: Whether objects are followed through the video; else each frame is labelled by
            itself.
        scale: At which the network sees frames; labels have the frames' own size.
    """

    def __init__(
        self,
        model: UNet,
        device: torch.device | str = "cpu",
        batch_size: int = BATCH_SIZE,
        tracking: bool = True,
        scale: Scale = USUAL_SCALE,
    ):
        self.device, self.batch_size, self.scale = torch.device(device), batch_size, scale
        self.model = for_labelling(model, self.device)
        self.tracking, self.find = tracking, follow if tracking else by_frame

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> "Labeller":
        """Return a labeller with the network of a checkpoint, at the scale that it learned."""
        checkpoint = load_checkpoint(path)
        scale = Scale(learned_size(checkpoint, path))
        return cls(UNet.from_checkpoint(checkpoint, path), **{"scale": scale, **options})

    def compile(self) -> None:
        """Compile the network for batches of the usual frames, if that can be done here."""
        size = (self.batch_size, 3, *FRAME_SIZE)
        with shared_threads(self.device):  # for another number of threads it would be made anew
            compile_network(self.model, torch.zeros(size, dtype=torch.uint8, device=self.device))

    def label(
        self, videos: Sequence[Tensor], numbers: Sequence[Sequence[int]] | None = None
    ) -> list[Objects]:
        """Return the objects of videos, each uint8 (T, 3, H, W), that have frames of one size.

        A video has the same labels whichever others come with it. `numbers` are those of the
        frames of each, from 0 by default.
        """
        frames = torch.cat(list(videos))
        parts = math.ceil(len(frames) / self.at_once(frames.shape[2:]))
        seen = [self.see(batch) for batch in frames.tensor_split(parts)]  # all about as large
        return self.find_objects(seen, numbers or [range(len(video)) for video in videos])

    def label_ahead(self, frames: Iterable[Frame], pool: Executor, ahead: int) -> Objects:
        """Return the objects of one video, however long, whose frames are never held together.

        Args:
            frames: Those of the video, read one after the other.
            pool: Threads that let the network look at `ahead` batches of them at once.
            ahead: See there.
        """
        seen: list[Seen] = []
        waiting: deque[Future] = deque()
        numbers, seconds, batch = [], [], []

        def look() -> None:
            waiting.append(pool.submit(self.see, torch.stack(batch)))
            batch.clear()
            if len(waiting) > ahead:
                seen.append(waiting.popleft().result())

        for frame in frames:
            numbers.append(frame.number)
            seconds.append(frame.seconds)
            batch.append(frame.pixels)
            if len(batch) == self.at_once(frame.pixels.shape[1:]):
                look()
        if batch:
            look()
        seen += [future.result() for future in waiting]
        return self.find_objects(seen, [numbers])[0]._replace(seconds=seconds)

    def at_once(self, size: Sequence[int]) -> int:
        """Return how many frames of a height and width the network looks at together."""
        looks = self.scale.looks(*size)
        pixels = max(math.prod(size), math.prod(looks.fine or looks.coarse))
        most = MAX_ON_CPU if self.device.type == "cpu" else MAX_AT_ONCE
        return min(self.batch_size, max(1, most // pixels))

    @torch.inference_mode()
    def find_objects(self, seen: list[Seen], numbers: Sequence[Sequence[int]]) -> list[Objects]:
        """Return the objects of videos whose frames, of these numbers, were seen in this order."""
        lengths = [len(video) for video in numbers]
        size = seen[0].size
        objects = torch.cat([part.objects for part in seen]).split(lengths)
        cells = [int(occupied(part).sum()) for part in objects]
        evidence = torch.cat([part.evidence for part in seen]).split(cells)
        found = [self.find(*video) for video in zip(objects, evidence, numbers, strict=True)]
        if seen[0].outlines is not None:  # labels are brought to the frames' own size
            outlines = torch.cat([part.outlines for part in seen]).split(lengths)
            seen.clear()
            for v, (inside, edges) in enumerate(zip(objects, outlines, strict=True)):
                found[v] = found[v]._replace(labels=fill(found[v].labels, inside, edges, size))
        return [video._replace(numbers=list(of)) for video, of in zip(found, numbers, strict=True)]

    @torch.inference_mode()
    def see(self, frames: Tensor) -> Seen:
        """Let the network look at frames (N, 3, H, W), uint8."""
        size = tuple(frames.shape[2:])
        looks = self.scale.looks(*size)
        frames = frames.to(self.device, non_blocking=True)  # bytes
        with mixed_precision(self.device):
            answers = self.model.answers(resize(frames, looks.coarse))
            found = [*self.model.evidence(answers)]
            if looks.coarse != size:
                fine = looks.fine and self.model.answers(resize(frames, looks.fine))[-1].objectness
                found.append(outline(answers[-1].objectness, fine, size))
        found = [part.to("cpu", non_blocking=True) for part in found]
        if self.device.type != "cpu":  # this thread waits, while others launch
            arrived = torch.Event(self.device)
            arrived.record()
            arrived.synchronize()
        objects, attributes, *outlines = found
        outlines = [pack(part) for part in outlines]
        evidence = gather(objects, attributes)
        return Seen(size, objects, evidence.half() if self.tracking else evidence, *outlines)


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
        for size, alike in groupby(whole, key=lambda video: video.frames.shape[2:]):
            group = list(alike)
            try:
                messages.append(labeller.scale.describe(*size))
            except UserError as error:
                faults += [f"{video.video}: {error}" for video in group]
                continue
            numbers = [video.video.numbers for video in group]
            found = labeller.label([video.frames for video in group], numbers)
            for video, objects in zip(group, found, strict=True):
                outputs.save(video.video, objects, video.state)
            frames.append(sum(len(video.frames) for video in group))
            count += len(group)
        return Done(count, sum(frames), faults, list(filter(None, messages)))

    def read_and_label(numbers: list[int]) -> Done:
        return label([videos[v] for v in numbers if not outputs.is_done(dataset.videos[v])])

    def label_read(read: list[WholeVideo]) -> Done:
        return label([video for video in read if not outputs.is_done(video.video)])

    def label_long(video: Video) -> Done:
        if outputs.is_done(video):
            return Done(0, 0, [], [])
        state, messages = video.state(), []

        def frames() -> Iterator[Frame]:
            for frame in read_frames(video):
                if stop.is_set():
                    raise UserError("stopped")
                if not messages:
                    messages.append(labeller.scale.describe(*frame.pixels.shape[1:]))
                yield frame

        try:
            objects = labeller.label_ahead(frames(), pool, threads)
        except UserError as error:
            named = str(error).startswith(str(video))
            return Done(0, 0, [str(error) if named else f"{video}: {error}"], [])
        outputs.save(video, objects, state)
        return Done(1, len(objects.labels), [], list(filter(None, messages)))

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
