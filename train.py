"""Train the UNet on labelled CLEVR videos, or on rendered ones if you have none.

    python train.py                                        # renders data/demo first
    python train.py --data path --num-epochs 10            # your own videos
    python train.py --data path --resume                   # go on after an interruption
    python train.py --data path --init weights/clevr_unet.pt   # fine-tune
    torchrun --nproc-per-node=8 train.py --data path       # eight GPUs

`path` is a folder of videos (a tenth of them is set aside for validation) or has train/ and val/.
Writes Unet_checkpoint_epoch_X.pt every 5 epochs and after the last, Unet_checkpoint_last.pt after
every epoch, Unet_checkpoint_best.pt by validation mIoU, log.csv and TensorBoard events to --out.
"""

import argparse
import copy
import csv
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader, Sampler
from torch.utils.tensorboard import SummaryWriter
from torchvision.tv_tensors import Image, Mask
from tqdm import tqdm

from dataset import CLEVRDataset, DataError, augmentation, find_videos
from evaluate import confusion_matrix, summarise
from model import CLASSIC, FACTOR_SIZES, Stage, UNet, at_pixels, cell_width
from render import render_dataset
from utils import (
    Processes,
    UserError,
    choose_device,
    compile_network,
    has_bfloat16,
    load_checkpoint,
    load_model,
    log_header,
    mixed_precision,
    run_script,
    save_checkpoint,
    seed_everything,
)

