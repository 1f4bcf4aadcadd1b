"""Settings and helpers for all tests."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from utils import run_script

# Scripts run by several tests or workers at once share two cores: threads that spin while they
# wait for each other would make that many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)  # this process has read the variable already
# Else each process that is forked from the server imports PyTorch anew, which takes seconds.
multiprocessing.set_forkserver_preload(["benchmark", "infer", "train"])

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("CLEVR_REAL") or "no-real-videos")  # real videos, some with masks
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="no real videos: the environment variable CLEVR_REAL names a folder"
)


def pytest_configure(config) -> None:
    """Choose the seed of a soak before the workers start, so that all have the same."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as behind `&`: scripts would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("SOAK_SEED", str(random.randrange(10**6)))
    if config.getoption("markexpr") == "soak" and config.getoption("dist", "no") != "no":
        config.option.dist = "load"  # its files are long
        config.option.tx = [*config.option.tx, "popen"]  # a third of its time it waits


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Say what a soak has done and how to repeat it."""
    if config.getoption("markexpr") != "soak":
        return
    counts = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                counts.update(dict(report.user_properties))
    done = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    terminalreporter.write_line(f"soak: {done}; SOAK_SEED={os.environ['SOAK_SEED']} repeats it")


def write_video(folder: Path, frames: torch.Tensor, masks: torch.Tensor | None = None) -> None:
    """Write frames uint8 (T, 3, H, W) and masks (T, H, W) as a video."""
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        pixels = np.ascontiguousarray(frame.permute(1, 2, 0).numpy())
        PIL.Image.fromarray(pixels).save(folder / f"image_{t}.png")
    if masks is not None:
        np.save(folder / "mask.npy", masks.numpy())


def make_video(folder: Path, frames=3, size=(6, 8), labelled=True, seed=0):
    """Write a small video of noise; return its folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for t in range(frames):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"image_{t}.png")
    if labelled:
        np.save(folder / "mask.npy", rng.integers(0, 49, (frames, *size), dtype=np.uint8))
    return folder


def run(
    script: str, *args: object, launcher: tuple = (), behind: tuple = (), **options
) -> subprocess.CompletedProcess:
    """Run a script of the project in a process of its own, as a user would.

    Python runs the `launcher`, which runs the script; `behind` are words before Python.
    """
    command = [*behind, sys.executable, *launcher, ROOT / script, *args]
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run([str(part) for part in command], check=False, **options)


def torchrun(processes: int) -> tuple[str, ...]:
    """Return the launcher that starts `run`'s script as several processes."""
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main in this process; return its exit status, stdout and stderr."""
    deterministic = torch.get_deterministic_debug_mode()

    def call_with(module, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_script(module.main)
        return end.value.code, *capsys.readouterr()

    yield call_with
    torch.set_deterministic_debug_mode(deterministic)  # which train.py asks for


@pytest.fixture
def deep(tmp_path):
    """Return how to make folders in each other in tmp_path, more than pytest itself can delete."""
    here = Path.cwd()

    def make(depth: int) -> None:
        """Go down to the last of them."""
        os.chdir(tmp_path)
        for _ in range(depth):
            Path("d").mkdir()
            os.chdir("d")

    yield make
    os.chdir(here)
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """Return what runs scripts in forked children, for the soak."""
    from crashes import Driver

    driver = Driver(tmp_path_factory.mktemp("driver"))
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory, driver) -> Path:
    """Write data, and masks of it, for the commands of the soak."""
    from soak import tasks, write_data

    folder = tmp_path_factory.mktemp("shared")
    write_data(folder / "data")
    assert driver(folder / "made", "infer", *tasks(folder)["infer"].arguments(folder)) == 0
    (folder / "out").rename(folder / "masks")
    return folder


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """Keep decoded frames of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def data(tmp_path) -> Path:
    """Return a folder of three labelled videos of noise, of 3 frames each."""
    for i, name in enumerate(("video_10", "video_2", "video0")):
        make_video(tmp_path / "data" / name, seed=i)
    return tmp_path / "data"
