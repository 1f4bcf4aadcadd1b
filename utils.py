"""What every script needs: errors, devices, processes, where a log came from."""

import argparse
import contextlib
import copy
import ctypes
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from errors import GIVE_LESS, no_memory, refused

VERSION = "0.9.0"  # also in CITATION.cff and CHANGELOG.md
PATIENCE = timedelta(hours=2)  # for processes that wait for each other, as while one saves


class UserError(ValueError):
    """One sentence for the user: it names the file or the option and says what to do."""


class Stopped(Exception):  # noqa: N818 - not an error: all is saved
    """The script was told to stop by a signal and has done so; the text says how to go on."""

    def __init__(self, text: str, signal_number: int):
        super().__init__(text)
        self.status = 128 + signal_number


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its status, of which the README lists all.

    `UserError` and `OSError` become one sentence on stderr and exit status 2; Ctrl-C exits with
    130, a reader that has gone (`| head`) with 141, `Stopped` with its own; of several processes
    those that another has left alone exit with 1. Anything else is a bug and keeps its traceback.
    """
    keep_freed_memory()
    if hasattr(sys.stdout, "reconfigure"):  # not where a program catches what is printed
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        status = main() or 0
        sys.stdout.flush()  # here, where a broken pipe can still be caught
        _leave_group()
        sys.exit(status)
    except Stopped as stop:
        print(stop, file=sys.stderr, end="\n" if str(stop) else "", flush=True)
        _leave_group()
        sys.exit(stop.status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        sys.exit(141)
    except (UserError, OSError) as error:
        text = str(error) if isinstance(error, UserError) else refused(error)
        print(f"error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if reason := no_memory(error):
            print(f"error: memory ran out ({reason}): {GIVE_LESS}", file=sys.stderr)
            sys.exit(2)
        if not _left_alone(error):
            raise
        print(
            "error: another process of this run has ended, and what it said tells why; "
            "what was saved is whole: go on with --resume",
            file=sys.stderr,
        )
        sys.exit(1)


def _left_alone(error: RuntimeError) -> bool:
    """Return whether an error is that of a connection to a process that has gone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _leave_group() -> None:
    """Take leave of the other processes; one that fails must not wait for them to do the same."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that knows --version and whose --help begins with a script's docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"clevr-unet {VERSION}",
        help="print the version of the project and exit",
    )
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number that is not below `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"give a whole number, at least {least}, not {text!r}")
        return int(text)

    return read


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors (glibc; elsewhere a no-op).

    By default it returns every large block to the system and asks for it again at once, and the
    page faults of that take as long as half of a small network (mallopt(3)).
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 32 * 2**20)  # the most that it takes
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def follow_launcher() -> None:
    """Get SIGTERM when torchrun is gone, even by kill -9 (Linux; elsewhere a no-op).

    It starts processes in sessions of their own, which would go on beside the run that resumes.
    """
    pr_set_pdeathsig = 1  # prctl(2)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(pr_set_pdeathsig, signal.SIGTERM)


def usable_cpus() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def why_alone() -> str:
    """Return why this process can have no others beside it that share its memory; "": it can."""
    try:
        [multiprocessing.get_context().Lock() for _ in range(8)]  # as many as a pool takes
    except OSError as error:  # as in containers without /dev/shm, or where it is read-only
        return f"/dev/shm: {error.strerror}"
    return ""


def seed_everything(seed: int, deterministic: bool = True) -> None:
    """Seed Python, NumPy and torch, and ask for deterministic kernels, or for the fastest."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries below us may use the global generator
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


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
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return a context of bfloat16 arithmetic where the hardware has it, else of float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def same_kernels(network: torch.nn.Module, device: torch.device) -> None:
    """Let a batch's size and the number of threads not choose the kernels of a network on a CPU.

    What is computed in float32 would else be rounded otherwise: PyTorch takes its own kernel, not
    oneDNN's, for a 1x1 convolution of fewer than 16 frames by one thread, and for any of a small
    frame that comes alone (ConvParams::use_mkldnn in ATen's Convolution.cpp). The former it does
    not do where there is dilation, which means nothing to a single weight. The latter is avoided
    by whoever calls the network.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1):
            layer.dilation = (2, 2)


def compile_network(model: torch.nn.Module, frames: torch.Tensor) -> None:
    """Compile a network in place; where that fails, say why in a line and leave it as it is.

    Args:
        model: A UNet. If it is in training, its backward is compiled as well.
        frames: A batch as it will come; other sizes are compiled when they come.
    """
    trial = copy.deepcopy(model)  # its batch statistics change
    trial.stages = torch.compile(trial.stages)
    try:
        with mixed_precision(frames.device), torch.inference_mode(not model.training):
            stages = trial.stages(frames)
        if model.training:
            sum(part.float().mean() for stage in stages for part in stage).backward()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no Triton, a bug in one of them
        reason = next(iter(str(error).split("\n")), "").strip()[:160] or type(error).__name__
        print(f"--compile is left out, the network stays as it is: {reason}", file=sys.stderr)
    else:
        model.stages = torch.compile(model.stages)


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


def log_header(device: torch.device) -> str:
    """Say where a log came from: command, versions, commit and device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return (
        f"command: python {' '.join(sys.argv)}\n"
        f"clevr-unet {VERSION}, commit {_commit() or 'none'}, "
        f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}\n"
        f"device: {device} ({name}), {torch.get_num_threads()} threads"
    )


def _commit() -> str | None:
    """Return the git commit of this code, None where git or the repository is missing."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, check=False)
    except OSError:  # no git, as in slim containers
        return None
    return done.stdout.strip() or None
