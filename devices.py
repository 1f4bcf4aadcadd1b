"""The machine: its devices and their precision, its cores, and the other processes of a run."""

import contextlib
import copy
import ctypes
import math
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from utils import UserError

PATIENCE = timedelta(hours=2)  # for processes that wait for each other, as while one saves
TIME_TO_END = 1.0  # seconds that a process has
MAX_THREADS = 16  # of this process that read, label or draw videos
GPU_THREADS = 4  # one launches while another waits for its labels or for the disk


def choose_device(name: str | None = None) -> torch.device:
    """Return the device called `name`, or a GPU if there is one, else the CPU; use it from now on.

    Of several processes that torchrun has started, each gets the GPU of its own number.

    Raises:
        UserError: no such device on this machine.
    """
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found and found.type != "mps" else "cpu"  # Apple's only if asked for
    try:
        device = _numbered(torch.device(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); "
            "give cpu, cuda or leave it out"
        ) from None
    return device


def _numbered(device: torch.device) -> torch.device:
    """Make a GPU the current one, before anything touches the first; return it with its number."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or device.type != found.type:  # the CPU, or none that this machine has
        return device
    number = device.index or 0
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
        if number >= count:
            raise UserError(
                f"process {number + 1} of this machine has no GPU, there are {count}: "
                f"give torchrun --nproc-per-node={count}, or --device cpu"
            )
    torch.accelerator.set_device_index(number)
    return torch.device(device.type, number)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return getattr(getattr(torch, device.type, None), "is_bf16_supported", lambda: False)()
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return a context of bfloat16 arithmetic where the hardware has it, else of float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def compile_network(model: torch.nn.Module, frames: torch.Tensor) -> None:
    """Compile a network in place; where that fails, say why in a line and leave it as it is.

    Args:
        model: A UNet. If it is in training, its backward is compiled as well.
        frames: A batch as it will come; other sizes are compiled when they come.
    """
    trial = copy.deepcopy(model)  # its batch statistics change
    trial.answers = torch.compile(trial.answers)
    try:
        with mixed_precision(frames.device), torch.inference_mode(not model.training):
            answers = trial.answers(frames)
        if model.training:
            sum(part.float().mean() for answer in answers for part in answer).backward()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no Triton, a bug in one of them
        reason = next(iter(str(error).split("\n")), "").strip()[:160] or type(error).__name__
        print(f"--compile is left out, the network stays as it is: {reason}", file=sys.stderr)
    else:
        model.answers = torch.compile(model.answers)


def free_memory(device: torch.device) -> int:
    """Return how many bytes of a device's memory are free, at most; 0 where nobody says so.

    Of a CPU they are those of the machine, or all that the container may have if those are fewer.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return 0
    free = 0
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, TypeError):  # Linux
        text = Path("/proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1])
    limits = [*container_limits("memory.max"), *container_limits("memory.limit_in_bytes")]
    return min([free, *(int(limit) for limit in limits if limit.isdecimal())])


def usable_cpus() -> int:
    """Return how many processors this process may use."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cpus = len(os.sched_getaffinity(0))
    limits = [limit.split() for limit in container_limits("cpu.max")]
    former = (container_limits(f"cpu.cfs_{what}_us") for what in ("quota", "period"))
    for quota, period in (*limits, *zip(*former, strict=True)):
        if quota.isdecimal():  # microseconds of each period; else "max" or -1
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    return cpus


def usable_threads() -> int:
    """Return how many threads of operations torch would take, but no more than processors."""
    return min(torch.get_num_threads(), usable_cpus())


def container_limits(name: str) -> list[str]:
    """Return what a file of the control groups that this process is in says, from the inmost out.

    Empty where there are none, as outside Linux (cgroups(7)).
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for kinds, path in (line.split(":", 2)[1:] for line in lines):
        root = Path("/sys/fs/cgroup")
        if kinds:  # of version 1, a tree for each kind of resource
            if name.partition(".")[0] not in kinds.split(","):
                continue
            root /= name.partition(".")[0]
        inmost = root / path.lstrip("/")
        for folder in (inmost, *inmost.parents):
            with contextlib.suppress(OSError):
                found.append((folder / name).read_text().strip())
            if folder == root:
                break
    return found


def worker_threads(device: torch.device, threads: int) -> tuple[int, int]:
    """Return how many threads label videos of their own, and how many each computes with.

    On a CPU each core has its own, which loses less than sharing one, and there is one more, so
    that no core is idle while a mask is flushed to the disk.
    """
    if device.type == "cpu":
        share = math.ceil(threads / MAX_THREADS)
        return threads // share + 1, share
    return (1 if device.type == "mps" else GPU_THREADS), 1  # Apple's bears one thread


@contextlib.contextmanager
def shared_threads(device: torch.device) -> Iterator[int]:
    """Share out this process's threads among its worker threads; yields how many they are."""
    threads = torch.get_num_threads()
    workers, share = worker_threads(device, usable_threads())
    torch.set_num_threads(share)  # of this thread and of those to come
    try:
        yield workers
    finally:
        torch.set_num_threads(threads)


def to_cpu(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of one device on the CPU; this thread waits, while others launch."""
    device = tensors[0].device
    found = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if device.type != "cpu":
        arrived = torch.Event(device)
        arrived.record()
        arrived.synchronize()
    return found


def in_threads(
    job: Callable[[Any], Any],
    items: Iterable[Any],
    threads: int | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Any]:
    """Yield job(item) for each item, in order; `threads` run at once, and few items wait.

    By default as many as there are cores, at most MAX_THREADS: decoding frees the GIL. Where it
    ends early, as by Ctrl-C, what waits is not begun, and `stop` is set for what has.
    """
    threads = threads or min(MAX_THREADS, usable_cpus())
    pool, ahead = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            ahead.append(pool.submit(job, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BaseException:
        if stop:
            stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def why_alone() -> str:
    """Return why other processes cannot share memory with this one here; "" where they can."""
    try:
        [get_context().Lock() for _ in range(8)]  # as many as a pool takes
    except OSError as error:  # as in containers without /dev/shm, or where it is read-only
        return f"/dev/shm: {error.strerror}"
    return ""


def start_process(
    job: Callable[..., None], *args: Any, daemon: bool
) -> tuple[BaseProcess, Connection]:
    """Start job(*args, its_end) in a process; return it, and this end of a pipe between the two.

    A process first imports what this one has. Large arguments, for which this one would wait until
    then, are better sent through the pipe when all have been started.
    """
    context = get_context("spawn")
    own_end, its_end = context.Pipe()
    process = context.Process(target=job, args=(*args, its_end), daemon=daemon)
    process.start()
    its_end.close()
    return process, own_end


def end_processes(processes: list[BaseProcess]) -> None:
    """End processes at once.

    A Ctrl-C meanwhile is ignored; where this is itself because of one, later ones are, too.
    """
    if not processes:
        return
    stopped = isinstance(sys.exc_info()[1], KeyboardInterrupt)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(TIME_TO_END)
        if process.exitcode is None:
            process.kill()
            process.join()
    if main and not stopped:
        signal.signal(signal.SIGINT, before)


def follow_parent() -> None:
    """End this worker when its parent is gone, even by kill -9; leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Hold back a Ctrl-C until the end of the block; processes that start in it never get one."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # first, since its start lets Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Processes:
    """This process among those that torchrun started; alone if it did not.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.
        local_count: How many of them are on this machine.
        device: Where it computes, as of `choose_device`.
    """

    def __init__(self, device: torch.device):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.local_count = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        self.device = device
        if "TORCHELASTIC_RUN_ID" in os.environ:
            follow_launcher()
        if self.count > 1:
            backend, bound = "gloo", None
            if device.type != "cpu":  # gloo beside it, for what the host has to know
                own = torch.distributed.get_default_backend_for_device(device)
                backend, bound = f"cpu:gloo,{device.type}:{own}", device
            torch.distributed.init_process_group(backend, timeout=PATIENCE, device_id=bound)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a text, once for all processes."""
        if self.first:
            print(text, flush=True)

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by its sum over all processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)

    def gather(self, number: int) -> list[int]:
        """Return the number of every process, by rank, to every process."""
        numbers = torch.zeros(self.count, dtype=torch.int64)  # on the CPU: no GPU is waited for
        numbers[self.rank] = number
        self.add_up(numbers)
        return numbers.tolist()

    def share_out(self, items: list[Any]) -> list[Any]:
        """Return this process's share of the first process's items; they are pickled."""
        shared = [items]
        if self.count > 1:
            torch.distributed.broadcast_object_list(shared, src=0, device=self.device)
        return shared[0][self.rank :: self.count]

    def collect(self, items: list[Any]) -> list[Any]:
        """Return the items of all processes, by rank, to every process; they are pickled."""
        found = [items] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(found, items)
        return [item for part in found for item in part]

    def copy_first(self, module: torch.nn.Module) -> None:
        """Give the first process's weights and buffers to all."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()


def follow_launcher() -> None:
    """Get SIGTERM when torchrun is gone, even by kill -9 (Linux; elsewhere a no-op).

    It starts processes in sessions of their own, which would go on beside the run that resumes.
    """
    pr_set_pdeathsig = 1  # prctl(2)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(pr_set_pdeathsig, signal.SIGTERM)
