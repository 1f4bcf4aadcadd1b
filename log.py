"""How the epochs of a run go: the mean loss, the progress bar, log.csv, TensorBoard."""

import csv
import io
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from devices import Processes
from files import atomic_write, named
from utils import UserError

FIELDS = (
    *("epoch", "train_loss", "val_loss", "miou", "foreground_iou", "lr", "frames_per_s"),
    "weighted_iou",
)
LOG, BOARD = "log.csv", "tensorboard"  # below --out
DRAW_EVERY = 20  # seconds at least: a picture takes 0.1 s, most of it to be packed


@dataclass
class MeanLoss:
    """The mean loss of the steps of an epoch; the host waits for the device in `look` alone."""

    processes: Processes | None = None  # over which a step's loss is averaged; None: this alone
    total: float = 0.0  # of the steps that were looked at
    steps: int = 0
    latest: float = math.nan
    unseen: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor) -> None:
        """Take the loss of a step, whenever it will have been computed."""
        self.unseen.append(loss.detach())

    def look(self) -> None:
        """Count what was added. Raises UserError: a loss was not finite, of any process.

        All processes look after the same steps. The sum does not depend on which these are.
        """
        if not self.unseen:
            return
        losses = torch.stack(self.unseen).cpu().double()  # no float64 on Apple's GPUs
        self.unseen.clear()
        if self.processes and self.processes.count > 1:
            self.processes.add_up(losses)
            losses /= self.processes.count
        if not losses.isfinite().all():
            raise UserError("the loss is no longer finite: lower --learning-rate")
        for loss in losses.tolist():
            self.total += loss
            self.steps += 1
            self.latest = loss

    def mean(self) -> float:
        """Look, and return the mean of the epoch so far, which a stop in validation saves."""
        self.look()
        return self.total / max(1, self.steps)

    def begin(self) -> None:
        """Begin an epoch."""
        self.total, self.steps = 0.0, 0


class Progress:
    """The batches of an epoch with a progress bar, and how fast they are trained on.

    Args:
        loader: Yields tensors whose first dimension is that of the frames.
    """

    def __init__(self, loader: DataLoader):
        self.bar = tqdm(loader, "training", leave=False, disable=None, unit="batch")
        self.frames, self.waited, self.start = 0, 0.0, time.perf_counter()

    def __iter__(self) -> Iterator[list[Tensor]]:
        asked = time.perf_counter()
        for batch in self.bar:
            self.waited += time.perf_counter() - asked
            self.frames += len(batch[0])
            yield batch
            asked = time.perf_counter()

    def show(self, loss: float, left: str) -> None:
        """Write the latest loss, the pace and the time that is left beside the bar."""
        pace = self.figures()
        rates = f"{pace['frames_per_s']:.1f} frames/s, {pace['waiting']:.0%} waiting for data"
        parts = (f"loss {loss:.3f}", rates, left)
        self.bar.set_postfix_str(", ".join(filter(None, parts)), refresh=False)

    def figures(self) -> dict[str, float]:
        """Return frames_per_s (of this process) and waiting (share of the time, for data)."""
        seconds = time.perf_counter() - self.start
        return {"frames_per_s": self.frames / seconds, "waiting": self.waited / seconds}


class Log:
    """log.csv and TensorBoard events; lines of epochs after `completed` are cut off.

    A run that begins gives -1, so that no line is kept: epoch 0 is what it begins with.

    One that replaces the log of another run leaves it alone until there is an epoch to write.

    All methods raise OSError with a filename where nothing can be written.
    """

    def __init__(self, out: Path, completed: int, replaces: bool = False):
        path, kept = out / LOG, []
        if completed >= 0 and os.path.lexists(path):
            kept = lines(path, completed)
        text = io.StringIO(newline="")
        csv.DictWriter(text, FIELDS).writeheader()
        csv.DictWriter(text, FIELDS, extrasaction="ignore").writerows(kept)
        self.path, self.folder, self.head = path, out / BOARD, text.getvalue()
        if not replaces:
            self._begin("")
        from torch.utils.tensorboard import SummaryWriter  # seconds, in training alone

        threading.excepthook = _leave_to_caller
        with named(self.folder):
            self.board = SummaryWriter(self.folder, purge_step=completed + 1)
        self.drawn = time.monotonic()

    def _begin(self, line: str) -> None:
        """Write the file whole: what it holds from before, and a line."""
        with atomic_write(self.path) as file:  # a kill must not cost what the log holds already
            file.write((self.head + line).encode())
        self.head = ""

    def add(self, figures: dict[str, Any]) -> None:
        """Write one epoch's figures: those of FIELDS, and the IoU of each class that is there."""
        epoch = figures["epoch"]
        line = io.StringIO(newline="")
        csv.DictWriter(line, FIELDS).writerow({name: figures[name] for name in FIELDS})
        if self.head:
            self._begin(line.getvalue())
        else:
            with named(self.path), self.path.open("ab", buffering=0) as file:
                if file.write(line.getvalue().encode()) < len(line.getvalue()):
                    raise OSError
                os.fsync(file.fileno())  # before the checkpoint: the line is never redone
        with named(self.folder):
            for name in FIELDS[1:]:
                if figures[name] is not None:  # as where no frame has an object
                    self.board.add_scalar(name, figures[name], epoch)
            for name, iou in figures["per_class"].items():
                if figures["pixels"][name]:
                    self.board.add_scalar(f"iou/{name}", iou, epoch)
            self.board.flush()

    def wants_picture(self) -> bool:
        """Return whether the last picture is so long ago that another costs next to nothing."""
        return time.monotonic() - self.drawn > DRAW_EVERY

    def draw(self, epoch: int, picture: np.ndarray) -> None:
        """Show frames over true labels over predicted ones, uint8 (H, W, 3), in TensorBoard."""
        with named(self.folder):
            self.board.add_image("frames, truth, prediction", picture, epoch, dataformats="HWC")
            self.board.flush()
        self.drawn = time.monotonic()


def _leave_to_caller(failed: threading.ExceptHookArgs) -> None:
    """Print no traceback where TensorBoard's thread cannot write: its next call here raises it."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def lines(path: Path, completed: int) -> list[dict[str, str]]:
    """Return the whole lines of a log.csv up to an epoch. Raises UserError if it is damaged."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError
        with path.open(newline="") as file:
            whole = [row for row in csv.DictReader(file) if None not in row.values()]
        return [row for row in whole if int(row["epoch"]) <= completed]
    except (OSError, KeyError, ValueError, csv.Error):
        raise UserError(f"{path} is damaged: repair it or move it away, then resume") from None


def epoch_line(figures: dict[str, Any], left: str) -> str:
    """Return what is printed of an epoch; `left` as of `Run.time_left`."""
    validated = (
        f"validation loss {figures['val_loss']:.3f}, "
        f"weighted IoU {figures['weighted_iou'] or 0:.3f}, "
        f"foreground IoU {figures['foreground_iou'] or 0:.3f}"
    )
    if not figures["epoch"]:
        return f"epoch 0, as it begins: {validated}"
    return (
        f"epoch {figures['epoch']}: train loss {figures['train_loss']:.3f}, {validated}; "
        f"{figures['frames_per_s']:.1f} frames/s, {figures['waiting']:.0%} waiting for data"
        f"{left and '; '}{left}"
    )
