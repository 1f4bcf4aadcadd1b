"""Scripts that crash at a chosen point of their work on files, in forked children of a driver.

The driver (this file as a script) has imported torch and all scripts and run nothing; it reads a
job in JSON from each line of stdin, forks a child that runs the script's main, and answers with
the child's exit status and the points that it passed. A point is what comes just before a file is
opened to be written, flushed to disk, renamed or deleted, or a folder made or deleted. At the point
that the job names the child ends at once; with `power`, all that was written and never flushed to
the disk is halved first, as when the power fails.
"""

# Paths are text here, as audit hooks get them.
# ruff: noqa: PTH100, PTH110, PTH202

import json
import os
import resource
import subprocess
import sys
import threading
import traceback
from os.path import abspath, exists, getsize
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CRASHED = 77  # exit status
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


class Points:
    """Counts what happens to files below a folder, and crashes at one of them."""

    def __init__(self, folder: str, crash_at: int, power: bool):
        self.folder, self.crash_at, self.power = folder, crash_at, power
        self.passed: list[tuple[str, str, bool]] = []  # what, file, whether power would matter
        self.durable: dict[str, int] = {}  # bytes of each file that are on the disk
        self.lock = threading.RLock()
        self.fsync, os.fsync = os.fsync, self._fsync
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            path = abspath(os.fsdecode(path))
            if path.startswith(self.folder):
                with self.lock:
                    self._pass(event, path)
                    fresh = flags & (os.O_TRUNC | os.O_EXCL) or not exists(path)
                    self.durable.setdefault(path, 0 if fresh else getsize(path))
        elif event in CHANGES:
            path, folder = os.fsdecode(args[0]), args[-1]
            path = path if isinstance(folder, int) and folder >= 0 else abspath(path)
            if path.startswith(self.folder) or not path.startswith(os.sep):
                with self.lock:
                    self._pass(event, path)
                    if event == "os.rename":
                        self._renamed(path, abspath(os.fsdecode(args[1])))

    def _renamed(self, old: str, new: str) -> None:
        moved = {p: n for p, n in self.durable.items() if p == old or p.startswith(old + os.sep)}
        for path, size in moved.items():
            del self.durable[path]
            self.durable[new + path[len(old) :]] = size

    def _fsync(self, descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if path in self.durable:
            with self.lock:
                self._pass("fsync", path)
                self.durable[path] = getsize(path)
        self.fsync(descriptor)

    def _pass(self, what: str, path: str) -> None:
        at_risk = {
            file: (size + getsize(file)) // 2
            for file, size in self.durable.items()
            if exists(file) and getsize(file) > size and "tfevents" not in file
        }
        self.passed.append((what, path[len(self.folder) :], bool(at_risk)))
        if len(self.passed) == self.crash_at:
            self.folder = "\0"  # no more points
            for file, size in at_risk.items() if self.power else ():
                os.truncate(file, size)
            os._exit(CRASHED)


def allow_memory(more: int) -> None:
    """Let this process have so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def child(job: dict[str, Any]) -> None:
    """Run one job in a process of its own; never returns."""
    import devices
    import render
    import utils

    os.environ.update(job["environment"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{job['said']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # One thread, in this process, so that the points come in the same order each time.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    devices.worker_threads = lambda device, threads: (1, 1)
    render.why_alone = lambda: "to crash"
    sys.argv = [f"{job['script']}.py", *job["arguments"]]
    status = 70
    if job["memory"] is not None:
        allow_memory(job["memory"])
    points = Points(job["folder"], job["crash_at"], job["power"])
    try:
        utils.run_script(__import__(job["script"]).main)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    points.folder = "\0"
    Path(f"{job['said']}.points").write_text(json.dumps(points.passed))
    sys.stdout.flush()
    os._exit(status)


def main() -> None:
    """Answer one job a line."""
    # SciPy too, imported late: short of memory, its OpenBLAS would ask for more for ever.
    libraries = "scipy.optimize", "scipy.sparse.csgraph"
    for module in ("train", "infer", "render", "preview", "evaluate", *libraries):
        __import__(module)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            child(job)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Driver:
    """The driver, as tests see it."""

    def __init__(self, folder: Path):
        self.said = folder / "said"
        folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self,
        folder: Path,
        script: str,
        *arguments: object,
        crash_at: int = 0,
        power: bool = False,
        memory: int | None = None,
    ) -> int:
        """Return the exit status of a script whose files are below `folder`, its cache as well.

        It may have so many bytes of `memory` more than it has at its beginning.
        """
        job = {
            "folder": f"{folder}{os.sep}",
            "script": script,
            "arguments": [str(argument) for argument in arguments],
            "environment": {"XDG_CACHE_HOME": str(folder / "cache")},
            "said": str(self.said),
            "crash_at": crash_at,
            "power": power,
            "memory": memory,
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    @property
    def points(self) -> list[tuple[str, str, bool]]:
        """Those of the last run, which did not crash: what, file, whether power would matter."""
        return json.loads(Path(f"{self.said}.points").read_text())

    @property
    def stderr(self) -> str:
        """What the last run said there."""
        return Path(f"{self.said}.stderr").read_text()

    def close(self) -> None:
        """End the driver."""
        self.process.stdin.close()
        self.process.wait(60)


if __name__ == "__main__":
    main()