DEMO_DATA = Path("data/demo")
DEMO_VIDEOS = 160
DEMO_OBJECTS = (4, 10)  # a video
CHECKPOINT_EVERY = 5  # epochs
CROPS_PER_FRAME = 2  # of 96 x 96 pixels; more frames teach more than more crops of each
AVERAGE_DECAY = 0.995  # of the running mean of the weights, a step
WARM_UP, DECAY_FROM = 0.02, 0.4  # shares of the run: rise to the full learning rate, start to fall
LOG_FIELDS = ("epoch", "train_loss", "val_loss", "miou", "foreground_iou", "lr", "frames_per_s")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=DEMO_DATA, help="videos (default %(default)s, rendered)")
    add("--out", type=Path, default=Path("checkpoints"), help="folder (default %(default)s)")
    add("--num-epochs", type=int, help="passes over the data (default: 8, or 30 with --init)")
    add("--batch-size", type=int, default=16, help="frames a step (default %(default)s)")
    add("--learning-rate", type=float, help="highest (default: 4e-3, or 1e-3 with --init)")
    add("--init", type=Path, help="start from the weights of this checkpoint")
    add("--resume", action="store_true", help="go on from Unet_checkpoint_last.pt under --out")
    add("--seed", type=int, default=0, help="of weights, split and batches (default %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: CUDA if available)")
    add("--workers", type=int, default=0, help="processes that read frames (default %(default)s)")
    add("--no-cache", action="store_true", help="decode the PNG files anew in every epoch")
    add("--compile", action="store_true", help="torch.compile: a minute more to start, then faster")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--widths", type=int, nargs="+", help="channels of each stage of the UNet")
    size.add_argument(
        "--classic", action="store_true", help="UNet of 64..1024, AdamW, whole frames"
    )
    args = parser.parse_args()
    if args.num_epochs is None:
        args.num_epochs = 30 if args.init else 8
    if args.learning_rate is None:
        args.learning_rate = 1e-3 if args.init or args.classic else 4e-3
    for name in ("num_epochs", "batch_size", "learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    if args.workers < 0:
        parser.error("--workers must be 0 or more")
    return args


def render_demo() -> None:
    """Render what is missing of the default data."""
    render_dataset(DEMO_DATA, DEMO_VIDEOS, objects=DEMO_OBJECTS)


def split_videos(path: Path, seed: int) -> tuple[list[Path], list[Path]]:
    """Return the training and the validation videos, never parts of one video in both.

    Raises:
        DataError: fewer than two labelled videos.
    """
    if (path / "train").is_dir() and (path / "val").is_dir():
        return tuple(
            [v for v in find_videos(path / part) if (v / "mask.npy").exists()]
            for part in ("train", "val")
        )
    videos = [video for video in find_videos(path) if (video / "mask.npy").exists()]
    if len(videos) < 2:
        raise DataError(
            f"{path} has {len(videos)} labelled video(s): give at least two, "
            "one to learn from and one to validate on"
        )
    chosen = set(random.Random(seed).sample(range(len(videos)), max(1, len(videos) // 10)))
    return (
        [video for i, video in enumerate(videos) if i not in chosen],
        [video for i, video in enumerate(videos) if i in chosen],
    )


class ShardedBatches(Sampler[list[int]]):
    """Batches of frame numbers; each process gets its share of every batch.

    Args:
        frames: Number of frames.
        batch_size: Frames of one batch, over all processes.
        processes: Who takes part.
        shuffle: Another order in each `epoch` (set it), and no incomplete last batch unless it is
            the only one; else in order, every frame exactly once.
    """

    def __init__(self, frames: int, batch_size: int, processes: Processes, shuffle: bool, seed=0):
        self.frames, self.batch_size, self.processes = frames, batch_size, processes
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def __len__(self) -> int:
        if self.shuffle:
            return max(1, self.frames // self.batch_size)
        return math.ceil(self.frames / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = range(self.frames)
        if self.shuffle:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
            order = torch.randperm(self.frames, generator=generator).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = order[start : start + self.batch_size]
            yield batch[self.processes.rank :: self.processes.count]


def loss_function(stages: list[Stage], mask: Tensor) -> Tensor:
    """Return the loss of the logits of every decoder stage.

    Factored logits: is it an object (binary cross entropy over all pixels), and, on object pixels
    alone, which shape, material and colour (a cross entropy each), so that the 95 % of background
    do not drown what the objects are. Coarse stages, supervised at half weight, learn from the
    pixel at the middle of each of their cells. Other logits: 49-way cross entropy.

    Args:
        stages: what `UNet.forward` returns with `stages`, coarsest first.
        mask: (B, H, W) int64 ids.
    """
    total = torch.zeros((), device=mask.device)
    for stage in stages:
        if isinstance(stage, Tensor):
            total = total + F.cross_entropy(stage.float(), mask)
            continue
        thing, kind = stage
        target = subsample(mask, thing)
        loss = factored_loss(thing, kind, target)
        total = total + (loss if target.shape == mask.shape else 0.5 * loss)
    return total


def only(stage: Stage, i: int) -> Stage:
    """Return what a stage says of frame `i` of its batch, as a batch of one."""
    if isinstance(stage, Tensor):
        return stage[i : i + 1]
    return tuple(part[i : i + 1] for part in stage)


def subsample(mask: Tensor, cells: Tensor) -> Tensor:
    """Return the ids (B, h, w) at the middle of the cells (B, C, h, w) of a mask (B, H, W)."""
    width = cell_width(cells, mask)
    rows, columns = (
        (width * torch.arange(number, device=mask.device) + width // 2).clamp(max=pixels - 1)
        for number, pixels in zip(cells.shape[-2:], mask.shape[-2:], strict=True)
    )
    return mask[:, rows[:, None], columns]


def factored_loss(thing: Tensor, kind: Tensor, mask: Tensor) -> Tensor:
    """Return the loss of factored logits (B, 1, h, w) and (B, 13, h', w') against ids (B, h, w)."""
    inside = mask > 0
    loss = 2 * F.binary_cross_entropy_with_logits(thing[:, 0].float(), inside.float())
    ids = mask[inside] - 1
    if len(ids):
        shape, material, colour = at_pixels(kind, inside).float().split(FACTOR_SIZES, dim=1)
        loss = loss + F.cross_entropy(shape, ids // 16)
        loss = loss + F.cross_entropy(material, ids // 8 % 2)
        loss = loss + F.cross_entropy(colour, ids % 8)
    return loss


class MuonAdamW:
    """Muon for the 3x3 convolutions, AdamW for the rest (for all, without `muon`).

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix by its
    orthogonalised momentum; a convolution is a matrix (out, in * 3 * 3), and the step is scaled so
    that AdamW's learning rate fits (Liu et al. 2025, https://arxiv.org/abs/2502.16982). As
    torch.optim.Muon, which takes no convolutions, and computes in bfloat16 even where the hardware
    has none: there it takes longer than the network.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_decay: float = 0.02,
        momentum: float = 0.95,
        muon: bool = True,
    ):
        filters = [p for p in model.parameters() if muon and p.ndim == 4 and p.shape[-1] == 3]
        self.filters = [p for p in filters if p.shape[1] > 1]  # one channel makes no matrix
        chosen = {id(p) for p in self.filters}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self.adamw = AdamW(rest, weight_decay=weight_decay)
        self.velocities = [torch.zeros_like(p) for p in self.filters]
        self.weight_decay, self.momentum = weight_decay, momentum

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the weights and clear the gradients."""
        for weight, velocity in zip(self.filters, self.velocities, strict=True):
            velocity.lerp_(weight.grad, 1 - self.momentum)
            change = weight.grad.lerp(velocity, self.momentum).flatten(1)  # (out, in * 9)
            scale = 0.2 * max(change.shape) ** 0.5
            weight.mul_(1 - learning_rate * self.weight_decay)
            change = orthogonalise(change).view_as(weight)
            weight.add_(change.to(weight.dtype), alpha=-learning_rate * scale)
            weight.grad = None
        self.adamw.param_groups[0]["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimisers."""
        return {"adamw": self.adamw.state_dict(), "velocities": self.velocities}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.adamw.load_state_dict(state["adamw"])
        for velocity, saved in zip(self.velocities, state["velocities"], strict=True):
            velocity.copy_(saved)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix near 1, by five Newton-Schulz steps of order 5."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.to(torch.bfloat16) if has_bfloat16(matrix.device) else wide.clone()
    x /= x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T


def whole_frames(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return a batch as it is: the conventional way, for comparison."""
    return images, masks


def learning_rate_at(progress: float, highest: float) -> float:
    """Return the learning rate at `progress` (0..1) of the run: rise, stay, fall to zero."""
    return highest * min(1.0, (progress + 1e-3) / WARM_UP, (1 - progress) / (1 - DECAY_FROM))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move the running mean of the weights, which is what is validated and kept, one step on."""
    decay = min(AVERAGE_DECAY, (1 + step) / (10 + step))  # the first steps are soon forgotten
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def train_one_epoch(
    model: nn.Module,
    average: UNet,
    loader: Iterable,
    augment: Callable,
    optimizer: MuonAdamW,
    device: torch.device,
    first_step: int,
    total_steps: int,
    highest_rate: float,
) -> dict[str, float]:
    """Train on every batch once.

    Returns:
        train_loss (mean), lr (the last), frames (seen by this process), waiting (share of the
        time that went into waiting for data).
    """
    model.train()
    losses, frames, waited = [], 0, 0.0
    start = asked = time.perf_counter()
    bar = tqdm(loader, "training", leave=False, disable=None, unit="batch")
    for step, (images, masks) in enumerate(bar, first_step):
        waited += time.perf_counter() - asked
        images = images.to(device, non_blocking=True)
        masks = masks.to(device, non_blocking=True)
        crops, targets = augment(Image(images), Mask(masks))
        with mixed_precision(device):
            stages = model(crops, stages=True)
        loss = loss_function(stages, targets.long())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=5.0)
        rate = learning_rate_at(step / total_steps, highest_rate)
        optimizer.step(rate)
        update_average(average, model.module if hasattr(model, "module") else model, step)
        losses.append(loss.detach())
        frames += len(images)
        asked = time.perf_counter()
        if step % 10 == 0:
            seconds = asked - start
            rates = f"{frames / seconds:.1f} frames/s, {waited / seconds:.0%} waiting for data"
            bar.set_postfix_str(f"loss {loss.item():.3f}, {rates}", refresh=False)
    return {
        "train_loss": torch.stack(losses).mean().item(),
        "lr": rate,
        "frames": frames,
        "waiting": waited / (time.perf_counter() - start),
    }


@torch.inference_mode()
def validate(
    model: UNet, loader: DataLoader, device: torch.device, processes: Processes
) -> dict[str, Any]:
    """Return evaluate.py's figures and val_loss for whole frames, each counted exactly once."""
    model.eval()
    confusion = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64, device=device)
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, frames
    for images, masks in tqdm(loader, "validating", leave=False, disable=None, unit="batch"):
        if not len(images):  # this process has no share of the last batch
            continue
        images, masks = images.to(device), masks.to(device)
        with mixed_precision(device):
            stages = model(images, stages=True)
        for i in range(len(images)):  # so that the mean does not depend on the batches
            alone = [only(stage, i) for stage in stages]
            total[0] += loss_function(alone, masks[i : i + 1].long())
        total[1] += len(images)
        confusion += confusion_matrix(masks, model.labels(stages[-1]))
    processes.add_up(confusion)
    processes.add_up(total)
    return {"val_loss": (total[0] / total[1]).item(), **summarise(confusion)}


def open_log(path: Path, completed: int) -> csv.DictWriter:
    """Open a CSV log, keeping its lines up to epoch `completed` of a run that goes on."""
    kept = []
    if completed and path.exists():
        with path.open(newline="") as old:
            kept = [row for row in csv.DictReader(old) if int(row["epoch"]) <= completed]
    log = csv.DictWriter(path.open("w", newline="", buffering=1), LOG_FIELDS, extrasaction="ignore")
    log.writeheader()
    log.writerows(kept)
    return log


def build_model(args: argparse.Namespace) -> UNet:
    """Return the network that the command line asks for, with the weights of --init if given."""
    config = CLASSIC if args.classic else {"widths": args.widths} if args.widths else {}
    if not args.init:
        return UNet(**config)
    model, _ = load_model(UNet, args.init)
    if config and UNet(**config).config != model.config:
        raise UserError(f"{args.init} is another network: leave out --widths and --classic")
    return model


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

    train_videos, val_videos = split_videos(args.data, args.seed)
    training = CLEVRDataset(train_videos, cache=not args.no_cache)
    validation = CLEVRDataset(val_videos, cache=not args.no_cache)
    if min(args.batch_size, len(training)) < processes.count:
        raise UserError(
            f"{processes.count} processes share batches of {args.batch_size} out of "
            f"{len(training)} frames: start fewer, or give a larger --batch-size"
        )
    batches = ShardedBatches(len(training), args.batch_size, processes, True, args.seed)
    val_batches = ShardedBatches(len(validation), 2 * args.batch_size, processes, False)
    loading = {
        "collate_fn": CLEVRDataset.collate,
        "num_workers": args.workers,
        "pin_memory": device.type == "cuda",
        "persistent_workers": args.workers > 0,
    }
    loader = DataLoader(training, batch_sampler=batches, **loading)
    val_loader = DataLoader(validation, batch_sampler=val_batches, **loading)
    augment = whole_frames if args.classic else augmentation(CROPS_PER_FRAME)

    model = build_model(args).to(device)
    if device.type == "cuda":  # on a CPU the convolutions choose their own format
        model = model.to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = MuonAdamW(model, muon=not args.classic)
    completed, best = 0, -1.0
    last = args.out / "Unet_checkpoint_last.pt"
    if args.resume and last.exists():
        completed, best = resume(last, model, average, optimizer)
    if args.compile:
        images, masks = training.__getitems__(next(iter(batches)))
        images, _ = augment(Image(images.to(device)), Mask(masks.to(device)))
        compile_network(model.train(), images)
    parallel = DistributedDataParallel(model) if processes.count > 1 else model

    total_steps = args.num_epochs * len(batches)
    if processes.first:
        args.out.mkdir(parents=True, exist_ok=True)
        log = open_log(args.out / "log.csv", completed)
        board = SummaryWriter(args.out / "tensorboard", purge_step=completed + 1)
        print(
            f"{len(training)} training frames of {len(training.videos)} videos, "
            f"{len(validation)} validation frames of {len(validation.videos)} videos, "
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
        )
        if completed:
            print(f"going on after epoch {completed}")
        if completed >= args.num_epochs:
            print(f"nothing left to do: {completed} of {args.num_epochs} epochs are done")

    for epoch in range(completed + 1, args.num_epochs + 1):
        torch.manual_seed(1_000_003 * args.seed + epoch * processes.count + processes.rank)
        batches.epoch = epoch
        start = time.perf_counter()
        figures = train_one_epoch(
            parallel,
            average,
            loader,
            augment,
            optimizer,
            device,
            first_step=(epoch - 1) * len(batches),
            total_steps=total_steps,
            highest_rate=args.learning_rate,
        )
        seconds = time.perf_counter() - start
        figures["frames_per_s"] = processes.count * figures["frames"] / seconds
        processes.copy_first(average)
        figures |= {"epoch": epoch, **validate(average, val_loader, device, processes)}
        if not math.isfinite(figures["train_loss"]):
            raise UserError(f"the loss is no longer finite in epoch {epoch}: lower --learning-rate")
        if processes.first:
            report(figures, log, board)
            improved = figures["miou"] > best
            best = max(best, figures["miou"])
            checkpoint = {
                "model": average.state_dict(),
                "model_config": model.config,
                "data": str(args.data.resolve()),
                "epoch": epoch,
                "seed": args.seed,
                "miou": figures["miou"],
            }
            if epoch % CHECKPOINT_EVERY == 0 or epoch == args.num_epochs:
                save_checkpoint(args.out / f"Unet_checkpoint_epoch_{epoch}.pt", checkpoint)
            if improved:
                save_checkpoint(args.out / "Unet_checkpoint_best.pt", checkpoint)
            checkpoint["training"] = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "best_miou": best,
            }
            save_checkpoint(last, checkpoint)


def report(figures: dict[str, Any], log: csv.DictWriter, board: SummaryWriter) -> None:
    """Print one epoch's figures, and add them to the CSV and the TensorBoard log."""
    log.writerow({name: figures[name] for name in LOG_FIELDS})
    for name in LOG_FIELDS[1:]:
        board.add_scalar(name, figures[name], figures["epoch"])
    board.flush()
    print(
        f"epoch {figures['epoch']}: train loss {figures['train_loss']:.3f}, "
        f"validation loss {figures['val_loss']:.3f}, mIoU {figures['miou']:.3f}, "
        f"foreground IoU {figures['foreground_iou']:.3f}; "
        f"{figures['frames_per_s']:.1f} frames/s, {figures['waiting']:.0%} waiting for data",
        flush=True,
    )


def resume(path: Path, model: UNet, average: UNet, optimizer: MuonAdamW) -> tuple[int, float]:
    """Restore a run from its last checkpoint; return its completed epochs and best mIoU.

    Raises:
        UserError: the checkpoint is of another network.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint["model_config"] != model.config or "training" not in checkpoint:
        raise UserError(f"{path} is of another network: give its --widths, or another --out")
    state = checkpoint["training"]
    model.load_state_dict(state["model"])
    average.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(state["optimizer"])
    return checkpoint["epoch"], state["best_miou"]


if __name__ == "__main__":
    run_script(main, DataError)
