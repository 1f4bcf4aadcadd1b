"""A run of training: what it changes, how it begins, is saved, restored and stopped."""

import copy
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import SHIPPED, is_finite, load_checkpoint, save_checkpoint
from devices import Processes
from model import UNet
from optim import MuonAdamW
from render import DEMO_DATA
from utils import Stopped, UserError, no_memory

NOTHING = Path("none")  # of --init
CHECKPOINT_EVERY = 5  # epochs
SAVE_EVERY = 300  # seconds between saves within an epoch
AGREE_EVERY = 5  # steps after which several processes ask each other whether to stop or to save
LAST, BEST = "Unet_checkpoint_last.pt", "Unet_checkpoint_best.pt"
NAMED = 16  # videos, at most, where the loss is not finite: those of a batch of the usual size
SCORES = ("miou", "weighted_iou")  # that a checkpoint carries
SAVE = 1  # what a process may wish for: to save, or the number of a signal, all of which are above


def load_init(
    init: Path | None, data: Path, widths: list[int] | None, first: bool
) -> tuple[UNet, Path] | None:
    """Return the network whose weights training starts from, and its file; None: from nothing.

    Args:
        init: What --init says; None: the shipped weights, if they are there and `data` and
            `widths` do not speak against them.
        data: What to learn from.
        widths: What --widths says.
        first: Whether this is the process that speaks.

    Raises:
        UserError: what --init names cannot be read, or is another network than `widths` says.
    """
    if init == NOTHING or (init is None and (data == DEMO_DATA or widths)):
        return None
    file = init or SHIPPED
    try:
        trained = UNet.load(file)
    except UserError as error:
        if init:
            raise
        if first:
            print(f"the shipped weights are left out: {error}", file=sys.stderr)
        return None
    if widths and trained.config != {"widths": widths}:
        raise UserError(f"{file} is another network: leave out --widths")
    return trained, file


def build_model(trained: UNet | None, widths: list[int] | None, device: torch.device) -> UNet:
    """Return the network to train, on its device: `trained`, or a new one of these widths."""
    model = trained or UNet(**({"widths": widths} if widths else {}))
    if device.type != "cpu":  # there the convolutions choose their own format
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


@dataclass
class MeanLoss:
    """The mean loss of the steps of an epoch; the host waits for the device in `look` alone."""

    processes: Processes | None = None  # over which a step's loss is averaged; None: this alone
    total: float = 0.0  # of the steps that were looked at
    steps: int = 0
    unseen: list[Tensor] = field(default_factory=list)
    videos: Callable[[int], list[str]] = lambda ago: []  # of a step so many before the latest

    def add(self, loss: Tensor) -> None:
        """Take the loss of a step, whenever it will have been computed."""
        self.unseen.append(loss.detach())

    def look(self) -> float:
        """Return the loss of the latest step. Raises UserError: one was not finite, of any process.

        All processes look after the same steps. The sum does not depend on which these are.
        """
        if not self.unseen:
            return math.nan
        losses = torch.stack(self.unseen).cpu().double()  # no float64 on Apple's GPUs
        self.unseen.clear()
        if self.processes and self.processes.count > 1:
            self.processes.add_up(losses)
            losses /= self.processes.count
        for i, loss in enumerate(losses.tolist()):
            if not math.isfinite(loss):
                videos = self.videos(len(losses) - 1 - i)
                more = f" and {len(videos) - NAMED} more" if len(videos) > NAMED else ""
                where = f", or look at what it had just seen: {', '.join(videos[:NAMED])}{more}"
                raise UserError(
                    f"the loss is no longer finite: lower --learning-rate{where if videos else ''}"
                )
            self.total += loss
            self.steps += 1
        return loss

    def mean(self) -> float:
        """Look, and return the mean of the epoch so far, which a stop in validation saves."""
        self.look()
        return self.total / max(1, self.steps)

    def begin(self) -> None:
        """Begin an epoch."""
        self.total, self.steps = 0.0, 0


