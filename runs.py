"""A run of training: how it begins or goes on, what is saved and said, how a signal stops it.

What a checkpoint holds, who may go on from it and what is said about it belong together: so this is
one long file.
"""

import contextlib
import copy
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import is_finite, load_checkpoint, save_checkpoint
from devices import Processes
from files import alone_in
from log import BOARD, LOG, MeanLoss, lines
from model import UNet
from optim import USUAL_BATCH, MuonAdamW, learning_rate_at
from utils import Stopped, UserError, no_memory, refused, resuming

CHECKPOINT_EVERY = 5  # epochs
LOOK_EVERY = 50  # steps: to look at a loss is to wait for the device
SAVE_EVERY = 300  # seconds between saves within an epoch
AGREE_EVERY = 5  # steps after which several processes ask each other whether to stop or to save
CHECKPOINT = re.compile(r"Unet_checkpoint_(last|best|epoch_[0-9]+)\.pt").fullmatch
LAST, BEST = "Unet_checkpoint_last.pt", "Unet_checkpoint_best.pt"
OPTIONS = {"num_epochs": int, "batch_size": int, "learning_rate": float}  # that a run goes on with
SCORES = ("miou", "weighted_iou")  # that a checkpoint carries
SAVE = 1  # what a process may request: to save, or the number of a signal, all of which are above


