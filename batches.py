"""Batches: which frames or whole videos come together, who takes them, and who reads them ahead."""

import contextlib
import math
import multiprocessing
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset import CLEVRDataset, split_videos
from utils import Processes, UserError, usable_cpus, why_alone

MAX_READERS = 4  # of a training process, by default: a step takes longer than reading for it
MAX_LANES = 16  # threads that label videos of their own
GPU_LANES = 4  # one launches while another waits for its labels or for the disk
EPOCH_STEPS = 20  # at least: eight such epochs bring trained weights to the look of a few videos


class ShardedBatches(Sampler[list[int]]):
    """Batches of frame numbers; each process gets its share of every batch.

    Args:
        frames: Number of frames.
        batch_size: Frames of one batch, over all processes.
        processes: Who takes part.
        shuffle: Another order in each `epoch` (set it), and no incomplete last batch unless it is
            the only one; else in order, every frame exactly once, and a process that has no share
            of the last batch ends one batch earlier.
        seed: Of the order.
        passes: How often an epoch goes through all frames, each time in another order.

    Attributes:
        epoch: Which one is next.
        done: How many of its batches to leave out, since a run that was stopped has had them.
    """

    def __init__(
        self,
        frames: int,
        batch_size: int,
        processes: Processes,
        shuffle: bool,
        seed: int = 0,
        passes: int = 1,
    ):
        self.frames, self.batch_size, self.processes = frames, batch_size, processes
        self.shuffle, self.seed, self.passes = shuffle, seed, passes
        self.epoch, self.done = 0, 0

    def __len__(self) -> int:
        return self.passes * self._batches_of_a_pass()

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._whole():
            yield batch[self.processes.rank :: self.processes.count]

    def batch(self, number: int) -> list[int]:
        """Return the frames of a batch of this epoch, those of all processes."""
        return next(islice(self._whole(0), number, None), [])

    def _whole(self, done: int | None = None) -> Iterator[list[int]]:
        done = self.done if done is None else done
        count, order = self._batches_of_a_pass(), list(range(self.frames))
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        for number in range(self.passes):
            if self.shuffle:
                order = torch.randperm(self.frames, generator=generator).tolist()
            for k in range(max(0, done - number * count), count):
                yield order[k * self.batch_size : (k + 1) * self.batch_size]

    def _batches_of_a_pass(self) -> int:
        whole, rest = divmod(self.frames, self.batch_size)
        return max(1, whole) if self.shuffle else whole + (self.processes.rank < rest)


