"""Validation while a network learns: its figures, and a few pictures of what it sees."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from classes import CLASS_NAMES, NUM_CLASSES
from dataset import CLEVRDataset
from devices import Processes, mixed_precision
from log import Log
from metrics import confusion_matrix, summarise
from model import for_labelling

SHOWN = 3  # frames in TensorBoard
BLIND_STEPS = 100


@torch.inference_mode()
def validate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    processes: Processes,
    attend: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return evaluate.py's figures and val_loss for whole frames, each counted exactly once.

    They are those of the network as infer.py uses it; `model` stays as it is. `attend` is called
    after every batch.
    """
    model = for_labelling(copy.deepcopy(model), device)
    confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64, device=device)
    losses = [torch.zeros(0, device=device)]
    for images, masks in tqdm(loader, "validating", leave=False, disable=None, unit="batch"):
        images, masks = (x.to(device, non_blocking=True) for x in (images, masks))
        with mixed_precision(device):
            stages = model.stages(images)
        # A loss for each frame by itself, so that the mean does not depend on the batches.
        losses.append(model.frame_losses(stages, masks))
        confusion += confusion_matrix(masks, model.labels(stages))
        attend()
    losses = torch.cat(losses).cpu().double()
    total = torch.stack((losses.sum(), torch.tensor(len(losses)).double()))
    confusion = confusion.cpu()
    processes.add_up(confusion)
    processes.add_up(total)
    return {"val_loss": (total[0] / total[1]).item(), **summarise(confusion)}


def is_blind(figures: dict[str, Any], step: int, steps: int, total: int) -> str:
    """Return a warning where a network sees no object, once in a run; "" if all is well.

    Args:
        figures: As of `validate`.
        step: Steps of training that it has had. For the first BLIND_STEPS, more than twice what
            one that starts from nothing needs, it may be so.
        steps: Steps of an epoch.
        total: Steps of the whole run.
    """
    objects = sum(pixels for name, pixels in figures["pixels"].items() if name != CLASS_NAMES[0])
    now = step - steps < min(BLIND_STEPS, total) <= step
    if not objects or figures["foreground_iou"] > 0 or not now:
        return ""
    return (
        f"warning: after {step} steps the network sees no object in any validation frame: look at "
        "the masks with preview.py or dataset.py, and at --learning-rate"
    )


@torch.inference_mode()
def draw_some(
    log: Log, epoch: int, model: nn.Module, data: CLEVRDataset, device: torch.device
) -> None:
    """Show what `validate` sees of a few frames, always the same ones, evenly apart in `data`."""
    chosen = sorted({(2 * k + 1) * len(data) // (2 * SHOWN) for k in range(SHOWN)})
    frames, truth = default_collate([data[i] for i in chosen])
    model = for_labelling(copy.deepcopy(model), device)
    with mixed_precision(device):
        stages = model.stages(frames.to(device))
    log.draw(epoch, frames, truth, model.labels(stages).cpu())