@dataclass
class Run:
    """What training changes, what a checkpoint restores, and how far the run has come."""

    model: UNet
    ema: UNet  # the exponential moving average of its weights, which is validated and kept
    optimizer: MuonAdamW
    processes: Processes  # those that train it together
    batch_size: int  # frames of a step, of all processes together
    num_epochs: int
    total_steps: int  # of all epochs
    highest_rate: float  # of learning
    seed: int = 0
    epoch: int = 0  # completed
    step: int = 0  # completed
    done: int = 0  # steps of the epoch that has begun
    best: float = -1.0  # weighted IoU
    facts: dict[str, Any] = field(default_factory=dict)  # what else a checkpoint says
    loss: MeanLoss = field(default_factory=MeanLoss)
    since: tuple[float, int] = (0.0, 0)  # when it began to train, in seconds, and at which step
    replaces: set[Path] = field(default_factory=set)  # files of a former run in its folder

    @classmethod
    def open(
        cls,
        model: UNet,
        processes: Processes,
        batch_size: int = USUAL_BATCH,
        epoch_steps: int = 1,
        num_epochs: int = 1,
        learning_rate: float = 1e-3,
        l2_sp: float = 0.0,
        seed: int = 0,
        facts: dict[str, Any] | None = None,
        resume: Path | None = None,
        replaces: Iterable[Path] = (),
    ) -> "Run":
        """Return a run that begins with the weights of `model`, or goes on from a checkpoint.

        Args:
            model: The network, on its device.
            processes: Those that train it together.
            batch_size: Frames of a step, of all processes together.
            epoch_steps: Steps of an epoch.
            num_epochs: Of the whole run.
            learning_rate: The highest.
            l2_sp: As of MuonAdamW.
            seed: Of its steps.
            facts: What else a checkpoint says.
            resume: A `Unet_checkpoint_last.pt` to go on from, in the midst of an epoch if it was
                saved there; where there is none, the run begins.
            replaces: Files of a former run, which are deleted once this one has a checkpoint.

        Raises:
            UserError: the checkpoint is of another network, or not the same one for all processes.
        """
        run = cls(
            model=model,
            ema=copy.deepcopy(model).requires_grad_(False),
            optimizer=MuonAdamW(model, l2_sp),
            processes=processes,
            batch_size=batch_size,
            num_epochs=num_epochs,
            total_steps=num_epochs * epoch_steps,
            highest_rate=learning_rate,
            seed=seed,
            facts=dict(facts or {}),
            loss=MeanLoss(processes),
            replaces=set(replaces),
        )
        if resume and resume.exists():
            run.restore(resume)
        run.done = min(run.done, epoch_steps)
        run.step = run.epoch * epoch_steps + run.done
        run.begin_clock()
        found = processes.gather(run.step)
        if len(set(found)) > 1:
            raise UserError(
                f"processes go on after other steps ({', '.join(map(str, found))}): "
                "give an --out that all machines share"
            )
        return run

    def restore(self, path: Path) -> None:
        """Take the state that `save_last` wrote; UserError: another network, seed or split."""
        checkpoint = load_checkpoint(path)
        if "training" not in checkpoint:
            raise UserError(f"{path} holds no state to go on from: give another --out")
        if UNet.from_checkpoint(checkpoint, path).config != self.model.config:
            raise UserError(f"{path} is of another network: give its --widths, or another --out")
        seed = checkpoint.get("seed", self.seed)
        if seed != self.seed:  # other videos would validate, and other batches follow
            raise UserError(f"{path} was begun with --seed {seed}: give that, or another --out")
        held_out = self.facts.get("held_out")
        if checkpoint.get("held_out", held_out) != held_out:  # it may have learned from them
            raise UserError(
                f"{path} was validated on other videos than --data now sets aside, from which it "
                "may have learned: give the data that it learned from, or another --out"
            )
        try:
            self._take(checkpoint)
        except Exception as error:  # nonsense in the place of numbers raises nearly anything
            if no_memory(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0][:100]
            raise UserError(
                f"{path} holds no state to go on from ({reason}): give another --out"
            ) from None
        if checkpoint["training"].get("replaces") and self.processes.first:
            for file in {*files_of_run(path.parent)} - {path}:  # of another run, or made again
                file.unlink(missing_ok=True)

    def _take(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["training"]
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.l2_sp = float(state.get("l2_sp", self.optimizer.l2_sp))
        self.facts |= {name: float(checkpoint[name]) for name in SCORES if name in checkpoint}
        total, steps = state["loss"]
        numbers = [checkpoint["epoch"], state["frames"], steps]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"epoch, frames and steps are {numbers}")
        self.epoch, self.done, self.loss.steps = numbers[0], numbers[1] // self.batch_size, steps
        self.best, self.loss.total = float(state["best"]), float(total)
        if not is_finite(self.model.state_dict()):
            raise ValueError("weights are not finite numbers")

    def learning_rate(self, ago: int = 0) -> float:
        """Return the learning rate of the next step, or of one so many steps ago."""
        progress = max(0, self.step - ago) / self.total_steps
        return learning_rate_at(progress, self.highest_rate)

    def seed_step(self) -> None:
        """Seed the next step, so that a run which was stopped goes on like one which was not."""
        number = self.step * self.processes.count + self.processes.rank
        torch.manual_seed((1_000_000_007 * self.seed + number) % 2**63)

    def count_step(self, loss: Tensor) -> None:
        """Count a step of this loss. Raises UserError if one of the last was not finite."""
        self.step += 1
        self.done += 1
        self.loss.add(loss)
        if self.step % LOOK_EVERY == 0:
            self.loss.look()

    def end_epoch(self) -> None:
        """Count an epoch."""
        self.epoch, self.done = self.epoch + 1, 0
        self.loss.begin()

    @property
    def begins(self) -> bool:
        """Whether it has not had a step yet."""
        return not (self.step or self.loss.steps)

    def begin_clock(self) -> None:
        """Count the pace from now on."""
        self.since = time.monotonic(), self.step

    def time_left(self) -> str:
        """Return how long the rest takes at the pace so far, "12:30 left"; "" if none is known."""
        began, first = self.since
        done, rest = self.step - first, self.total_steps - self.step
        if done <= 0 or rest <= 0:
            return ""
        return f"{tqdm.format_interval((time.monotonic() - began) / done * rest)} left"

    def save(self, out: Path, figures: dict[str, Any], last_epoch: int) -> None:
        """Write the checkpoints of the epoch that has just been validated with these `figures`.

        The best is chosen by weighted IoU: mIoU jumps by a whole class with one stray pixel.
        """
        self._must_be_finite()
        self.facts |= {name: figures[name] or 0.0 for name in SCORES}
        improved = self.facts["weighted_iou"] > self.best
        self.best = max(self.best, self.facts["weighted_iou"])
        if self.epoch and (self.epoch % CHECKPOINT_EVERY == 0 or self.epoch == last_epoch):
            self._write(out / f"Unet_checkpoint_epoch_{self.epoch}.pt")
        if improved:
            self._write(out / BEST)
        self.save_last(out)

    def save_last(self, out: Path) -> None:
        """Write what `restore` goes on from."""
        self._must_be_finite()
        training = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "frames": self.done * self.batch_size,  # of the epoch that has begun
            "loss": [self.loss.total, self.loss.steps],
            "options": {
                "num_epochs": self.num_epochs,
                "batch_size": self.batch_size,
                "learning_rate": float(self.highest_rate),
            },
            "l2_sp": self.optimizer.l2_sp,
            "replaces": bool(self.replaces),  # files that are here yet
        }
        self._write(out / LAST, training=training)
        for path in self.replaces:
            path.unlink(missing_ok=True)
        self.replaces.clear()

    def replace_former(self, out: Path) -> None:
        """Delete a former run for this one, whose state is saved first; its epoch ends after that.

        So a full disk leaves the former run whole, and after a kill `restore` deletes the rest.
        """
        if self.replaces:
            self.save_last(out)

    def _write(self, path: Path, **more: Any) -> None:
        save_checkpoint(path, self._checkpoint() | more)
        self.replaces.discard(path)

    def _must_be_finite(self) -> None:
        """Keep the checkpoints there are: a step whose loss is a number can end in none."""
        if not (is_finite(self.model.state_dict()) and is_finite(self.ema.state_dict())):
            raise UserError("the weights are no longer finite: lower --learning-rate")

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "model": self.ema.state_dict(),
            "model_config": self.model.config,
            "epoch": self.epoch,
            **self.facts,
        }


