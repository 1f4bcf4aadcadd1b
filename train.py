"""Train the UNet on labelled CLEVR videos, or on rendered ones if you have none.

    python train.py                                        # renders data/demo first
    python train.py --data path --num-epochs 10            # your own videos
    python train.py --data path --resume                   # go on after an interruption
    python train.py --data path --init weights/clevr_unet.pt   # fine-tune
    torchrun --nproc-per-node=8 train.py --data path       # eight GPUs

`path` is a folder of videos (a tenth of them is set aside for validation) or has train/ and val/.
Writes Unet_checkpoint_epoch_X.pt every 5 epochs and after the last, Unet_checkpoint_last.pt after
every epoch, Unet_checkpoint_best.pt by weighted IoU in validation, log.csv and TensorBoard events
to --out.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from augment import augment
from classes import NUM_CLASSES
from dataset import CLEVRDataset, ShardedBatches, split_videos
from log import Log
from metrics import confusion_matrix, summarise
from model import UNet
from optim import learning_rate_at, update_average
from render import DEMO_DATA, render_demo
from runs import Run
from utils import (
    Processes,
    UserError,
    at_least,
    choose_device,
    compile_network,
    load_checkpoint,
    log_header,
    mixed_precision,
    run_script,
    seed_everything,
)

MAX_NORM = 5.0  # of the gradient: some ten times a usual one, so that only an accident is cut


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=DEMO_DATA, help="videos (default %(default)s, rendered)")
    add("--out", type=Path, default=Path("checkpoints"), help="folder (default %(default)s)")
    add(
        "--num-epochs",
        type=at_least(1),
        help="passes over the data (default: 8, or 30 with --init)",
    )
    add("--batch-size", type=at_least(1), default=16, help="frames a step (default %(default)s)")
    add("--learning-rate", type=float, help="highest (default: 4e-3, or 1e-3 with --init)")
    add("--init", type=Path, help="start from the weights of this checkpoint")
    add("--resume", action="store_true", help="go on from Unet_checkpoint_last.pt under --out")
    add("--seed", type=int, default=0, help="of weights, split and batches (default %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: CUDA if available)")
    add("--workers", type=at_least(0), default=0, help="processes that read (default %(default)s)")
    add("--no-cache", action="store_true", help="decode the PNG files anew in every epoch")
    add("--compile", action="store_true", help="torch.compile: a minute more to start, then faster")
    add("--widths", type=at_least(1), nargs="+", help="channels of each stage of the UNet")
    args = parser.parse_args()
    if args.num_epochs is None:
        args.num_epochs = 30 if args.init else 8
    if args.learning_rate is None:
        args.learning_rate = 1e-3 if args.init else 4e-3
    if not 0 < args.learning_rate < math.inf:
        parser.error("--learning-rate must be more than 0")
    if args.widths and len(args.widths) < 2:
        parser.error("--widths needs two numbers or more, one for each stage")
    return args


def train_one_epoch(
    run: Run,
    parallel: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    rate_at: Callable[[int], float],
    device: torch.device,
    change: Callable = augment,
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        run: What is trained.
        parallel: `run.model`, or what shares its gradients among the processes.
        loader: Batches of images (B, 3, H, W) and masks (B, H, W), uint8.
        rate_at: The learning rate of a step.
        device: Where the network is.
        change: What is done to a batch first.

    Returns:
        train_loss (mean), lr (the last), frames_per_s (of this process), waiting (share of the
        time that went into waiting for data).
    """
    parallel.train()
    losses, frames, waited = [], 0, 0.0
    start = asked = time.perf_counter()
    bar = tqdm(loader, "training", leave=False, disable=None, unit="batch")
    for images, masks in bar:
        waited += time.perf_counter() - asked
        crops, targets = change(
            images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        )
        with mixed_precision(device):
            loss = parallel(crops, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), MAX_NORM)
        rate = rate_at(run.step)
        run.optimizer.step(rate)
        update_average(run.average, run.model, run.step)
        run.step += 1
        losses.append(loss.detach())
        frames += len(images)
        asked = time.perf_counter()
        if run.step % 10 == 1:
            seconds = asked - start
            rates = f"{frames / seconds:.1f} frames/s, {waited / seconds:.0%} waiting for data"
            bar.set_postfix_str(f"loss {loss.item():.3f}, {rates}", refresh=False)
    train_loss = torch.stack(losses).mean().item()
    seconds = time.perf_counter() - start
    return {
        "train_loss": train_loss,
        "lr": rate,
        "frames_per_s": frames / seconds,
        "waiting": waited / seconds,
    }


