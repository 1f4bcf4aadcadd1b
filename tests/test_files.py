"""Files that are whole or not there, and what killed writers leave."""

import subprocess
import sys

import pytest
from conftest import ROOT

import files
from files import atomic_write, delete_leftovers


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as file:
        file.write(b"whole")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("9 requested")])
def test_a_file_that_cannot_be_written_is_named_and_stays_as_it_was(tmp_path, error):
    """Of a disk that is full the system names no file, and NumPy not even the reason."""
    path = tmp_path / "file"
    path.write_bytes(b"whole")
    full = "No space left on device"
    with pytest.raises(OSError, match=full) as raised, atomic_write(path) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"whole"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError) as raised, atomic_write(path):
        raise FileNotFoundError(2, "No such file", "of something else")
    assert raised.value.filename == "of something else"


WRITER = """
import os, sys
from files import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"half of it")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""


def start_writer(path):
    """Start a process that writes a file and waits in the midst of it."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout.readline() == b"writing\n"
    return writer


def test_what_killed_writers_leave_goes_when_the_file_is_written_again(tmp_path):
    path = tmp_path / "mask.npy"
    killed = start_writer(path)
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".other.npy.0123456789abcdef.tmp").touch()
    with atomic_write(path) as file:
        file.write(b"whole")
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "mask.npy",
        ".other.npy.0123456789abcdef.tmp",
    }
    (tmp_path / ".of another program.tmp").touch()
    delete_leftovers(tmp_path)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"mask.npy", ".of another program.tmp"}


def test_what_is_being_written_is_no_leftover(tmp_path):
    path = tmp_path / "mask.npy"
    writer = start_writer(path)
    with atomic_write(path) as file:
        file.write(b"another")
    delete_leftovers(tmp_path)
    assert path.read_bytes() == b"another"
    writer.communicate(b"\n")
    assert writer.returncode == 0
    assert path.read_bytes() == b"half of it"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mask.npy"]


def test_a_file_that_is_swept_away_before_it_is_locked_is_begun_anew(tmp_path, monkeypatch):
    flock, swept = files.fcntl.flock, []

    def overtaken(lock, how):
        if not swept:
            swept.extend(tmp_path.iterdir())
            swept[0].unlink()
        flock(lock, how)

    monkeypatch.setattr(files.fcntl, "flock", overtaken)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"whole")
    assert swept
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("missing", ["locks", "module"])
def test_without_locks_nothing_is_taken_for_a_leftover(tmp_path, monkeypatch, missing):
    def refuse(lock, how):
        raise OSError(37, "No locks available")

    if missing == "module":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    (tmp_path / ".file.0123456789abcdef.tmp").touch()
    with atomic_write(tmp_path / "file") as file:
        file.write(b"whole")
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", ".file.0123456789abcdef.tmp"}
