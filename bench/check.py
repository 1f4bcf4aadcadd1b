"""Does the project work on this device? What `python benchmark.py --check` finds out.

    python benchmark.py --check                    # two minutes at most, fit for a bug report
    python benchmark.py --check --device cuda:1

Each check is a line: its name, its figure, and what the figure may be. The measure is this
machine's CPU in float32. Where the device is the CPU itself, it is compared with itself, which
still tells float32 from bfloat16. The last line is "all well", or what was not.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import checkpoints
import devices
import render
import utils
from augment import augment
from batches import ShardedBatches, make_loaders
from dataset import CLEVRDataset, split_data
from labelling import Labeller
from model import UNet
from optim import MuonAdamW
from outputs import Outputs, provenance
from pipeline import label_videos
from runs import LAST, Run
from train import MAX_NORM, RATES, train_epochs, validate
from videos import find_videos, read_labels, read_video

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
VIDEOS, SEED, OBJECTS = 2, 7, (4, 8)  # what is rendered to look at
STEP_FRAMES, STEP_RATE = 16, 1e-3  # of a training step: train.py's batch; a quarter of its rate
PATIENCE = 60  # seconds that two processes may take

# Of labels: the share of the object pixels that may differ. Of bfloat16, whose numbers have eight
# bits, 4 in 10,000 differ on a CPU; more than 1 in 100 would be seen in the figures of RESULTS.md.
LABELS_FLOAT32, LABELS_MIXED = 1e-4, 1e-2
# Of a step: the share of the loss, and of the length of the change of all weights. Rounding of 1e-7
# in the weights changes a step by 5e-5, all in bfloat16 by 0.2, since Muon makes small gradients as
# large as large ones; one gradient of the wrong sign by 0.06 and more. Trained weights have so
# small a loss that bfloat16 changes it by 1e-3 to 1e-2 of itself.
LOSS_FLOAT32, STEP_FLOAT32 = 1e-4, 0.03
LOSS_MIXED, STEP_MIXED = 5e-2, 0.4
# Of a resumed run: how many times the difference between two runs that were not stopped. Where
# these are equal bit by bit, so must it be.
RESUMED = 10.0
# Of validation by two processes: other batches are other roundings, a frame too few is 1e-2.
FIGURES = 1e-3

# Whether all was well, or None where a check could not be made here, and the figure or the reason.
Finding = tuple[bool | None, str]


class Case(NamedTuple):
    """What the checks look at."""

    device: torch.device
    ckpt: Path
    folder: Path  # of this run's own files; its data/ holds the videos
    frames: list[Tensor]  # of each video, uint8 (T, 3, H, W)
    masks: list[Tensor]  # uint8 (T, H, W)


def render_videos(folder: Path) -> None:
    """Render the videos to look at, which are the same everywhere."""
    threads = torch.get_num_threads()
    folder.mkdir()
    for k in range(VIDEOS):
        render.write_video(folder, k, SEED, OBJECTS, "cpu")
    torch.set_num_threads(threads)


def in_float32(model: UNet, device: torch.device) -> None:
    """Let a network compute in float32, whatever the precision of what uses it."""
    answers = model.answers

    def exact(frames: Tensor) -> Any:
        on_cuda = device.type == "cuda"  # whose convolutions are of TF32 by default
        flags = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        exactly = flags if on_cuda else contextlib.nullcontext()
        with exactly, torch.autocast(device.type, enabled=False):
            return answers(frames)

    # Of the class, since a Labeller goes past what a network itself has where that may be compiled.
    exact_class = {"answers": lambda self, frames: exact(frames)}
    model.__class__ = type("Exact", (type(model),), exact_class)


def labels_of(case: Case, device: torch.device, full: bool, followed: bool) -> Tensor:
    """Return infer.py's labels of all videos, (N, H, W), in float32 if `full`."""
    labeller = Labeller(UNet.load(case.ckpt), device, tracking=followed)
    if full:
        labeller.model = UNet.load(case.ckpt).to(device, memory_format=torch.channels_last).fuse()
        in_float32(labeller.model, device)
    return torch.cat([objects.labels for objects in labeller.label(case.frames)])


