"""Batches: which frames a training process reads, and who reads them ahead."""

import math
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler

from dataset import CLEVRDataset
from devices import Processes, usable_cpus, why_alone
from utils import UserError

MAX_READERS = 4  # of a training process, by default: a step takes longer than reading for it
EPOCH_STEPS = 20  # at least: eight such epochs bring trained weights to the look of few videos


class ShardedBatches(Sampler[list[int]]):
    """Batches of frame numbers; each process gets its share of every batch.

    Args:
        frames: Number of frames.
        batch_size: Frames of one batch, over all processes.
        processes: Who takes part.
        shuffle: Another order in each epoch (`set_epoch`), and no incomplete last batch unless it
            is the only one; else in order, every frame exactly once, and a process that has no
            share of the last batch ends one batch earlier.
        seed: Of the order.
        passes: How often an epoch goes through all frames, each time in another order.
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
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose which epoch is next, and how many of its batches are left out."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return self.passes * self._batches_of_a_pass()

    def __iter__(self) -> Iterator[list[int]]:
        count, order = self._batches_of_a_pass(), list(range(self.frames))
        generator = torch.Generator().manual_seed((1_000_003 * self.seed + self.epoch) % 2**64)
        rank, processes = self.processes.rank, self.processes.count
        for number in range(self.passes):
            if self.shuffle:
                order = torch.randperm(self.frames, generator=generator).tolist()
            for k in range(max(0, self.skip - number * count), count):
                yield order[k * self.batch_size : (k + 1) * self.batch_size][rank::processes]

    def _batches_of_a_pass(self) -> int:
        whole, rest = divmod(self.frames, self.batch_size)
        return max(1, whole) if self.shuffle else whole + (self.processes.rank < rest)


def make_loaders(
    training: CLEVRDataset,
    validation: CLEVRDataset,
    batch_size: int,
    seed: int,
    workers: int | None,
    processes: Processes,
) -> tuple[DataLoader, DataLoader]:
    """Return this process's batches of shuffled training frames, and of all validation frames.

    Raises:
        UserError: too few frames for so many processes.
    """
    if min(batch_size, len(training)) < processes.count:
        raise UserError(
            f"{processes.count} processes share batches of {batch_size} out of "
            f"{len(training)} frames: start fewer, or give a larger --batch-size"
        )
    passes = math.ceil(EPOCH_STEPS / max(1, len(training) // batch_size))
    batches = ShardedBatches(len(training), batch_size, processes, True, seed, passes)
    if passes > 1:
        processes.say(
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


def choose_workers(requested: int | None, batch: int, processes: Processes) -> int:
    """Return how many processes read for this one: no more than shared memory has room for.

    Args:
        requested: How many the user wants; None: the default, no more than there are cores for.
        batch: Bytes of what is read ahead once, of all processes together.
        processes: Those that share this machine's cores and shared memory.
    """
    if requested is None:
        cores = usable_cpus() // processes.local_count - 1  # one feeds the device
        requested = 0 if processes.device.type == "cpu" else min(MAX_READERS, max(0, cores))
    if not requested:
        return 0
    if why := why_alone():
        processes.say(f"no workers, each process reads for itself ({why})")
        return 0
    shared = Path("/dev/shm")  # through which they hand on their batches; 64 MB in a container
    if not shared.is_dir():  # not Linux
        return requested
    free, ahead = shutil.disk_usage(shared).free, 2 * batch * processes.local_count
    fit = free * processes.count // ahead
    if fit < requested:
        processes.say(
            f"{shared} has {free / 2**20:.0f} MB free, enough for {fit} workers, not {requested}"
        )
    return min(requested, fit)


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