@torch.inference_mode()
def validate(
    model: nn.Module, loader: DataLoader, device: torch.device, processes: Processes
) -> dict[str, Any]:
    """Return evaluate.py's figures and val_loss for whole frames, each counted exactly once."""
    model.eval()
    confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64, device=device)
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, frames
    for images, masks in tqdm(loader, "validating", leave=False, disable=None, unit="batch"):
        images, masks = images.to(device), masks.to(device)
        with mixed_precision(device):
            stages = model.stages(images)
        # A loss for each frame by itself, so that the mean does not depend on the batches.
        total[0] += model.frame_losses(stages, masks).double().sum()
        total[1] += len(images)
        confusion += confusion_matrix(masks, model.labels(stages))
    processes.add_up(confusion)
    processes.add_up(total)
    return {"val_loss": (total[0] / total[1]).item(), **summarise(confusion)}


def load_data(
    path: Path, batch_size: int, seed: int, cache: bool, workers: int, processes: Processes
) -> tuple[DataLoader, DataLoader]:
    """Return the batches of this process, for training and for validation.

    Raises:
        UserError: too few videos, or too few frames for so many processes.
    """
    training, validation = (
        CLEVRDataset(videos, cache=cache) for videos in split_videos(path, seed)
    )
    if min(batch_size, len(training)) < processes.count:
        raise UserError(
            f"{processes.count} processes share batches of {batch_size} out of "
            f"{len(training)} frames: start fewer, or give a larger --batch-size"
        )
    if processes.first:
        print(
            f"{len(training)} training frames of {len(training.videos)} videos, "
            f"{len(validation)} validation frames of {len(validation.videos)} videos"
        )
    batches = ShardedBatches(len(training), batch_size, processes, True, seed)
    val_batches = ShardedBatches(len(validation), 2 * batch_size, processes, False)
    loading = {
        "num_workers": workers,
        "pin_memory": processes.device.type == "cuda",
        "persistent_workers": workers > 0,
    }
    return (
        DataLoader(training, batch_sampler=batches, **loading),
        DataLoader(validation, batch_sampler=val_batches, **loading),
    )


def build_model(init: Path | None, widths: list[int] | None, device: torch.device) -> UNet:
    """Return the network that the command line asks for, with the weights of --init if given."""
    model = UNet(**({"widths": widths} if widths else {}))
    if init:
        trained = UNet.from_checkpoint(load_checkpoint(init), init)
        if widths and trained.config != model.config:
            raise UserError(f"{init} is another network: leave out --widths")
        model = trained
    if device.type == "cuda":  # on a CPU the convolutions choose their own format
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def main() -> None:
    """Prepare data, network and optimiser, then train, validate and save epoch by epoch."""
    args = parse_args()
    processes = Processes(choose_device(args.device))
    device = processes.device
    seed_everything(args.seed)
    if processes.first:
        print(log_header(device))
        if args.data == DEMO_DATA:
            render_demo()
    processes.wait()

    loader, val_loader = load_data(
        args.data, args.batch_size, args.seed, not args.no_cache, args.workers, processes
    )
    run = Run.start(build_model(args.init, args.widths, device))
    last = args.out / "Unet_checkpoint_last.pt"
    if args.resume and last.exists():
        run.resume(last)
    run.step = run.epoch * len(loader)
    if args.compile:
        images, masks = next(iter(loader))
        compile_network(run.model.train(), augment(images.to(device), masks.to(device))[0])
    parallel = DistributedDataParallel(run.model) if processes.count > 1 else run.model
    if processes.first:
        args.out.mkdir(parents=True, exist_ok=True)
        log = Log(args.out, run.epoch)
        print(f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters")
        if run.epoch:
            print(f"going on after epoch {run.epoch}")
        if run.epoch >= args.num_epochs:
            print(f"nothing left to do: {run.epoch} of {args.num_epochs} epochs are done")

    total_steps = args.num_epochs * len(loader)

    def rate_at(step: int) -> float:
        return learning_rate_at(step / total_steps, args.learning_rate)

    for epoch in range(run.epoch + 1, args.num_epochs + 1):
        torch.manual_seed(1_000_003 * args.seed + epoch * processes.count + processes.rank)
        loader.batch_sampler.epoch = epoch
        figures = train_one_epoch(run, parallel, loader, rate_at, device)
        figures["frames_per_s"] *= processes.count
        processes.copy_first(run.average)
        figures |= {"epoch": epoch, **validate(run.average, val_loader, device, processes)}
        if not math.isfinite(figures["train_loss"]):
            raise UserError(f"the loss is no longer finite in epoch {epoch}: lower --learning-rate")
        run.epoch = epoch
        if processes.first:
            log.add(figures)
            facts = {"data": str(args.data.resolve()), "seed": args.seed}
            facts |= {name: figures[name] or 0.0 for name in ("miou", "weighted_iou")}
            run.save(args.out, facts, args.num_epochs)


if __name__ == "__main__":
    run_script(main)
