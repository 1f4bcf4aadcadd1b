"""How a script begins and ends: its arguments, where its log came from, what errors become."""

import argparse
import contextlib
import ctypes
import errno
import os
import platform
import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

VERSION = "0.11.0"  # also in CITATION.cff and CHANGELOG.md
MAKE_ROOM = "make room, then the same command goes on (train.py and infer.py with --resume)"
GIVE_LESS = (
    "give a smaller --batch-size or fewer --workers, preview.py fewer videos; then the same "
    "command goes on (train.py and infer.py with --resume)"
)
GET_RIGHT = "get the right to it, or give another path"
MOVE_FILE = "move away the file that is where a folder has to be, or give another path"
NO_MEMORY = (  # RuntimeErrors of torch and Python that mean so
    "can't allocate memory",
    "could not create a",  # oneDNN's primitive or memory
    "std::bad_alloc",  # of oneDNN, too
    "can't start new thread",
    "DataLoader worker (pid",  # was killed, or found /dev/shm full
)
CURES = {  # of what the system refuses
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.ENOMEM: GIVE_LESS,
    errno.EFBIG: "the system lets no file be so large",
    errno.EACCES: GET_RIGHT,
    errno.EPERM: GET_RIGHT,
    errno.EROFS: "give a path that can be written",
    errno.ENOTDIR: MOVE_FILE,
    errno.EEXIST: MOVE_FILE,
    errno.EISDIR: "move the folder away, or give another path",
}


HINTS = {  # options of other projects, and what they are called here
    "--lr": "--learning-rate",
    "--epochs": "--num-epochs",
    "--bs": "--batch-size",
    "--checkpoint": "--ckpt",
    "--weights": "--ckpt",
    "--output": "--out",
    "--input": "--data",
}


class UserError(ValueError):
    """One sentence for the user: it names the file or the option and says what to do."""


class Stopped(Exception):  # noqa: N818 - not an error: all is saved
    """The script was told to stop by a signal and has done so; the text says how to go on."""

    def __init__(self, text: str, signal_number: int):
        super().__init__(text)
        self.status = 128 + signal_number


def resuming() -> str:
    """Return the arguments of this command with --resume, as a shell takes them."""
    kept = [argument for argument in sys.argv if argument not in ("--resume", "--overwrite")]
    return shlex.join([*kept, "--resume"])


def counted(number: int, noun: str) -> str:
    """Return "1 video" or "2 videos"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its status (README, "How it works").

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
        if text.startswith("Caught "):  # in a process that reads: torch puts its traceback before
            text = text.rstrip().splitlines()[-1].partition(": ")[2]
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


def refused(error: OSError) -> str:
    """Return a sentence that names the file, says why it was refused, and what to do."""
    if not (error.filename and error.strerror):
        return str(error)
    cure = CURES.get(error.errno, "")
    return f"{error.filename}: {error.strerror}{cure and ': '}{cure}"


def no_memory(error: Exception) -> str:
    """Return what was said where memory ran out; "" where an error is of anything else."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    is_one = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return text[:160] if is_one or any(words in text for words in NO_MEMORY) else ""


def _left_alone(error: RuntimeError) -> bool:
    """Return whether an error is that of a connection to a process that has gone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _leave_group() -> None:
    """Take leave of the other processes; one that fails must not wait for them to do the same."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Parser(argparse.ArgumentParser):
    """One that hints at the option of this project where one of others is given."""

    def error(self, message: str) -> NoReturn:
        """Print a sentence and exit with status 2."""
        for given in dict.fromkeys(argument.partition("=")[0] for argument in sys.argv[1:]):
            own = HINTS.get(given, given.replace("_", "-"))
            if own != given and own in self._option_string_actions:
                message += f" ({given} is {own} here)"
        super().error(message)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that knows --version and whose --help begins with a script's docstring."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def seed_everything(seed: int, deterministic: bool = True) -> None:
    """Seed Python, NumPy and torch, and ask for deterministic kernels, or for the fastest."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries below us may use the global generator
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Else fresh memory is filled with NaN, lest something is read that nothing has written.
    torch.utils.deterministic.fill_uninitialized_memory = False


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