def options_of(path: Path) -> dict[str, Any]:
    """Return the options that a run was begun with, by the checkpoint that it goes on from."""
    training = load_checkpoint(path).get("training") if path.exists() else None
    options = training.get("options") if isinstance(training, dict) else None
    if not isinstance(options, dict):  # of an earlier version
        return {}
    found = {name: options.get(name) for name in OPTIONS}
    return {name: x for name, x in found.items() if type(x) is OPTIONS[name] and x > 0}


def files_of_run(out: Path) -> list[Path]:
    """Return the files of a run that are in a folder, its checkpoints first; [] if it has none."""
    checkpoints = [path for path in out.glob("Unet_checkpoint_*.pt") if CHECKPOINT(path.name)]
    if not checkpoints:
        return []
    return [*sorted(checkpoints), out / LOG, *sorted((out / BOARD).glob("events.out.tfevents.*"))]


@contextlib.contextmanager
def hold(out: Path, processes: Processes) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be; if nothing comes of it, it goes.

    Raises:
        UserError: another run of this machine is at work there, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        fault, made = "", processes.first and not out.exists()
        if processes.first:
            try:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone_in(out))
            except OSError as error:
                fault = refused(error)
        if fault := processes.collect([fault])[0]:
            raise UserError(fault)
        try:
            yield
        finally:
            if made:
                with contextlib.suppress(OSError):
                    out.rmdir()


def check_folder(out: Path, resume: bool, overwrite: bool, processes: Processes) -> list[Path]:
    """Return the files of a former run that a new one in a folder replaces; [] to go on with it.

    The first process looks, for all of them.

    Raises:
        UserError: there is one, and it is not to be overwritten; or it is to go on, and later
            epochs are there, but no state: begun anew, its first epoch would take their place.
    """
    found, fault = files_of_run(out) if processes.first else [], ""
    if resume and not (out / LAST).exists():
        checkpoints = [path for path in found if CHECKPOINT(path.name)]
        later = [path for path in checkpoints if (load_checkpoint(path).get("epoch") or 0) > 1]
        if later:
            fault = (
                f"{out} holds {later[0].name} of a run, but no {LAST} to go on from: bring it "
                "here, or begin anew from that file with --init"
            )
    elif found and not resume and not overwrite:
        fault = (
            f"{out} holds a run ({found[0].name}, ...): --resume goes on with it, another --out "
            "begins a new one, --overwrite deletes it once the new one has a checkpoint"
        )
    if fault := processes.collect([fault])[0]:
        raise UserError(fault)
    return [] if resume else found


