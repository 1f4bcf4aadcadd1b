"""How the epochs of a run went: log.csv, TensorBoard, what is printed, and how long is left."""

import csv
import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from files import atomic_write, named
from page.pictures import draw_columns
from utils import UserError

FIELDS = (
    *("epoch", "train_loss", "val_loss", "miou", "foreground_iou", "lr", "frames_per_s"),
    "weighted_iou",
)
DRAW_EVERY = 20  # seconds at least: a picture takes 0.1 s, most of it to be packed


class Log:
    """log.csv and TensorBoard events; lines of epochs after `completed` are cut off.

    All methods raise OSError with a filename where nothing can be written.
    """

    def __init__(self, out: Path, completed: int):
        path, kept = out / "log.csv", []
        if completed and os.path.lexists(path):
            kept = _lines(path, completed)
        text = io.StringIO(newline="")
        csv.DictWriter(text, FIELDS).writeheader()
        csv.DictWriter(text, FIELDS, extrasaction="ignore").writerows(kept)
        with atomic_write(path) as file:  # a kill must not cost what the log holds already
            file.write(text.getvalue().encode())
        self.path, self.folder = path, out / "tensorboard"
        threading.excepthook = _leave_to_caller
        with named(self.folder):
            self.board = SummaryWriter(self.folder, purge_step=completed + 1)
        self.drawn = time.monotonic()

    def add(self, figures: dict[str, Any]) -> None:
        """Write one epoch's figures: those of FIELDS, and the IoU of each class that is there."""
        epoch = figures["epoch"]
        line = io.StringIO(newline="")
        csv.DictWriter(line, FIELDS).writerow({name: figures[name] for name in FIELDS})
        with named(self.path), self.path.open("ab", buffering=0) as file:
            if file.write(line.getvalue().encode()) < len(line.getvalue()):
                raise OSError
            os.fsync(file.fileno())  # before the checkpoint, with which the line is never redone
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

    def draw(self, epoch: int, frames: Tensor, truth: Tensor, labels: Tensor) -> None:
        """Show frames (N, 3, H, W) over true ids (N, H, W) over predicted ones, in TensorBoard."""
        picture = draw_columns(frames, truth, labels)
        with named(self.folder):
            self.board.add_image("frames, truth, prediction", picture, epoch, dataformats="HWC")
            self.board.flush()
        self.drawn = time.monotonic()


def _leave_to_caller(failed: threading.ExceptHookArgs) -> None:
    """Print no traceback where TensorBoard's thread cannot write: its next call here raises it."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def _lines(path: Path, completed: int) -> list[dict[str, str]]:
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
    """Return what is printed of an epoch; `left` as of `Pace`."""
    return (
        f"epoch {figures['epoch']}: train loss {figures['train_loss']:.3f}, "
        f"validation loss {figures['val_loss']:.3f}, mIoU {figures['miou']:.3f}, "
        f"weighted IoU {figures['weighted_iou'] or 0:.3f}, "
        f"foreground IoU {figures['foreground_iou'] or 0:.3f}; "
        f"{figures['frames_per_s']:.1f} frames/s, {figures['waiting']:.0%} waiting for data"
        f"{left and '; '}{left}"
    )


class Pace:
    """How long the rest of a run takes, at the pace of what this process has done of it.

    Training is counted by the step; what follows it in an epoch (settling, validation, saving) by
    the epoch, so that one which a stop has cut in two does not mislead.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.mark = clock, clock()
        self.training, self.steps = 0.0, 0  # seconds of so many steps
        self.rest, self.epochs = 0.0, 0  # seconds of what followed them in so many epochs

    def stepped(self) -> None:
        """Note that a step has ended."""
        self.training += self._passed()
        self.steps += 1

    def ended(self) -> None:
        """Note that an epoch has ended, with all that belongs to it."""
        self.rest += self._passed()
        self.epochs += 1

    def _passed(self) -> float:
        before, self.mark = self.mark, self.clock()
        return self.mark - before

    def left(self, steps: int, epochs: int) -> str:
        """Return e.g. "12 min left", for so many steps and ends of epochs.

        "over 12 min left" where no epoch has ended yet; "" where nothing is left or no step is
        known.
        """
        if not epochs or not self.steps:
            return ""
        seconds = steps * self.training / self.steps
        if self.epochs:
            seconds += epochs * self.rest / self.epochs
        return f"{'' if self.epochs else 'over '}{in_words(seconds)} left"


def in_words(seconds: float) -> str:
    """Return a time as people say it: 40 s, 12 min, 3 h 5 min, 2 days 4 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} days {hours % 24} h"
