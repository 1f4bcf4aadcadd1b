"""Files that appear whole or not at all, and what killed writers of them leave."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears at `path` whole or not at all.

    Written beside its final place, flushed to disk, then renamed over it. If the block raises,
    `path` keeps what it held before. What killed writers of `path` have left is deleted first.

    Raises:
        OSError: with `path` as its filename, and why it cannot be written.
    """
    path = Path(path)
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        delete_scraps(path.parent, path.name)
        with _open_scrap(path) as (temporary, file):
            try:
                with file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    with contextlib.suppress(OSError):  # not every file system lets a folder be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Let an OSError name `path` where it names no file, or the scrap that was written instead."""
    try:
        yield
    except OSError as error:
        if error.filename and not str(error.filename).endswith(".tmp"):
            raise  # of something else
        number = error.errno or errno.ENOSPC  # NumPy says in words that it wrote less than asked
        raise OSError(number, os.strerror(number), str(path)) from error


@contextlib.contextmanager
def _open_scrap(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Open a new file beside `path`; it is locked, so that no other process takes it for a scrap.

    The lock outlives the file object: the file can be closed, then renamed, and is safe meanwhile.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        file = temporary.open("xb")
        if fcntl is None:
            yield temporary, file
            return
        lock = os.dup(file.fileno())
        try:
            with contextlib.suppress(OSError):  # a file system without locks: nobody deletes then
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:
                yield temporary, file
                return
            file.close()  # another process deleted it before it was locked
        finally:
            os.close(lock)


def delete_scraps(folder: Path, name: str | None = None) -> None:
    """Delete what killed runs of `atomic_write` have left in a folder, but not what is written now.

    Args:
        folder: Which need not be there.
        name: Of the file that they wrote; None: of all files.
    """
    if fcntl is None:  # whether a writer lives is not known
        return
    begin = "." if name is None else f".{name}."
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for scrap in [e.path for e in entries if e.name.startswith(begin)]:
            if not scrap.endswith(".tmp"):
                continue
            with contextlib.suppress(OSError):  # its writer lives, or it is somebody else's
                lock = os.open(scrap, os.O_RDWR)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    Path(scrap).unlink(missing_ok=True)
                finally:
                    os.close(lock)
