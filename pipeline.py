"""Thousands of videos, from their files to the files of their masks: the engine of infer.py.

`label_videos` reads short videos a batch at a time and long ones frame by frame, lets a Labeller
label them, and writes what is found. Threads of this process do so. Python lets only one thread of
a process run at a time, so that many videos are labelled by several processes.
"""

import contextlib
import copy
import pickle
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
from torch import Tensor

from dataset import CLEVRDataset
from devices import (
    Processes,
    choose_device,
    end_processes,
    follow_parent,
    free_memory,
    in_threads,
    shared_threads,
    start_process,
    usable_cpus,
    usable_threads,
    without_ctrl_c,
)
from labelling import Labeller
from objects import Objects
from outputs import Outputs
from utils import UserError, keep_freed_memory
from videos import Frame, Video, read_frames

MAX_WORKERS = 32  # processes that label
MANY_FRAMES = 10_000  # of fewer, processes take as long to start as they save
CLIP_FRAMES = 128  # of a video file, as CLEVRER's: to count them would be to open them all
OWN_MEMORY = 2 * 2**30  # bytes of the machine's memory and of a GPU's that each process may need
KILLED = (
    "a process that labels was killed, perhaps for lack of memory: what is done is kept; go on "
    "with infer.py --resume, fewer --workers or a smaller --batch-size"
)