def load_data(
    path: Path, batch_size: int, seed: int, cache: bool, workers: int | None, processes: Processes
) -> tuple[DataLoader, DataLoader]:
    """Return the batches of this process, for training and for validation.

    Raises:
        UserError: too few videos, or too few frames for so many processes.
    """
    training, validation = (
        CLEVRDataset(videos, cache=cache) for videos in split_videos(path, seed)
    )
    if min(batch_size, len(training)) < processes.count:
        raise UserError(
            f"{processes.count} processes share batches of {batch_size} out of "
            f"{len(training)} frames: start fewer, or give a larger --batch-size"
        )
    if processes.first:
        print(
            f"{len(training)} training frames of {len(training.videos)} videos, "
            f"{len(validation)} validation frames of {len(validation.videos)} videos"
        )
    passes = math.ceil(EPOCH_STEPS / max(1, len(training) // batch_size))
    batches = ShardedBatches(len(training), batch_size, processes, True, seed, passes)
    if processes.first and passes > 1:
        print(
            f"an epoch takes {passes} passes over these few frames, {len(batches)} steps, "
            "so that a run has enough of them"
        )
    val_batches = ShardedBatches(len(validation), 2 * batch_size, processes, False)
    frame = sum(part.numel() for part in training[0])  # bytes
    workers = choose_workers(workers, 3 * batch_size * frame, processes)  # of both loaders
    loading = {
        "num_workers": workers,
        "multiprocessing_context": worker_start(workers),
        "pin_memory": processes.device.type not in ("cpu", "mps"),
        "persistent_workers": workers > 0,
        "worker_init_fn": leave_signals,
    }
    return (
        DataLoader(training, batch_sampler=batches, **loading),
        DataLoader(validation, batch_sampler=val_batches, **loading),
    )


def videos_of(loader: DataLoader, numbers: Iterable[int]) -> list[str]:
    """Return the videos whose frames are in batches of this epoch, of these numbers."""
    dataset, batches = loader.dataset, loader.batch_sampler
    frames = {i for number in numbers if number >= 0 for i in batches.batch(number)}
    return [str(dataset.videos[v]) for v in sorted({int(dataset.index[i][0]) for i in frames})]


class WholeVideos(Dataset):
    """The videos of a CLEVRDataset, each whole or with the sentence that says why it is not.

    An item is the number of a video, its frames uint8 (T, 3, H, W), and what is wrong with it.
    """

    def __init__(self, dataset: CLEVRDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.videos)

    def __getitem__(self, v: int) -> tuple[int, Tensor, str]:
        try:
            return v, self.dataset.video(v), ""
        except UserError as error:
            return v, torch.empty(0), str(error)

    def read(self, numbers: Iterable[int]) -> list[tuple[int, Tensor, str]]:
        """Return the videos of these numbers."""
        return [self[v] for v in numbers]

    def loader(self, batches: list[list[int]], workers: int, pin: bool) -> DataLoader:
        """Return a DataLoader whose `workers` processes read the videos of each batch ahead."""
        return DataLoader(
            self,
            batch_sampler=batches,
            num_workers=workers,
            multiprocessing_context=worker_start(workers),
            collate_fn=list,
            pin_memory=pin,
        )


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


def evenly(frames: Tensor, most: int) -> tuple[Tensor, ...]:
    """Split frames (N, ...) into as few batches of at most `most` as can be, all about as large."""
    return frames.tensor_split(math.ceil(len(frames) / most))


def in_lanes(job: Callable[[Any], Any], items: Iterable[Any], lanes: int) -> Iterator[Any]:
    """Yield job(item) for each item, in order; `lanes` run at once, and few wait their turn."""
    with ThreadPoolExecutor(lanes) as pool:
        ahead: deque[Future] = deque()
        for item in items:
            ahead.append(pool.submit(job, item))
            if len(ahead) > 2 * lanes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def lanes_for(device: torch.device, threads: int) -> tuple[int, int]:
    """Return how many videos are labelled at once, and with how many threads each.

    On a CPU each core has its own, which loses less than sharing one, and there is one more, so
    that no core is idle while a mask is flushed to the disk.
    """
    if device.type == "cpu":
        share = math.ceil(threads / MAX_LANES)
        return threads // share + 1, share
    return (1 if device.type == "mps" else GPU_LANES), 1  # Apple's bears one thread


@contextlib.contextmanager
def threads_shared(device: torch.device) -> Iterator[int]:
    """Give each of the lanes its share of this process's threads; yields how many they are."""
    threads = torch.get_num_threads()
    lanes, share = lanes_for(device, threads)
    torch.set_num_threads(share)  # of this thread and of those to come
    try:
        yield lanes
    finally:
        torch.set_num_threads(threads)


def choose_workers(
    asked: int | None, batch: int, processes: Processes, most: int = MAX_READERS
) -> int:
    """Return how many processes read for this one: no more than there are cores and memory for.

    Args:
        asked: How many the user wants; None: the default.
        batch: Bytes of what is read ahead once, of all processes together.
        processes: Those that share this machine's cores and shared memory.
        most: The default has no more.
    """
    if asked is None:
        cores = usable_cpus() // processes.local_count - 1  # one feeds the device
        asked = 0 if processes.device.type == "cpu" else min(most, max(0, cores))
    if not asked:
        return 0
    if why := why_alone():
        if processes.first:
            print(f"no workers, each process reads for itself ({why})")
        return 0
    shared = Path("/dev/shm")  # through which they hand on their batches; 64 MB in a container
    if not shared.is_dir():  # not Linux
        return asked
    free, ahead = shutil.disk_usage(shared).free, 2 * batch * processes.local_count
    fit = free * processes.count // ahead
    if fit < asked and processes.first:
        print(f"{shared} has {free / 2**20:.0f} MB free, enough for {fit} workers, not {asked}")
    return min(asked, fit)


def leave_signals(worker: int) -> None:
    """Let a Ctrl-C, which reaches workers as well, be the training process's alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def worker_start(workers: int) -> str | None:
    """Return how a DataLoader starts its workers: not by a fork, which can deadlock with threads.

    Python 3.12 and later warn of that. None, the loader's own choice, where there are no workers.
    """
    methods = multiprocessing.get_all_start_methods()
    return ("forkserver" if "forkserver" in methods else "spawn") if workers else None
