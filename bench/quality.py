"""How good each network is after the same minutes of train.py's recipe: `benchmark.py --minutes`.

All have the same batches and the rate for batches of 16; unlike train.py nothing gathers the batch
statistics of the averaged weights anew.
The clock stands still while a network is looked at. On a CPU it counts the time for which this
process had cores, shared by its threads, so that other programs take nothing from a network.
"""

import copy
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import devices
import utils
from augment import augment
from batches import ShardedBatches
from bench.peers import NETWORKS
from bench.speed import train_loader
from dataset import CLEVRDataset, split_data
from evaluate import Tally
from labelling import Labeller
from optim import MuonAdamW, learning_rate_at, update_ema
from scale import AS_THEY_ARE
from train import MAX_NORM, RATES, validate

LOOKS = 40  # at a network while it learns
LOOK_AT = 44  # validation frames, evenly apart
SEEN = 0.9  # of foreground IoU: about where masks begin to be of use


def clock(device: torch.device) -> float:
    """Return seconds of this process's work, the clock of `--minutes`."""
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    return time.perf_counter()


def endless(loader: DataLoader) -> Iterator[Any]:
    """Yield the batches of epoch after epoch, each in another order."""
    for epoch in count():
        loader.batch_sampler.set_epoch(epoch)
        yield from loader


def train_for(
    minutes: float,
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    look: Callable[[float, nn.Module], None],
) -> tuple[nn.Module, int]:
    """Train a network for `minutes` with train.py's recipe; `look(minutes so far, ema)` at times.

    The learning rate goes by the time that has passed, so that each completes its schedule.

    Returns:
        The average of the weights, and the number of steps.
    """
    ema, optimizer = copy.deepcopy(model).requires_grad_(False), MuonAdamW(model)
    steps, passed, looks, start = 0, 0.0, 0, clock(device)
    model.train()
    for images, masks in endless(loader):
        crops, targets = augment(images.to(device), masks.to(device))
        with devices.mixed_precision(device):
            loss = model(crops, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step(learning_rate_at(min(passed, 1.0), RATES[0]))
        update_ema(ema, model, steps)
        steps += 1
        passed += max(clock(device) - start, 1e-9) / (60 * minutes)
        if int(LOOKS * passed) > looks:
            looks = int(LOOKS * passed)
            look(minutes * passed, ema)
        if passed >= 1:
            break
        start = clock(device)
    return ema, steps


@torch.inference_mode()
def label_whole(
    model: nn.Module, data: CLEVRDataset, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name, the true and the predicted labels (T, H, W) of each video, as infer.py's."""
    labeller = Labeller(model, device, scale=AS_THEY_ARE)
    for v, video in enumerate(data.videos):
        frames = data.video(v)
        truth = torch.stack([data[i][1] for i in (data.index[:, 0] == v).nonzero()[0]])
        yield video.path.name, truth, labeller.label([frames])[0].labels


def measure_quality(
    names: list[str], data: Path, minutes: float, batch_size: int, device: torch.device
) -> list[dict[str, Any]]:
    """Train each network for `minutes`; return its validation figures.

    Frame by frame as of train.py, through objects.py as of evaluate.py (keys tracked_miou,
    tracked_video_miou), and the minutes after which its foreground IoU first was SEEN.
    """
    processes = devices.Processes(device)
    training, validation, _ = split_data(data, 0)
    few = Subset(validation, range(0, len(validation), max(1, len(validation) // LOOK_AT)))

    def load(frames: CLEVRDataset | Subset, size: int, shuffle: bool) -> DataLoader:
        batches = ShardedBatches(len(frames), size, processes, shuffle)
        return train_loader(frames, batches, device)

    rows = []
    for name in names:
        utils.seed_everything(0, deterministic=device.type == "cpu")
        curve: list[tuple[float, float]] = []

        def look(spent: float, ema: nn.Module, curve: list = curve) -> None:
            figures = validate(ema, load(few, batch_size, False), processes)
            curve.append((spent, figures["foreground_iou"] or 0.0))

        loader = load(training, batch_size, True)
        ema, steps = train_for(minutes, NETWORKS[name]().to(device), loader, device, look)
        figures = validate(ema, load(validation, 2 * batch_size, False), processes)
        tally = Tally()
        for video in label_whole(ema.eval(), validation, device):
            tally.add(*video)
        tracked = tally.figures()
        rows.append({"network": name, "minutes": minutes, "steps": steps, **figures})
        rows[-1] |= {f"tracked_{key}": tracked[key] for key in ("miou", "video_miou")}
        rows[-1]["frames"] = steps * min(batch_size, len(training))
        rows[-1]["curve"] = curve
        rows[-1]["minutes_until_seen"] = next((t for t, iou in curve if iou >= SEEN), None)
        print(f"{name}: mIoU {figures['miou']:.3f} after {steps} steps", flush=True)
    return rows