class WholeVideo(NamedTuple):
    """A video with all of its frames."""

    video: Video
    state: list[list[str | int] | None]  # of its files, before they were read
    frames: Tensor  # uint8 (T, 3, H, W)


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
        workers: Processes that label, as of `choose_labellers`; with 0 threads of this one do. They
            import the script that calls this, which must do so below `if __name__ == "__main__"`,
            and label with the network as it was before it was compiled.

    Yields:
        What was done, as it is. A video that cannot be read is left out and named there. While
        threads label, the process has fewer of them for each operation.

    Raises:
        UserError: a process has ended. What else failed in one is raised as it is.
    """
    # Short videos fill a batch together; a long one, or a clip, comes alone and in batches.
    work, numbers = Work(labeller, dataset, outputs), range(len(dataset.videos))
    short = [v for v in numbers if work.is_short(v)]
    long = [v for v in numbers if not work.is_short(v)]
    groups = fill_batches([len(dataset.videos[v].names) for v in short], labeller.batch_size)
    batches = [[short[i] for i in group] for group in groups]
    if workers:
        yield from in_processes(work, [*([v] for v in long), *batches], workers)
        return
    with shared_threads(labeller.device) as threads:
        yield from in_threads(work.label_short, batches, threads)
        with ThreadPoolExecutor(threads) as pool:
            stop = threading.Event()
            label = partial(work.label_long, pool=pool, ahead=threads, stop=stop)
            yield from in_threads(label, long, threads, stop)


def in_processes(work: "Work", groups: list[list[int]], workers: int) -> Iterator[Done]:
    """Label groups of videos in processes, each of which gets a next one when it has done one.

    There is nothing between the processes but a pipe: they can be ended at any moment, since a mask
    is whole or not there. Arguments and errors as of `label_videos`.
    """
    twin = copy.copy(work.labeller)
    twin.model = copy.deepcopy(twin.model).cpu()  # from where any process can take it
    twin.model.__dict__.pop("answers", None)  # compiled, as none can take it
    packed = pickle.dumps(work._replace(labeller=twin))
    workers = min(workers, len(groups))
    threads = max(1, usable_threads() // workers)
    todo = iter(groups)
    processes: dict[Connection, BaseProcess] = {}
    try:
        with without_ctrl_c():  # which they never get: this process ends them
            for _ in range(workers):
                process, pipe = start_process(label_groups, threads, daemon=True)
                processes[pipe] = process
        for pipe, process in processes.items():
            with told_if_ended(process):
                pipe.send_bytes(packed)
                pipe.send(next(todo))
        at_work = set(processes)
        while at_work:
            for pipe in wait(list(at_work)):
                group = next(todo, None)
                with told_if_ended(processes[pipe]):
                    told = pipe.recv()
                    pipe.send(group)
                if group is None:
                    at_work.remove(pipe)
                if isinstance(told, Exception):
                    raise told
                yield told
    finally:
        end_processes(list(processes.values()))


@contextlib.contextmanager
def told_if_ended(process: BaseProcess) -> Iterator[None]:
    """Raise UserError if the block finds nobody at the other end of its pipe."""
    try:
        yield
    except (EOFError, ConnectionError):
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise UserError(KILLED) from None
        raise UserError(
            f"a process that labels has ended with status {process.exitcode}, see above: what is "
            "done is kept; go on with infer.py --resume"
        ) from None


def label_groups(threads: int, pipe: Connection) -> None:
    """Label groups of videos in a process of its own, whose operations have so many threads.

    Args:
        threads: How many.
        pipe: Gives a pickled Work, then numbers of videos, None after the last; takes what was done
            with each group, or what has failed.
    """
    follow_parent()
    keep_freed_memory()
    torch.set_num_threads(threads)
    packed = pipe.recv_bytes()
    work: Work | None = None
    while group := pipe.recv():
        try:
            work = work or take_over(packed)
            done = work.label_short(group) if work.is_short(group[0]) else work.label_long(*group)
        except Exception as error:
            done = portable(error)
        pipe.send(done)


def take_over(packed: bytes) -> "Work":
    """Return the pickled work of another process, on the device of its labeller."""
    work: Work = pickle.loads(packed)
    try:
        device = choose_device(str(work.labeller.device))
    except UserError as error:
        raise UserError(f"{error}, or --workers 0 if it admits one process only") from None
    work.labeller.model.to(device)
    return work


def portable(error: Exception) -> Exception:
    """Return an error that another process can raise, with the traceback of this one."""
    text = traceback.format_exc()
    error.add_note(text)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    return error


class Work(NamedTuple):
    """What threads and processes do with videos: label those that have no mask yet, and save it."""

    labeller: Labeller
    dataset: CLEVRDataset
    outputs: Outputs

    def is_short(self, v: int) -> bool:
        """Return whether all frames of a video fit into a batch."""
        return 0 < len(self.dataset.videos[v].names) <= self.labeller.batch_size

    def label_short(self, numbers: Sequence[int]) -> Done:
        """Label the short videos of these numbers, those of one frame size together."""
        whole, faults, messages, frames = [], [], [], 0
        for v in numbers:
            video = self.dataset.videos[v]
            if self.outputs.is_done(video):
                continue
            state = video.state()
            try:
                whole.append(WholeVideo(video, state, self.dataset.video(v)))
            except UserError as error:
                faults.append(self.fault(video, str(error)))
        count = 0
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

    def label_long(
        self,
        v: int,
        pool: Executor | None = None,
        ahead: int = 0,
        stop: threading.Event | None = None,
    ) -> Done:
        """Label a long video or a clip as it is read, as of `label_ahead`, until `stop`."""
        video = self.dataset.videos[v]
        if self.outputs.is_done(video):
            return Done(0, 0, [], [])
        state = video.state()

        def frames() -> Iterator[Frame]:
            for frame in read_frames(video):
                if stop and stop.is_set():
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


def choose_labellers(requested: int | None, videos: Sequence[Video], processes: Processes) -> int:
    """Return how many processes label for this one; 0: its own threads do.

    From MANY_FRAMES on that is one for each core, MAX_WORKERS at most, if there is memory for each
    on the machine and on the GPU, and four videos. Threads label fewer frames; they do so on
    Apple's GPUs, too, and where nothing says how much memory there is.

    Args:
        requested: How many the user wants; None: as above.
        videos: What they label. A clip counts as one of CLEVRER's.
        processes: Those of the run, who share this machine.
    """
    if requested is not None:
        return requested
    frames = sum(len(video.names) or CLIP_FRAMES for video in videos)
    if frames < MANY_FRAMES:
        return 0
    shared = usable_cpus(), free_memory(torch.device("cpu")) / OWN_MEMORY
    each = (resource / processes.local_count for resource in shared)
    room = free_memory(processes.device) / OWN_MEMORY
    count = int(min(MAX_WORKERS, len(videos) / 4, room, *each))
    return count if count > 1 else 0
