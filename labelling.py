"""Whole videos in, objects out: the engine of infer.py, and of whoever labels from Python.

    labeller = Labeller(UNet.load("weights/clevr_unet.pt"))
    (objects,) = labeller.label([frames])  # uint8 (T, 3, H, W), all frames of a video
    objects.labels                         # uint8 (T, H, W), ids 0..48

`Labeller.label` sees, follows and enlarges: the network looks at all frames, objects are followed
through the video, and frames of another scale get masks in their own size. `label_videos` does
that for thousands of videos, in worker threads, and writes what is found.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from batches import choose_workers, worker_start
from classes import FRAME_SIZE
from dataset import CLEVRDataset
from devices import Processes, compile_network, in_threads, mixed_precision, shared_threads
from model import UNet, for_labelling
from objects import Objects, by_frame, follow
from outputs import Outputs
from scale import AS_THEY_ARE, Scale, fill, outline, resize
from tracks import gather, occupied
from utils import UserError
from videos import Video, read_frame

BATCH_SIZE = 22  # frames at once: those of a video of the usual length
MAX_AT_ONCE = 2**24  # pixels that the network sees together: some 2 GB, and more is no faster
MAX_WORKERS = 16  # processes that decode for a GPU, at about 1,000 frames/s each


class Seen(NamedTuple):
    """What the network sees in N frames, on the CPU; cells are 2 x 2 pixels of what it looks at."""

    objects: Tensor  # (N, h, w) bool, where there is an object
    evidence: Tensor  # (n, 13) of each cell that holds one, in order: logits of its attributes
    outlines: Tensor | None = None  # (N, H, W) bool, objects in the frames' own size if it differs


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
        scale: Scale = AS_THEY_ARE,
    ):
        self.device, self.batch_size, self.scale = torch.device(device), batch_size, scale
        self.model = for_labelling(model, self.device)
        self.find = follow if tracking else by_frame

    def compile(self) -> None:
        """Compile the network for batches of the usual frames, if that can be done here."""
        size = (self.batch_size, 3, *FRAME_SIZE)
        with shared_threads(self.device):  # for another number of threads it would be made anew
            compile_network(self.model, torch.zeros(size, dtype=torch.uint8, device=self.device))

    @torch.inference_mode()
    def label(self, videos: Sequence[Tensor]) -> list[Objects]:
        """Return the objects of videos, each uint8 (T, 3, H, W), that have frames of one size.

        A video has the same labels whichever others come with it.
        """
        frames, lengths = torch.cat(list(videos)), [len(video) for video in videos]
        seen = [self.see(batch) for batch in self._batches(frames)]
        objects = torch.cat([part.objects for part in seen]).split(lengths)
        cells = [int(occupied(part).sum()) for part in objects]
        evidence = torch.cat([part.evidence for part in seen]).split(cells)
        found = [self.find(*both) for both in zip(objects, evidence, strict=True)]
        if seen[0].outlines is None:  # labels have the frames' own size
            return found
        outlines = torch.cat([part.outlines for part in seen]).split(lengths)
        labels = map(fill, [video.labels for video in found], objects, outlines)
        return [video._replace(labels=own) for video, own in zip(found, labels, strict=True)]

    def _batches(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Split frames into as few batches as can be, all about as large."""
        size = tuple(frames.shape[2:])
        looks = self.scale.looks(*size)
        most = max(1, MAX_AT_ONCE // math.prod(looks.fine or looks.coarse))
        return frames.tensor_split(math.ceil(len(frames) / min(self.batch_size, most)))

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
        return Seen(objects, gather(objects, attributes), *outlines)


class WholeVideo(NamedTuple):
    """A video with all of its frames, or with the sentence that says why it has none."""

    video: Video
    state: list  # of its files, before they were read
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
        workers: Processes that decode ahead. On a CPU 0 are best: its worker threads, of which
            each labels videos of its own, decode for themselves.

    Yields:
        What was done, as it is. A video that cannot be read is left out and named there.
    """
    device, videos = labeller.device, WholeVideos(dataset)

    def label(read: list[WholeVideo]) -> Done:
        whole = [video for video in read if not video.fault]
        messages = []
        for size, alike in groupby(whole, key=lambda video: video.frames.shape[2:]):
            group = list(alike)
            if message := labeller.scale.describe(*size):
                messages.append(message)
            found = labeller.label([video.frames for video in group])
            for video, objects in zip(group, found, strict=True):
                outputs.save(video.video, objects, video.state)
        frames = sum(len(video.frames) for video in whole)
        return Done(len(whole), frames, [v.fault for v in read if v.fault], messages)

    def read_and_label(numbers: list[int]) -> Done:
        return label([videos[v] for v in numbers])

    lengths = [len(video.names) for video in dataset.videos]
    batches = list(fill_batches(lengths, labeller.batch_size))
    with shared_threads(device) as threads:
        if not workers and device.type == "cpu":
            yield from in_threads(read_and_label, batches, threads)
            return
        loader = DataLoader(
            videos,
            batch_sampler=batches,
            num_workers=workers,
            multiprocessing_context=worker_start(workers),
            collate_fn=list,
            pin_memory=device.type not in ("cpu", "mps"),
        )
        yield from in_threads(label, loader, threads)


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
    with contextlib.suppress(UserError):
        v, t = dataset.index[0]
        frame = read_frame(dataset.videos[v].frames[t]).numel()
    ahead = batch_size * frame * processes.count
    return choose_workers(requested, ahead, processes, MAX_WORKERS)