@dataclass
class Run:
    """What training changes, and what a checkpoint restores."""

    model: nn.Module
    average: nn.Module  # the running mean of its weights, which is validated and kept
    optimizer: MuonAdamW
    epoch: int = 0  # completed
    step: int = 0  # completed
    done: int = 0  # steps of the epoch that has begun
    best: float = -1.0  # weighted IoU
    loss: MeanLoss = field(default_factory=MeanLoss)
    facts: dict[str, Any] = field(default_factory=dict)  # what else a checkpoint says

    @classmethod
    def start(cls, model: nn.Module, pull: float = 0.0) -> "Run":
        """Return a run that begins with the weights of a network; `pull` as of MuonAdamW."""
        average = copy.deepcopy(model).requires_grad_(False)
        return cls(model, average, MuonAdamW(model, pull))

    def begin(self, out: Path | None, batch_size: int, steps: int, processes: Processes) -> None:
        """Resume from the last checkpoint in `out`, if one is there; epochs have `steps`.

        Raises:
            UserError: it is of another network, or not the same one for all processes.
        """
        self.loss.processes = processes
        if out and (out / LAST).exists():
            self.resume(out / LAST, batch_size)
        self.done = min(self.done, steps)
        self.step = self.epoch * steps + self.done
        found = processes.gather(self.step)
        if len(set(found)) > 1:
            raise UserError(
                f"processes go on after other steps ({', '.join(map(str, found))}): "
                "give an --out that all machines share"
            )

    def resume(self, path: Path, batch_size: int) -> None:
        """Go on from a `Unet_checkpoint_last.pt`, in the midst of an epoch if it was saved there.

        Raises:
            UserError: it is of another network.
        """
        checkpoint = load_checkpoint(path)
        if "training" not in checkpoint:
            raise UserError(f"{path} holds no state to go on from: give another --out")
        if UNet.from_checkpoint(checkpoint, path).config != self.model.config:
            raise UserError(f"{path} is of another network: give its --widths, or another --out")
        try:
            self._restore(checkpoint, batch_size)
        except Exception as error:  # nonsense in the place of numbers raises nearly anything
            if no_memory(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0][:100]
            raise UserError(
                f"{path} holds no state to go on from ({reason}): give another --out"
            ) from None

    def _restore(self, checkpoint: dict[str, Any], batch_size: int) -> None:
        state = checkpoint["training"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.facts |= {name: float(checkpoint[name]) for name in SCORES if name in checkpoint}
        total, steps = state.get("loss", (0.0, 0))
        numbers = [checkpoint["epoch"], state.get("frames", 0), steps]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"epoch, frames and steps are {numbers}")
        self.epoch, self.done, self.loss.steps = numbers[0], numbers[1] // batch_size, steps
        self.best, self.loss.total = float(state.get("best", -1.0)), float(total)
        if not is_finite(self.model.state_dict()):
            raise ValueError("weights are not finite numbers")

    def save(self, out: Path, figures: dict[str, Any], last_epoch: int, batch_size: int) -> None:
        """Write the checkpoints of the epoch that has just been validated with these `figures`.

        The best is chosen by weighted IoU: mIoU jumps by a whole class with one stray pixel.
        """
        self._must_be_finite()
        self.facts |= {name: figures[name] or 0.0 for name in SCORES}
        improved = self.facts["weighted_iou"] > self.best
        self.best = max(self.best, self.facts["weighted_iou"])
        if self.epoch % CHECKPOINT_EVERY == 0 or self.epoch == last_epoch:
            save_checkpoint(out / f"Unet_checkpoint_epoch_{self.epoch}.pt", self._checkpoint())
        if improved:
            save_checkpoint(out / BEST, self._checkpoint())
        self.save_last(out, batch_size)

    def save_last(self, out: Path, batch_size: int) -> None:
        """Write what `resume` goes on from."""
        self._must_be_finite()
        training = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "frames": self.done * batch_size,  # of the epoch that has begun
            "loss": [self.loss.total, self.loss.steps],
        }
        save_checkpoint(out / LAST, self._checkpoint() | {"training": training})

    def _must_be_finite(self) -> None:
        """Keep the checkpoints there are: a step whose loss is a number can end in none."""
        if not (is_finite(self.model.state_dict()) and is_finite(self.average.state_dict())):
            raise UserError("the weights are no longer finite: lower --learning-rate")

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "model": self.average.state_dict(),
            "model_config": self.model.config,
            "epoch": self.epoch,
            **self.facts,
        }


