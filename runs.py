"""A run of training: what it changes, and how that is saved and restored."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from model import UNet
from optim import MuonAdamW
from utils import UserError, load_checkpoint, save_checkpoint

CHECKPOINT_EVERY = 5  # epochs


@dataclass
class Run:
    """What training changes, and what a checkpoint restores."""

    model: nn.Module
    average: nn.Module  # the running mean of its weights, which is validated and kept
    optimizer: MuonAdamW
    epoch: int = 0  # completed
    step: int = 0  # completed
    best: float = -1.0  # weighted IoU

    @classmethod
    def start(cls, model: nn.Module) -> "Run":
        """Return a run that begins with the weights of a network."""
        average = copy.deepcopy(model).requires_grad_(False)
        return cls(model, average, MuonAdamW(model))

    def resume(self, path: Path) -> None:
        """Go on from a `Unet_checkpoint_last.pt`. Raises UserError: it is of another network."""
        checkpoint = load_checkpoint(path)
        if "training" not in checkpoint:
            raise UserError(f"{path} holds no state to go on from: give another --out")
        if UNet.from_checkpoint(checkpoint, path).config != self.model.config:
            raise UserError(f"{path} is of another network: give its --widths, or another --out")
        state = checkpoint["training"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.best = checkpoint["epoch"], state.get("best", -1.0)

    def save(self, out: Path, facts: dict[str, Any], last_epoch: int) -> None:
        """Write the checkpoints of the epoch that has just been validated.

        The best is chosen by `facts["weighted_iou"]`: mIoU jumps by a whole class with one pixel.
        """
        improved = facts["weighted_iou"] > self.best
        self.best = max(self.best, facts["weighted_iou"])
        checkpoint = {
            "model": self.average.state_dict(),
            "model_config": self.model.config,
            "epoch": self.epoch,
            **facts,
        }
        if self.epoch % CHECKPOINT_EVERY == 0 or self.epoch == last_epoch:
            save_checkpoint(out / f"Unet_checkpoint_epoch_{self.epoch}.pt", checkpoint)
        if improved:
            save_checkpoint(out / "Unet_checkpoint_best.pt", checkpoint)
        checkpoint["training"] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }
        save_checkpoint(out / "Unet_checkpoint_last.pt", checkpoint)
