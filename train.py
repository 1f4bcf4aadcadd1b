"""Train the UNet on labelled CLEVR videos, or on rendered ones if you have none.

    python train.py                                        # renders data/demo first
    python train.py --data path --num-epochs 10            # your own videos
    python train.py --data path --resume                   # go on after an interruption
    python train.py --data path --init none                # do not start from the shipped weights
    torchrun --nproc-per-node=8 train.py --data path       # eight GPUs

`path` is a folder of videos (a tenth of them is set aside for validation) or has train/ and val/.
Training on it starts from weights/clevr_unet.pt, and an epoch of few videos goes through them
several times, so that three are enough.
Writes Unet_checkpoint_epoch_X.pt every 5 epochs and after the last, Unet_checkpoint_last.pt after
every epoch and every 5 minutes, Unet_checkpoint_best.pt by weighted IoU in validation, log.csv and
TensorBoard events to --out. SIGTERM and Ctrl-C stop it after the current step, with all of its
state saved.
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from augment import augment
from batches import load_data, videos_of
from checkpoints import SHIPPED
from devices import Processes, choose_device, compile_network, mixed_precision
from log import Log, Pace, epoch_line
from model import MAX_STAGES, UNet
from optim import learning_rate_at, scaled_rate, settle_statistics, update_average
from render import DEMO_DATA, render_demo
from runs import NOTHING, Keeper, Run, build_model, last_words, load_init
from utils import at_least, log_header, make_parser, run_script, seed_everything
from validation import draw_some, is_blind, validate

SETTLE_STEPS = 10  # or a tenth of the epoch: whose batches are shown once more
LOOK_EVERY = 50  # steps: to look at a loss is to wait for the device
PULL = 1300  # over the training frames, as of MuonAdamW: the fewer, the closer to the weights given
RATES = 4e-3, 1e-3  # highest, of steps of 16 frames: from nothing, from trained weights
MAX_NORM = 5.0  # of the gradient: some ten times a usual one, so that only an accident is cut


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--data", type=Path, default=DEMO_DATA, help="videos (default: %(default)s, rendered)")
    add("--out", type=Path, default=Path("checkpoints"), help="folder (default: %(default)s)")
    add("--resume", action="store_true", help="go on from Unet_checkpoint_last.pt under --out")
    add("--no-cache", action="store_true", help="decode the PNG files anew in every epoch")
    add = parser.add_argument_group("learning").add_argument
    add("--num-epochs", type=at_least(1), help="in all (default: 8, or 30 with a file as --init)")
    add(
        "--batch-size",
        type=at_least(1),
        default=16,
        help="frames a step, of all processes together (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=float,
        help="highest (default: 4e-3, or 1e-3 from trained weights; times the square root of "
        "batch size / 16 where that is more than 1, at most twice)",
    )
    add(
        "--init",
        type=Path,
        help="checkpoint whose weights to start from; none: from nothing, as without --data and "
        f"with --widths (default: {SHIPPED.parent.name}/{SHIPPED.name})",
    )
    add(
        "--widths",
        type=at_least(1),
        nargs="+",
        help="channels of each stage of the UNet, two or more numbers (default: 32 48 96 160)",
    )
    add("--seed", type=int, default=0, help="of weights, split and batches (default: %(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda or cuda:N (default: CUDA if available)")
    add(
        "--workers",
        type=at_least(0),
        help="processes that read, of each training process (default: on a CPU 0, else up to 4)",
    )
    add("--compile", action="store_true", help="torch.compile: a minute more to start, then faster")
    add(
        "--deterministic",
        action="store_true",
        help="the same bits from the same seed and after --resume on a GPU too, for some speed; "
        "on a CPU that is always so",
    )
    args = parser.parse_args()
    if args.num_epochs is None:
        args.num_epochs = 30 if args.init and args.init != NOTHING else 8
    if args.learning_rate is not None and not 0 < args.learning_rate < math.inf:
        parser.error("--learning-rate must be more than 0")
    if args.widths and not 2 <= len(args.widths) <= MAX_STAGES:
        parser.error(f"--widths needs two to {MAX_STAGES} numbers, one for each stage")
    return args


def train_one_epoch(
    run: Run,
    parallel: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    rate_at: Callable[[int], float],
    device: torch.device,
    change: Callable = augment,
    attend: Callable[[], None] = lambda: None,
    left: Callable[[], str] = lambda: "",
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        run: What is trained.
        parallel: `run.model`, or what shares its gradients among the processes.
        loader: Batches of images (B, 3, H, W) and masks (B, H, W), uint8.
        rate_at: The learning rate of a step.
        device: Where the network is.
        change: What is done to a batch first.
        attend: Called after every step.
        left: Returns how long the rest of the run takes, for the progress bar.

    Returns:
        train_loss (mean, also of steps before a stop), lr (the last), frames_per_s (of this
        process), waiting (share of the time that went into waiting for data).
    """
    parallel.train()
    frames, waited = 0, 0.0
    start = asked = time.perf_counter()
    bar = tqdm(loader, "training", leave=False, disable=None, unit="batch")
    for images, masks in bar:
        waited += time.perf_counter() - asked
        crops, targets = change(*(x.to(device, non_blocking=True) for x in (images, masks)))
        with mixed_precision(device):
            loss = parallel(crops, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), MAX_NORM)
        run.optimizer.step(rate_at(run.step))
        update_average(run.average, run.model, run.step)
        run.step += 1
        run.done += 1
        run.loss.add(loss)
        frames += len(images)
        if run.step % LOOK_EVERY == 0:
            latest, seconds = run.loss.look(), time.perf_counter() - start
            rates = f"{frames / seconds:.1f} frames/s, {waited / seconds:.0%} waiting for data"
            parts = (f"loss {latest:.3f}", rates, left())
            bar.set_postfix_str(", ".join(filter(None, parts)), refresh=False)
        attend()
        asked = time.perf_counter()
    train_loss = run.loss.mean()  # waits for the device: the seconds are its own
    seconds = time.perf_counter() - start
    return {
        "train_loss": train_loss,
        "lr": rate_at(max(run.step - 1, 0)),
        "frames_per_s": frames / seconds,
        "waiting": waited / seconds,
    }