def last_words(out: Path, data: Path) -> str:
    """Say what a finished run came to, where its files are, and what to type next."""
    file = out / BEST
    try:
        best = load_checkpoint(file)
        came_to = f"best weighted IoU: {best['weighted_iou']:.3f}, after epoch {best['epoch']}"
    except (UserError, KeyError):  # deleted or damaged since, or of an earlier version
        file, came_to = out / LAST, "weights of the last epoch"
    script = str(Path(sys.argv[0]).with_name("infer.py"))
    command = ["python", script, "--ckpt", str(file), "--out", "masks", "--data", str(data)]
    return (
        f"{came_to}, in {file}\n"
        f"figures of every epoch: {out / 'log.csv'}, and curves and pictures with: "
        f"{shlex.join(['tensorboard', '--logdir', str(out / 'tensorboard')])}\n"
        f"label these or other videos with: {shlex.join(command)}"
    )


class Keeper:
    """Saves a run within an epoch: every few minutes, and when it is told to stop.

    SIGTERM and Ctrl-C end the step first, a second one of them ends a single process at once.

        with Keeper(run, out, batch_size, processes) as keeper:
            ...  # a step
            keeper.attend()

    Several processes stop after the same step: whoever got the signal, they ask each other.
    """

    def __init__(self, run: Run, out: Path, batch_size: int, processes: Processes):
        self.run, self.out, self.batch_size, self.processes = run, out, batch_size, processes
        self.signal, self.saved = 0, time.monotonic()
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "Keeper":
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self.processes.count == 1:  # torchrun passes a Ctrl-C on that a process has had already
            self._restore()

    def attend(self) -> None:
        """Do after a step what is wished for. Raises Stopped: the state is saved."""
        if self.processes.count == 1 or self.run.step % AGREE_EVERY == 0:
            self.obey(max(self.processes.gather(self._wish())))

    def attend_epoch(self) -> None:
        """Stop after an epoch that has just been saved, if told to. Raises Stopped."""
        self.saved = time.monotonic()
        if number := max(self.processes.gather(self.signal)):
            raise self._stopped(number)

    def attend_validation(self) -> None:
        """Stop while a single process validates; several end that first. Raises Stopped."""
        if self.processes.count == 1 and self.signal:
            self.obey(self.signal)

    def _wish(self) -> int:
        due = self.processes.first and time.monotonic() - self.saved > SAVE_EVERY
        return self.signal or (SAVE if due else 0)

    def obey(self, wish: int) -> None:
        """Save, and raise Stopped if the wish is a signal; every process with the same wish."""
        if not wish:
            return
        self.run.loss.look()
        if self.processes.first:
            self.run.save_last(self.out, self.batch_size)
        self.saved = time.monotonic()
        if wish != SAVE:
            raise self._stopped(wish)

    def _stopped(self, number: int) -> Stopped:
        if not self.processes.first:
            return Stopped("", number)
        launcher = "python" if self.processes.count == 1 else "torchrun ..."
        arguments = sys.argv + ["--resume"] * ("--resume" not in sys.argv)
        where = (
            f"step {self.run.done} of epoch {self.run.epoch + 1}"
            if self.run.done
            else (f"epoch {self.run.epoch}")
        )
        command = f"{launcher} {shlex.join(arguments)}"
        return Stopped(f"\nstopped after {where}, all is saved; go on with: {command}", number)
