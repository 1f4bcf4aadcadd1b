"""How the epochs of a run went: log.csv and TensorBoard."""

import csv
import io
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from utils import atomic_write

FIELDS = (
    *("epoch", "train_loss", "val_loss", "miou", "foreground_iou", "lr", "frames_per_s"),
    "weighted_iou",
)


class Log:
    """log.csv and TensorBoard events; lines of epochs after `completed` are cut off."""

    def __init__(self, out: Path, completed: int):
        path, kept = out / "log.csv", []
        if completed and path.exists():
            with path.open(newline="") as old:
                whole = [row for row in csv.DictReader(old) if None not in row.values()]
            kept = [row for row in whole if int(row["epoch"]) <= completed]
        text = io.StringIO(newline="")
        csv.DictWriter(text, FIELDS).writeheader()
        csv.DictWriter(text, FIELDS, extrasaction="ignore").writerows(kept)
        with atomic_write(path) as file:  # a kill must not cost what the log holds already
            file.write(text.getvalue().encode())
        self.lines = csv.DictWriter(path.open("a", newline="", buffering=1), FIELDS)
        self.board = SummaryWriter(out / "tensorboard", purge_step=completed + 1)

    def add(self, figures: dict[str, Any]) -> None:
        """Write one epoch's figures, and print them."""
        self.lines.writerow({name: figures[name] for name in FIELDS})
        for name in FIELDS[1:]:
            self.board.add_scalar(name, figures[name], figures["epoch"])
        self.board.flush()
        print(
            f"epoch {figures['epoch']}: train loss {figures['train_loss']:.3f}, "
            f"validation loss {figures['val_loss']:.3f}, mIoU {figures['miou']:.3f}, "
            f"weighted IoU {figures['weighted_iou'] or 0:.3f}, "
            f"foreground IoU {figures['foreground_iou']:.3f}; "
            f"{figures['frames_per_s']:.1f} frames/s, {figures['waiting']:.0%} waiting for data",
            flush=True,
        )
