"""Files: written whole or not at all; what killed writers leave; what tells one from another."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

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
        delete_leftovers(path.parent, path.name)
        with _open_temporary(path) as (temporary, file):
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
    """Let an OSError name `path` where it names no file, or the temporary one."""
    try:
        yield
    except OSError as error:
        if error.filename and not str(error.filename).endswith(".tmp"):
            raise  # of something else
        number = error.errno or errno.ENOSPC  # NumPy says in words that it wrote less than asked
        raise OSError(number, os.strerror(number), str(path)) from error


@contextlib.contextmanager
def _open_temporary(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Open a new, locked file beside `path`, which no other process deletes as a leftover.

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


def delete_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what killed runs of `atomic_write` have left in a folder, but not what is written now.

    Args:
        folder: Which need not be there.
        name: Of the file that they wrote; None: of all files.
    """
    if fcntl is None:  # whether a writer lives is not known
        return
    leftover_of = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for leftover in [e.path for e in entries if leftover_of.fullmatch(e.name)]:
            with contextlib.suppress(OSError):  # its writer lives, or it is somebody else's
                lock = os.open(leftover, os.O_RDWR)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    Path(leftover).unlink(missing_ok=True)
                finally:
                    os.close(lock)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let no other process into this block with the same folder, which must be there.

    What a process holds the system gives free when it ends, however it ends. A file system that has
    no locks lets all in.

    Raises:
        OSError: another one is there.
    """
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            words = "another run writes into it, wait for its end or give another folder"
            raise OSError(error.errno, words, str(folder)) from None
        except OSError:
            pass  # no locks
        yield
    finally:
        os.close(lock)


def write_json(
    path: str | Path, value: Any, indent: int | None = None, compact: bool = False
) -> None:
    """Write a value as JSON, by `atomic_write`. Raises ValueError for what JSON has no word for."""
    separators = (",", ":") if compact else None
    text = json.dumps(value, indent=indent, separators=separators, allow_nan=False)
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())


def digest(data: bytes) -> str:
    """Return 32 hexadecimal digits that tell data apart."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_state(path: Path, ctime: bool = False) -> list[str | int] | None:
    """Return a file's name, size in bytes and time in nanoseconds, which a new content changes.

    With `ctime` also the time that only the system sets: a copy has another one. Of a link to
    nothing it is the link's state; None where there is no file.
    """
    try:
        stat = path.stat()
    except OSError:
        try:
            stat = path.lstat()
        except OSError:
            return None
    return [path.name, stat.st_size, stat.st_mtime_ns, *[stat.st_ctime_ns] * ctime]