def settle(run: Run, loader: DataLoader, processes: Processes) -> None:
    """Show the averaged network the last batches of an epoch once more, for its statistics."""
    device = processes.device
    loader.batch_sampler.done = max(0, len(loader) - max(SETTLE_STEPS, len(loader) // 10))
    crops = (augment(x.to(device), masks.to(device))[0] for x, masks in loader)
    settle_statistics(run.average, crops, device, processes)
    processes.copy_first(run.average)


def start_run(
    args: argparse.Namespace, init: tuple[UNet, Path] | None, loader: DataLoader, rate: float
) -> Run:
    """Return the run, new or resumed, the same one on all processes.

    Args:
        args: The command line.
        init: As of `load_init`.
        loader: The batches of an epoch.
        rate: The highest learning rate.

    Raises:
        UserError: the processes do not all find the same checkpoint.
    """
    processes, data = loader.batch_sampler.processes, loader.dataset
    trained, file = init or (None, None)
    model = build_model(trained, args.widths, processes.device)
    run = Run.start(model, PULL / len(data) if trained else 0.0)
    run.facts = {
        "data": str(args.data.resolve()),
        "seed": args.seed,
        "frame_size": list(data[0][0].shape[1:]),  # scale.py asks for it
    }
    run.loss.videos = lambda ago: videos_of(loader, (run.done - 2 - ago, run.done - 1 - ago))
    run.begin(args.out if args.resume else None, args.batch_size, len(loader), processes)
    if processes.first:
        print(f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters")
        if not run.step:
            whose = f"the weights of {file}" if file else "nothing"
            print(f"starting from {whose}, with a learning rate of up to {rate:g}")
        if run.step:
            within = f" and step {run.done}" if run.done else ""
            print(f"going on after epoch {run.epoch}{within}")
        if run.epoch >= args.num_epochs:
            print(f"nothing left to do: {run.epoch} of {args.num_epochs} epochs are done")
    return run


def main() -> None:
    """Prepare data, network and optimiser, then train, validate and save epoch by epoch."""
    args = parse_args()
    processes = Processes(choose_device(args.device))
    device = processes.device
    seed_everything(args.seed, deterministic=args.deterministic or device.type == "cpu")
    if processes.first:
        print(log_header(device))
        if args.data == DEMO_DATA:
            render_demo()
    processes.wait()

    init = load_init(args.init, args.data, args.widths, processes.first)
    rate = args.learning_rate or scaled_rate(RATES[bool(init)], args.batch_size)
    loader, val_loader = load_data(
        args.data, args.batch_size, args.seed, not args.no_cache, args.workers, processes
    )
    run = start_run(args, init, loader, rate)
    if args.compile:
        images, masks = next(iter(loader))
        compile_network(run.model.train(), augment(images.to(device), masks.to(device))[0])
    warnings.filterwarnings("ignore", "Grad strides do not match")  # those of sides of length 1
    train_epochs(args, run, loader, val_loader, rate, processes)
    if processes.first:
        print(last_words(args.out, args.data))


def train_epochs(
    args: argparse.Namespace,
    run: Run,
    loader: DataLoader,
    val_loader: DataLoader,
    rate: float,
    processes: Processes,
) -> None:
    """Train, validate and save epoch by epoch, up to the learning rate `rate`."""
    device, total_steps, pace = processes.device, args.num_epochs * len(loader), Pace()
    parallel = DistributedDataParallel(run.model) if processes.count > 1 else run.model
    if processes.first:
        args.out.mkdir(parents=True, exist_ok=True)
        log = Log(args.out, run.epoch)

    def rate_at(step: int) -> float:
        return learning_rate_at(step / total_steps, rate)

    def seed_step() -> None:
        # Every step has a seed of its own, so that a run which was stopped goes on like another.
        number = run.step * processes.count + processes.rank
        torch.manual_seed((1_000_000_007 * args.seed + number) % 2**63)

    def change(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        seed_step()
        return augment(images, masks)

    def left() -> str:
        return pace.left(total_steps - run.step, args.num_epochs - run.epoch)

    with Keeper(run, args.out, args.batch_size, processes) as keeper:

        def attend() -> None:
            pace.stepped()
            keeper.attend()

        while run.epoch < args.num_epochs:
            loader.batch_sampler.epoch, loader.batch_sampler.done = run.epoch + 1, run.done
            figures = train_one_epoch(run, parallel, loader, rate_at, device, change, attend, left)
            figures["frames_per_s"] *= processes.count
            seed_step()
            settle(run, loader, processes)
            figures |= validate(
                run.average, val_loader, device, processes, keeper.attend_validation
            )
            run.epoch, run.done = run.epoch + 1, 0
            run.loss.begin()
            if processes.first:
                if warning := is_blind(figures, run.step, len(loader), total_steps):
                    print(warning, file=sys.stderr, flush=True)
                figures["epoch"] = run.epoch
                log.add(figures)
                run.save(args.out, figures, args.num_epochs, args.batch_size)
                if log.wants_picture() or run.epoch == args.num_epochs:
                    draw_some(log, run.epoch, run.average, val_loader.dataset, device)
            pace.ended()
            if processes.first:
                print(epoch_line(figures, left()), flush=True)
            if run.epoch < args.num_epochs:
                keeper.attend_epoch()


if __name__ == "__main__":
    run_script(main)