def compare_labels(case: Case, full: bool) -> Finding:
    """Compare the labels of the device with the CPU's, frame by frame and with objects followed."""
    if not full and not devices.has_bfloat16(case.device):
        return None, "this device has no bfloat16"
    wrong, allowed = [], LABELS_FLOAT32 if full else LABELS_MIXED
    for followed in (False, True):
        truth = labels_of(case, CPU, True, followed)
        wrong.append(int((truth != labels_of(case, case.device, full, followed)).sum()))
    objects = max(1, int((truth > 0).sum()))
    text = f"{wrong[0]} of {objects:,} object pixels differ frame by frame, {wrong[1]} followed"
    return max(wrong) <= allowed * objects, f"{text} (at most {allowed * objects:.0f})"


def training_step(case: Case, device: torch.device, full: bool) -> tuple[float, Tensor]:
    """Return the loss of a step, and by how much it changes all weights, (N,).

    Its lines are those of train.train_one_epoch, written again.
    """
    images = torch.cat(case.frames)[::VIDEOS][:STEP_FRAMES]
    masks = torch.cat(case.masks)[::VIDEOS][:STEP_FRAMES]
    torch.manual_seed(SEED)
    crops = [part.to(device) for part in augment(images, masks)]  # chance is the CPU's
    model = UNet.load(case.ckpt).to(device, memory_format=torch.channels_last).train()
    before = [weight.detach().to(CPU, copy=True) for weight in model.parameters()]
    optimizer = MuonAdamW(model)
    if full:
        in_float32(model, device)
    with devices.mixed_precision(device):
        loss = model(*crops)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step(STEP_RATE)
    pairs = zip(model.parameters(), before, strict=True)
    changes = [(weight.detach().cpu() - old).flatten() for weight, old in pairs]
    return loss.item(), torch.cat(changes)


def compare_step(case: Case, full: bool) -> Finding:
    """Compare a training step on the device with the CPU's, of the same weights and crops."""
    if not full and not devices.has_bfloat16(case.device):
        return None, "this device has no bfloat16"
    loss, change = training_step(case, CPU, True)
    its_loss, its_change = training_step(case, case.device, full)
    off_loss = abs(its_loss - loss) / loss
    off_step = ((its_change - change).norm() / change.norm()).item()
    limits = (LOSS_FLOAT32, STEP_FLOAT32) if full else (LOSS_MIXED, STEP_MIXED)
    text = (
        f"loss {its_loss:.5f}, off by {off_loss:.1e} (at most {limits[0]:g}); "
        f"weights' step off by {off_step:.1e} (at most {limits[1]:g})"
    )
    return off_loss <= limits[0] and off_step <= limits[1], text


def run_train(case: Case, out: str, epochs: int = 2, resume: bool = False) -> Tensor:
    """Train a tiny network up to an epoch of two; return the weights that were saved, (N,)."""
    processes, last = devices.Processes(case.device), case.folder / out / LAST
    training, validation, _ = split_data(case.folder / "data", 0, cache=False)
    torch.manual_seed(SEED)
    model = UNet((8, 16)).to(case.device, memory_format=torch.channels_last)
    deterministic = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        quiet = contextlib.redirect_stdout(io.StringIO())
        with quiet, warnings.catch_warnings(action="ignore"):
            loaders = make_loaders(training, validation, 4, 0, 0, processes)
            steps = len(loaders[0])
            last_one = last if resume else None
            run = Run.open(model, processes, 4, steps, 2, RATES[0], resume=last_one)
            train_epochs(run, *loaders, epochs, last.parent)
    finally:
        torch.set_deterministic_debug_mode(deterministic)
    state = checkpoints.load_checkpoint(last)["training"]["model"]
    return torch.cat([part.flatten().double() for part in state.values()])


def resume(case: Case) -> Finding:
    """Train in one go, twice, and once with a stop in between."""
    whole, again = run_train(case, "whole"), run_train(case, "again")
    half = run_train(case, "stopped", epochs=1)
    resumed = run_train(case, "stopped", resume=True)
    chance, off = ((run - whole).abs().max().item() for run in (again, resumed))
    text = f"weights off by {off:.1e}; two runs that were not stopped by {chance:.1e}"
    return off <= RESUMED * chance and not torch.equal(half, resumed), text


