"""What both soaks share: tiny commands, and what they must leave in the end."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import ROOT, write_video
from crashes import Driver

from checkpoints import load_checkpoint
from render import render_video

SEED = os.environ.get("SOAK_SEED", "0")  # conftest.py chooses one
WEIGHTS = ROOT / "weights" / "clevr_unet.pt"


class Task(NamedTuple):
    """A command: its script, arguments for a folder of its own, and what is added to go on."""

    script: str
    arguments: Callable[[Path], tuple[object, ...]]
    go_on: tuple[str, ...] = ()


def write_data(folder: Path) -> None:
    """Write small labelled videos to learn from, and larger ones to label."""
    for name, count, frames, size in (("small", 3, 3, (48, 64)), ("large", 3, 3, (160, 240))):
        for k in range(count):
            height, width = size
            video = render_video([5, k], (3, 5), frames, height=height, width=width)
            write_video(folder / name / f"video_{k}", *video)


def tasks(shared: Path, epochs: int = 4, videos: int = 2) -> dict[str, Task]:
    """Return the commands; below `shared` lie data/ of `write_data`, and masks/ of its large."""
    data, masks = shared / "data", shared / "masks"
    train = ("--data", data / "small", "--num-epochs", epochs, "--widths", 4, 8, "--batch-size", 3)
    infer = ("--ckpt", WEIGHTS, "--data", data / "large", "--objects", "--batch-size", 3)
    rendering = ("--videos", videos, "--frames", 2, "--workers", 2)
    return {
        "train": Task(
            "train", lambda f: (*train, "--device", "cpu", "--out", f / "out"), ("--resume",)
        ),
        "infer": Task(
            "infer", lambda f: (*infer, "--device", "cpu", "--out", f / "out"), ("--resume",)
        ),
        "label": Task(
            "infer",
            lambda f: (*infer, "--device", "cpu", "--workers", 2, "--out", f / "out"),
            ("--resume",),
        ),
        "render": Task("render", lambda f: (*rendering, "--out", f / "out")),
        "preview": Task(
            "preview",
            lambda f: (
                *("--masks", masks, "--data", data / "large", "--out", f / "out"),
                *("--strip", f / "strip.png"),
            ),
        ),
        "evaluate": Task(
            "evaluate", lambda f: ("--pred", masks, "--data", data / "large", "--json", f / "s")
        ),
    }


def never_touched(driver: Driver, task: Task, folder: Path) -> Path:
    """Make a folder, run a command in it that nobody touches, and return it."""
    folder.mkdir()
    assert driver(folder, task.script, *task.arguments(folder)) == 0, driver.stderr
    return folder


def go_on(driver: Driver, task: Task, folder: Path, untouched: Path) -> list[str]:
    """Give the command again as the README says; return what is then wrong in its folder."""
    status = driver(folder, task.script, *task.arguments(folder), *task.go_on)
    wrong = [f"then exit status {status}: {driver.stderr[-500:]}"] if status else []
    return wrong + differences(folder, untouched)


def contents(folder: Path) -> dict[str, Any]:
    """Return all that a run has left, by path: folders, bytes, and log.csv but for the speed.

    TensorBoard's files are left out, and so is the command line that evaluate.py notes.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name] = "a folder"
        elif path.name == "log.csv":
            with path.open(newline="") as file:
                found[name] = [row | {"frames_per_s": ""} for row in csv.DictReader(file)]
        elif "tfevents" not in name:
            text = path.read_bytes()
            found[name] = text.replace(os.fsencode(folder), b"FOLDER")
    return found


def differences(found: Path, expected: Path) -> list[str]:
    """Return what is not the same in two folders that runs have left, down to the bit."""
    mine, yours = contents(found), contents(expected)
    result = [f"too much: {name}" for name in sorted(mine.keys() - yours.keys())]
    result += [f"missing: {name}" for name in sorted(yours.keys() - mine.keys())]
    for name in sorted(mine.keys() & yours.keys()):
        if mine[name] != yours[name]:
            result.append(f"other: {name}{_how(found / name, expected / name)}")
    return result


def _how(found: Path, expected: Path) -> str:
    """Return whether two checkpoints of other bytes hold other values."""
    if found.suffix != ".pt":
        return ""
    mine, yours = load_checkpoint(found), load_checkpoint(expected)
    return ", the same values" if _same(mine, yours) else ", other values"


def _same(mine: Any, yours: Any) -> bool:
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, yours)
    if isinstance(mine, dict):
        return mine.keys() == yours.keys() and all(_same(mine[key], yours[key]) for key in mine)
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(yours) and all(map(_same, mine, yours))
    return mine == yours
