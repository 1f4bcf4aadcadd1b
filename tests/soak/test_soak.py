"""Kills at random moments; then the same command again, as the README says, to the same bits.

Part of the soak: `pytest -m soak`. SOAK_SEED=N repeats the moments of an earlier one, as far as the
machine repeats its speed.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT, torchrun
from soak import SEED, Task, differences, tasks

pytestmark = pytest.mark.soak
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
KINDS = {  # of kills: the command, processes, and how many trials
    "train": ("train", 1, 21),
    "train-2": ("train", 2, 6),
    "infer": ("infer", 1, 12),
    "infer-2": ("infer", 2, 4),
    "infer-workers": ("label", 1, 8),
    "render": ("render", 1, 12),
    "preview": ("preview", 1, 12),
}


class Whole(NamedTuple):
    """A run that was never touched: its folder, and seconds to its first and its last words.

    Python then takes another second to end.
    """

    folder: Path
    begin: float
    end: float


def start(task: Task, folder: Path, processes: int, *more: str) -> subprocess.Popen:
    """Start a command in a session of its own; what it says goes to files beside `folder`."""
    launcher = torchrun(processes) if processes > 1 else ()
    command = [
        sys.executable,
        *launcher,
        ROOT / f"{task.script}.py",
        *task.arguments(folder),
        *more,
    ]
    folder.mkdir(exist_ok=True)
    with said(folder, "out").open("w") as out, said(folder, "err").open("w") as err:
        return subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            stdout=out,
            stderr=err,
        )


def said(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}.{what}")


def has_begun(folder: Path) -> bool:
    """Return whether a command has said its first words or made its folder, its imports done."""
    return bool(said(folder, "out").stat().st_size) or (folder / "out").exists()


def family(process: int) -> list[int]:
    """Return a process and all that descend from it, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # gone meanwhile
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def send(number: int, processes: list[int]) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def wait_for_the_end(processes: list[int], seconds: float = 20) -> list[int]:
    """Return those that are still there, as more than zombies, after so many seconds."""

    def alive(process: int) -> bool:
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + seconds
    while (left := [p for p in processes if alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@pytest.fixture(scope="module")
def untouched(shared):
    """Return a function that runs a kind of command, once, without a kill."""
    done: dict[str, Whole] = {}

    def whole(kind: str) -> Whole:
        if kind not in done:
            name, processes, _ = KINDS[kind]
            folder, start_time = shared / f"whole-{kind}", time.monotonic()
            process = start(tasks(shared)[name], folder, processes)
            begin, end, words = None, 0.0, 0
            while process.poll() is None:
                now = time.monotonic() - start_time
                if begin is None and has_begun(folder):
                    begin = now
                if words < (words := said(folder, "out").stat().st_size):
                    end = now
                time.sleep(0.01)
            assert process.returncode == 0, said(folder, "err").read_text()
            done[kind] = Whole(folder, begin, end)
        return done[kind]

    return whole


def kill(
    process: subprocess.Popen, number: int, whom: str, rng: random.Random
) -> tuple[list[int], bool]:
    """Send a signal to one, several or all; return who was there, and whether it was in time."""
    there = family(process.pid)
    in_time = process.poll() is None
    chosen = {
        "first": there[:1],
        "group": [p for p in there if _group(p) == process.pid],
        "child": [rng.choice(there[1:] or there)],
        "all": there[::-1],
    }[whom]
    if in_time:
        send(number, chosen)
    return there, in_time


def _group(process: int) -> int:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return 0


def faults(
    status: int, number: int, in_time: bool, whom: str, processes: int, text: str
) -> list[str]:
    """Return what is wrong with how a command ended after a signal."""
    others = processes > 1 or whom == "child"  # then the launcher, or a parent, says how it ends
    expected = set() if others else {0, -number, 128 + number}
    wrong = []
    if in_time and expected and status not in expected:
        wrong.append(f"exit status {status}")
    for trace in re.split(r"(?=Traceback \(most recent call last\))", text)[1:]:
        # Python's own, of a Ctrl-C while it imports, is not this project's to leave out.
        importing = number == signal.SIGINT and "in run_script" not in trace
        if f'File "{ROOT}' in trace and not importing:
            wrong.append(trace[-3000:])
    return wrong


TRIALS = [
    pytest.param(kind, trial, id=f"{kind}-{trial}-seed{SEED}")
    for kind, (_, _, count) in KINDS.items()
    for trial in range(count)
]


@pytest.mark.parametrize(("kind", "trial"), TRIALS)
def test_kills_at_random_moments_cost_nothing(
    kind, trial, shared, untouched, tmp_path, record_property
):
    rng = random.Random(f"{SEED} {kind} {trial}")
    name, processes, _ = KINDS[kind]
    task, whole, wrong, kills, orphans = tasks(shared)[name], untouched(kind), [], [], []
    folder, hits = tmp_path / "killed", 0
    for attempt in range(rng.choice((1, 1, 1, 2))):
        number = SIGNALS[(trial + attempt) % 3]
        whom = rng.choice(
            ("first", "child", "all")
            if processes > 1
            else ("first", "group", "child")
            if name == "render"
            else ("first",)
        )
        early = rng.random() < 0.1
        latest = whole.begin if early else 1.05 * (whole.end - whole.begin)
        moment = rng.uniform(0.002, max(0.002, latest))
        in_time, more = False, task.go_on if attempt else ()
        while not in_time and moment > 0.001:
            process = start(task, folder, processes, *more)
            while not early and not has_begun(folder) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moment)
            there, in_time = kill(process, number, whom, rng)
            if not in_time:  # the machine has become faster: from the beginning, and sooner
                shutil.rmtree(folder)
                moment, more = 0.8 * moment, ()
        hits += in_time
        status = process.wait(120)
        when = f"{moment:.2f} s after {'the start' if early else 'its first words'}"
        kills.append(f"{signal.Signals(number).name} to {whom} {when}: {status}")
        text = said(folder, "err").read_text()
        found = faults(status, number, in_time, whom, processes, text)
        wrong += [f"{kills[-1]}: {fault}" for fault in found]
        orphans += there
    if left := wait_for_the_end(orphans):
        wrong.append(f"{len(left)} processes outlive the kill by 20 s")
        send(signal.SIGKILL, left)
    process = start(task, folder, processes, *task.go_on)
    if process.wait(120):
        wrong.append(
            f"then exit status {process.returncode}: {said(folder, 'err').read_text()[-3000:]}"
        )
    wrong += differences(folder, whole.folder)
    record_property("kills", hits)
    print(f"kills of {kind}: {'; '.join(kills)}")
    assert not wrong, "\n".join([f"SOAK_SEED={SEED}", *kills, *wrong])
    shutil.rmtree(folder)


@pytest.mark.parametrize("same", [True, False])
def test_two_runs_of_infer_into_one_folder_corrupt_nothing(same, shared, untouched, tmp_path):
    mine = tasks(shared)["infer"]
    other = mine
    if not same:
        plain = [
            argument for argument in mine.arguments(tmp_path / "out") if argument != "--objects"
        ]
        other = Task("infer", lambda _: (*plain[:-1], tmp_path / "out" / "out", "--no-consistency"))
    runs = [start(task, tmp_path / n, 1) for task, n in ((mine, "out"), (other, "out"))]
    for process in runs:
        assert process.wait(120) == 0, said(tmp_path / "out", "err").read_text()
    masks = list((tmp_path / "out").rglob("mask.npy"))
    assert [np.load(mask).shape for mask in masks] == [(3, 160, 240)] * 3
    final = start(mine, tmp_path / "out", 1, "--resume")
    assert final.wait(120) == 0, said(tmp_path / "out", "err").read_text()
    assert not differences(tmp_path / "out", untouched("infer").folder)