def label_and_validate(data: Path, ckpt: Path, out: Path, name: str) -> dict[str, Any] | None:
    """Label videos as infer.py does and validate as train.py does, in as many processes as run.

    Returns:
        The figures, of the first process.
    """
    processes = devices.Processes(devices.choose_device(name))
    device = processes.device
    videos = CLEVRDataset(processes.share_out(find_videos(data)), labelled=False)
    outputs = Outputs(out, provenance(None))
    deque(label_videos(Labeller(UNet.load(ckpt), device), videos, outputs), maxlen=0)
    dataset = CLEVRDataset(data, cache=False)
    batches = ShardedBatches(len(dataset), 8, processes, False)
    loader = DataLoader(dataset, batch_sampler=batches)
    figures = validate(UNet.load(ckpt).to(device), loader, processes)
    return {key: figures[key] for key in ("val_loss", "miou")} if processes.first else None


def two_processes(case: Case) -> Finding:
    """Compare two processes under torchrun with this one."""
    on_cpu = case.device.type == "cpu"
    if not on_cpu and torch.accelerator.device_count() < 2:
        return None, f"there is one {case.device.type} device"
    data, one, two = case.folder / "data", case.folder / "one", case.folder / "two"
    name = str(case.device)  # of several processes each gets its own
    figures = label_and_validate(data, case.ckpt, one, name)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = map(str, (data, case.ckpt.resolve(), two, name))
    command = [sys.executable, *launcher, "-m", "bench.check", *arguments]
    shared = json.loads(run_alone(command).splitlines()[-1])
    wrong = pixels = 0
    for video in find_videos(data):
        masks = [read_labels(out / video.path.name).numpy() for out in (one, two)]
        wrong += int(np.not_equal(*masks).sum())
        pixels += int((masks[0] > 0).sum())
    off = max(abs(shared[key] / figures[key] - 1) for key in figures)
    text = f"{wrong} of {pixels:,} object pixels differ (at most {LABELS_FLOAT32 * pixels:.0f}), "
    text += f"figures of validation off by {off:.1e} (at most {FIGURES:g})"
    return wrong <= LABELS_FLOAT32 * pixels and off <= FIGURES, text


def run_alone(command: list[str]) -> str:
    """Return what a command prints. Raises RuntimeError with its last error if it fails."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            process.communicate()
            raise RuntimeError(f"no end after {PATIENCE} seconds") from None
    if process.returncode:
        found = re.findall(r"^(?:\[rank\d+\]: *)?([\w.]*[eE]rror: \S.*)$", errors, re.MULTILINE)
        raise RuntimeError(found[-1] if found else f"exit status {process.returncode}")
    return output


CHECKS: dict[str, Callable[[Case], Finding]] = {
    "labels in float32": lambda case: compare_labels(case, full=True),
    "labels in bfloat16": lambda case: compare_labels(case, full=False),
    "a training step in float32": lambda case: compare_step(case, full=True),
    "a training step in bfloat16": lambda case: compare_step(case, full=False),
    "resume": resume,
    "two processes": two_processes,
}


def report(device: torch.device, ckpt: Path) -> int:
    """Print a line for each check, and "all well" or what was not; return 0 or 1."""
    checkpoints.load_checkpoint(ckpt)  # a wrong file is the user's, not the device's
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at first use
    bad = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data = Path(folder, "data")
        render_videos(data)
        videos = find_videos(data)
        frames = [read_video(video) for video in videos]
        masks = [read_labels(video.path) for video in videos]
        case = Case(device, ckpt, Path(folder), frames, masks)
        for name, check in CHECKS.items():
            try:
                well, text = check(case)
            except utils.Stopped as stop:  # by a signal, not by a fault
                stop.args = ("stopped",)
                raise
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                well, text = False, f"{type(error).__name__}: {lines[-1].strip()}"
            word = {True: "well", False: "NOT WELL", None: "left out"}[well]
            print(f"{name}: {word}: {text}", flush=True)
            if well is False:
                bad.append(name)
    print(f"not well: {', '.join(bad)}" if bad else "all well")
    return 1 if bad else 0


def main() -> None:
    """Do what `two_processes` has started this for."""
    data, ckpt, out, name = sys.argv[1:]
    if figures := label_and_validate(Path(data), Path(ckpt), Path(out), name):
        print(json.dumps(figures))


if __name__ == "__main__":
    utils.run_script(main)