class Keeper:
    """Saves a run within an epoch: every few minutes, and when a signal asks it to stop.

    SIGTERM and Ctrl-C end the step first, a second one of them ends a single process at once.

        with Keeper(run, out) as keeper:
            ...  # a step
            keeper.check()

    Several processes stop after the same step: whoever got the signal, they ask each other.
    """

    def __init__(self, run: Run, out: Path):
        self.run, self.out, self.processes = run, out, run.processes
        self.signal, self.saved = 0, time.monotonic()
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "Keeper":
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        self._restore()
        died = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
        if died and self.signal and self.processes.count == 1:  # a Ctrl-C that it was not ready for
            self._act(self.signal)

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self.processes.count == 1:  # torchrun passes a Ctrl-C on that a process has had already
            self._restore()

    def check(self) -> None:
        """Save or stop after a step, where that is due. Raises Stopped: the state is saved."""
        if self.processes.count == 1 or self.run.step % AGREE_EVERY == 0:
            self._act(max(self.processes.gather(self._requested())))

    def check_epoch(self) -> None:
        """Stop after an epoch that has just been saved, if that is due. Raises Stopped."""
        self.saved = time.monotonic()
        if number := max(self.processes.gather(self.signal)):
            raise self._stopped(number)

    def check_validation(self) -> None:
        """Stop while a single process validates; several end that first. Raises Stopped."""
        if self.processes.count == 1 and self.signal:
            self._act(self.signal)

    def _requested(self) -> int:
        due = self.processes.first and time.monotonic() - self.saved > SAVE_EVERY
        return self.signal or (SAVE if due else 0)

    def _act(self, request: int) -> None:
        """Save, and raise Stopped if a signal requests it; every process with the same request."""
        if not request:
            return
        self.run.loss.look()
        if self.processes.first and self.run.step:  # before, there is nothing to go on from
            self.run.save_last(self.out)
        self.saved = time.monotonic()
        if request != SAVE:
            raise self._stopped(request)

    def _stopped(self, number: int) -> Stopped:
        if not self.processes.first:
            return Stopped("", number)
        launcher = "python" if self.processes.count == 1 else "torchrun ..."
        if not self.run.step:
            again = shlex.join(sys.argv)
            return Stopped(
                f"\nstopped before the first step; begin with: {launcher} {again}", number
            )
        within = f"step {self.run.done} of epoch {self.run.epoch + 1}"
        where = within if self.run.done else f"epoch {self.run.epoch}"
        command = f"{launcher} {resuming()}"
        return Stopped(f"\nstopped after {where}, all is saved; go on with: {command}", number)


def first_words(run: Run, init: Path | None) -> str:
    """Return what is printed of how a run begins or goes on."""
    words = [f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters"]
    if not run.begins:
        within = f" and step {run.done}" if run.done else ""
        words.append(f"going on after epoch {run.epoch} of {run.num_epochs}{within}")
    else:
        words.append(f"starting from {f'the weights of {init}' if init else 'nothing'}")
    words.append(
        "validation reads each frame alone; infer.py also follows objects and scores higher"
    )
    words.append(f"learning rate up to {run.highest_rate:g}")
    if run.epoch >= run.num_epochs:
        words.append(f"nothing left to do: {run.epoch} of {run.num_epochs} epochs are done")
    return "\n".join(words)


def began_at(out: Path) -> str:
    """Return words for the weighted IoU of what a run began with; "" where that was nothing."""
    try:
        return f" (began at {float(lines(out / LOG, 0)[0]['weighted_iou']):.3f})"
    except (UserError, IndexError, ValueError):  # no such line, or no object to be found in it
        return ""


def last_words(out: Path, data: Path) -> str:
    """Return what is printed at the end: what a run came to, its files, what to type next."""
    file = out / BEST
    try:
        best = load_checkpoint(file)
        iou, epoch = f"{best['weighted_iou']:.3f}", best["epoch"]
        came_to = f"best weighted IoU: {iou}, after epoch {epoch}{began_at(out)}"
        if not epoch:
            came_to = f"nothing was better than what it began with, weighted IoU {iou}"
    except (UserError, KeyError):  # deleted or damaged since, or of an earlier version
        file, came_to = out / LAST, "weights of the last epoch"
    script = str(Path(sys.argv[0]).with_name("infer.py"))
    command = ["python", script, "--ckpt", str(file), "--out", "masks", "--data", str(data)]
    return (
        f"{came_to}, in {file}\n"
        f"figures of every epoch: {out / LOG}, and curves and pictures with: "
        f"{shlex.join(['tensorboard', '--logdir', str(out / BOARD)])}\n"
        f"label these or other videos with: {shlex.join(command)}"
    )
